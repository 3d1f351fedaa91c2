"""Denoisers made of denoisers by place: kept regions, prompts for regions, tiles. They leave the samplers alone.

Each estimates the whole clean picture x from estimates of parts of it, and what it gives back is affine in them, so
that noise, v and flow alike are mixed as their predictions would be.
"""

# b c h w: latents · 1 1 h w: masks, 0 to 1, at the latents' size

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from calotype.sampling.levels import Level
from calotype.sampling.samplers import Denoise


def keeping(denoise: Denoise, known: Tensor, mask: Tensor) -> Denoise:
    """Clean latents are drawn where the mask is 1, and `known` where it is 0; in between, in between.

    With x begun at alpha known + sigma noise, a sampler's own step takes the known part back to each level with the
    noise that it was begun with (or new one, where the sampler adds some): inpainting as of Lugmayr et al. 2022,
    section 3.1, without a line in any sampler.
    """

    def kept(x: Tensor, level: Level) -> Tensor:
        return known + mask * (denoise(x, level) - known)

    return kept


Answer = TypeVar("Answer")


def beside(denoise: Callable[[Tensor, Level], Answer], more: Tensor) -> Callable[[Tensor, Level], Answer]:
    """For a model that takes more than the noisy latents: `more` follows them along the channels."""

    def denoised(x: Tensor, level: Level) -> Answer:
        return denoise(torch.cat([x, more.expand(len(x), -1, -1, -1)], dim=1), level)

    return denoised


def blended(everywhere: Tensor, regions: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The mean of estimates (b c h w), by weight (b 1 h w): for `everywhere` 1, as in DiffSynth-Studio's painter."""
    clean, total = everywhere, torch.ones_like(everywhere[:1, :1])
    for region, weight in zip(regions, weights, strict=True):
        clean = clean + weight * region
        total = total + weight
    return clean / total


class Box(NamedTuple):
    """A rectangle of latents."""

    top: int
    left: int
    height: int
    width: int

    def times(self, scale: int) -> Box:
        """The rectangle of that many times finer a grid."""
        return Box(*(side * scale for side in self))

    def of(self, x: Tensor) -> Tensor:
        """This part of (... h w)."""
        return x[..., self.top : self.top + self.height, self.left : self.left + self.width]


def starts(length: int, size: int, stride: int) -> tuple[int, ...]:
    """Where tiles of `size` begin that cover `length`, `stride` apart; the last one ends where the picture does."""
    if size >= length:
        return (0,)
    last = length - size
    return (*range(0, last, stride), last)


def boxes(height: int, width: int, size: int, stride: int) -> tuple[Box, ...]:
    """Tiles that cover everything, as large as the picture where that is smaller than `size`."""
    return tuple(
        Box(top, left, min(size, height), min(size, width))
        for top in starts(height, size, stride)
        for left in starts(width, size, stride)
    )


class Tiles(NamedTuple):
    """Parts of the picture, of one size, and what denoises them: a row each."""

    boxes: Sequence[Box]
    denoise: Denoise


def tiled(groups: Sequence[Tiles], height: int, width: int) -> Denoise:
    """MultiDiffusion (Bar-Tal et al. 2023): the mean of what all tiles say of a place.

    A tile counts less towards its borders inside the picture, linearly over what it shares with its neighbours, so that
    none of them shows.
    """
    everyone = [box for group in groups for box in group.boxes]
    weights = {box: _weight(box, everyone, height, width) for box in everyone}
    total = torch.zeros(height, width)
    for box, weight in weights.items():
        box.of(total).add_(weight)
    shares = {box: weight / box.of(total) for box, weight in weights.items()}

    def denoise(x: Tensor, level: Level) -> Tensor:
        clean = torch.zeros_like(x)
        for group in groups:
            estimates = group.denoise(torch.cat([box.of(x) for box in group.boxes]), level)
            for box, estimate in zip(group.boxes, estimates.split(len(x)), strict=True):
                box.of(clean).add_(estimate * shares[box].to(x.device))
        return clean

    return denoise


def _weight(box: Box, others: Sequence[Box], height: int, width: int) -> Tensor:
    """(h w): 1 inside, less towards sides that a neighbour goes beyond."""
    rows = _ramp(box.top, box.height, height, [(other.top, other.height) for other in others])
    columns = _ramp(box.left, box.width, width, [(other.left, other.width) for other in others])
    return rows[:, None] * columns


def _ramp(start: int, size: int, length: int, others: Sequence[tuple[int, int]]) -> Tensor:
    weight = torch.ones(size)
    before = max((s + n - start for s, n in others if s < start), default=0) if start > 0 else 0
    end = start + size
    after = max((end - s for s, n in others if s + n > end), default=0) if end < length else 0
    place = torch.arange(size) + 0.5
    if before > 0:
        weight = torch.minimum(weight, place / min(before, size))
    if after > 0:
        weight = torch.minimum(weight, (size - place) / min(after, size))
    return weight.clamp(max=1)
