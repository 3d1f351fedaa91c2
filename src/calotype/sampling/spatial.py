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


class Regional(NamedTuple):
    """A denoiser for a place: `weight` (1 1 h w) is its mask times its scale."""

    denoise: Denoise
    weight: Tensor


def regional(everywhere: Denoise, regions: Sequence[Regional]) -> Denoise:
    """The mean of all estimates, by weight; that of `everywhere` is 1 (DiffSynth-Studio's painter)."""
    total = 1 + sum(region.weight for region in regions)

    def denoise(x: Tensor, level: Level) -> Tensor:
        clean = everywhere(x, level)
        for region in regions:
            clean = clean + region.weight * region.denoise(x, level)
        return clean / total

    return denoise


class Box(NamedTuple):
    """A rectangle of latents."""

    top: int
    left: int
    height: int
    width: int

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


class Tile(NamedTuple):
    """A part of the picture, and what denoises it: a denoiser for pictures of the tile's size."""

    box: Box
    denoise: Denoise


def tiled(tiles: Sequence[Tile], height: int, width: int) -> Denoise:
    """MultiDiffusion (Bar-Tal et al. 2023): the mean of what all tiles say of a place.

    A tile counts less towards its borders inside the picture, linearly over what it shares with its neighbours, so that
    none of them shows.
    """
    weights = [_weight(tile.box, [other.box for other in tiles], height, width) for tile in tiles]
    total = torch.zeros(height, width)
    for tile, weight in zip(tiles, weights, strict=True):
        tile.box.of(total).add_(weight)
    shares = [weight / tile.box.of(total) for tile, weight in zip(tiles, weights, strict=True)]

    def denoise(x: Tensor, level: Level) -> Tensor:
        clean = torch.zeros_like(x)
        for tile, share in zip(tiles, shares, strict=True):
            tile.box.of(clean).add_(tile.denoise(tile.box.of(x), level) * share.to(x.device))
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
