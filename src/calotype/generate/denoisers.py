"""The Denoise of a stage, made of those of its tiles, prompts and regions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from calotype.control.hints import INPAINT, Hint, without_masked
from calotype.families.model import FamilyModel
from calotype.generate.stages import Part, Stage
from calotype.image import mask_tensor, to_tensor
from calotype.sampling.guidance import guided_both, sides
from calotype.sampling.levels import Level
from calotype.sampling.samplers import SAMPLERS, Denoise, evaluated
from calotype.sampling.spatial import Tiles, beside, blended, tiled

C = TypeVar("C")

TOGETHER = 2 * 128 * 128
"""Latents (of all rows) that one pass through a network takes on: 1024 x 1024 pixels, with both sides of guidance."""


def seen_by(model: FamilyModel[C], stage: Stage[C], begun: Image.Image | None) -> tuple[Tensor, ...]:
    """What the ControlNets of a stage see, of all of its picture, where it begins with `begun`."""
    mask = None if stage.job.mask_image is None else to_tensor(stage.job.mask_image)[None, :1].to(model.device)
    seen: list[Tensor] = []
    for led in stage.led:
        picture = to_tensor(led.by(begun))[None].to(model.device)
        if led.control.kind == INPAINT and led.network.sees == "picture":
            assert mask is not None
            picture = without_masked(led.network, picture, mask)
        with model.memory.holding(model.vae) if led.network.sees != "picture" else nullcontext():
            seen.append(model.seen_by(led.network, picture, mask))
    return tuple(seen)


def of_stage(
    model: FamilyModel[C], stage: Stage[C], seen: Sequence[Tensor], more: Tensor | None, *, batched: bool
) -> Denoise:
    """The Denoise of a stage.

    `seen` is what `seen_by` gives; `more` is what a model that inpaints takes beside the latents, for all of the
    picture; `batched` runs prompts in one pass, as many as a large picture's two.
    """
    levels = evaluated(SAMPLERS[stage.job.sampler], stage.levels)
    alike: dict[Hashable, Denoise] = {}
    groups: list[Tiles] = []
    for parts in _groups(stage, batched=batched):
        boxes = [part.box for part in parts]
        # Tiles of one size that are told the same are one picture to the network.
        places = tuple(boxes) if parts[0].read.regions or seen or more is not None else None
        same = (parts[0].job.size, tuple(model.conditioned_by(part.job) for part in parts), places)
        if same not in alike:
            there = None if more is None else torch.cat([box.of(more) for box in boxes])
            hints = _hints(stage, seen, parts)
            alike[same] = _of_parts(model, parts, levels, hints, there, batched=batched)
        groups.append(Tiles(boxes, alike[same]))
    _, height, width = model.noise_shape(stage.job)
    return groups[0].denoise if len(stage.parts) == 1 else tiled(groups, height, width)


def _groups(stage: Stage[C], *, batched: bool) -> list[list[Part[C]]]:
    """Tiles that go through the network together, in groups of about one number."""
    parts = stage.parts
    prompts = _sides(parts[0])
    rows = len(prompts) if batched else 1
    most = max(TOGETHER // (rows * parts[0].box.height * parts[0].box.width), 1)
    count = -(-len(parts) // most)
    return [list(parts[len(parts) * k // count : len(parts) * (k + 1) // count]) for k in range(count)]


def _sides(part: Part[C]) -> list[C]:
    """What the network is asked of a place: with the prompt, with those of regions, and without any."""
    positive, negative, regions = part.read
    return [positive, *regions, *([] if negative is None else [negative])]


def _hints(stage: Stage[C], seen: Sequence[Tensor], parts: Sequence[Part[C]]) -> tuple[Hint, ...]:
    """What the ControlNets of a stage are led by in some of its tiles."""

    def of(whole: Tensor) -> Tensor:
        scale = whole.shape[2] * stage.scale // stage.job.height  # pixels or latents
        return torch.cat([part.box.times(scale).of(whole) for part in parts])

    return tuple(
        Hint(
            network=led.network,
            picture=of(whole),
            scale=led.control.scale,
            start=led.control.start,
            end=led.control.end,
            kind=led.kind,
        )
        for led, whole in zip(stage.led, seen, strict=True)
    )


def _of_parts(
    model: FamilyModel[C],
    parts: Sequence[Part[C]],
    levels: Sequence[Level],
    hints: Sequence[Hint],
    more: Tensor | None,
    *,
    batched: bool,
) -> Denoise:
    """The Denoise of tiles of one size, a row each: with prompts for regions, guided where the job asks for it."""
    job = parts[0].job
    answers = _answers(model, parts, levels, hints, batched=batched)
    if more is not None:
        answers = beside(answers, more)
    _, height, width = model.noise_shape(job)
    weights = [
        torch.cat([region.scale * mask_tensor(part.job.region_masks[k], height, width) for part in parts]).to(
            model.device
        )
        for k, region in enumerate(job.regions)
    ]

    def both(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        with_, *rest = answers(x, level)
        return blended(with_, rest[: len(weights)], weights) if weights else with_, rest[-1] if rest else with_

    if parts[0].read.negative is None:
        return lambda x, level: both(x, level)[0]
    return guided_both(both, job.cfg_scale, job.cfg_rescale, model.prediction)


def _answers(
    model: FamilyModel[C], parts: Sequence[Part[C]], levels: Sequence[Level], hints: Sequence[Hint], *, batched: bool
) -> Callable[[Tensor, Level], Sequence[Tensor]]:
    """The estimates of each side, for a row of x for each of the parts."""
    asked = [list(side) for side in zip(*(_sides(part) for part in parts), strict=True)]
    area = len(parts) * parts[0].box.height * parts[0].box.width
    most = max(TOGETHER // area, 2) if batched else 1
    jobs = [part.job for part in parts]
    made: list[Callable[[Tensor, Level], Sequence[Tensor]]] = []

    def add(some: Sequence[Sequence[C]]) -> None:
        rows = model.joined([conditioning for side in some for conditioning in side])
        if rows is not None:
            made.append(sides(model.denoiser(rows, levels, jobs * len(some), hints=hints), len(some)))
            return
        assert len(some) > 1, "the same prompt for all parts"
        for side in some:
            add([side])

    for first in range(0, len(asked), most):
        add(asked[first : first + most])
    return lambda x, level: [answer for each in made for answer in each(x, level)]
