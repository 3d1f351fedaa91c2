"""The Denoise of a stage, made of those of its tiles, prompts and regions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor

from calotype.control.hints import Hint, without_masked
from calotype.families.model import FamilyModel, Prepared
from calotype.generate.stages import Part, Stage
from calotype.image import mask_tensor, to_tensor
from calotype.request.parts import INPAINT
from calotype.sampling.guidance import Both, guided_both, sides
from calotype.sampling.levels import Level
from calotype.sampling.samplers import SAMPLERS, Denoise, evaluated
from calotype.sampling.spatial import Tiles, beside, blended, tiled

C = TypeVar("C")
Answers = Callable[[Tensor, Level], Sequence[Tensor]]

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
            seen.append(model.seen_by(led.network, picture, mask, led.control.shows))
    return tuple(seen)


def of_stage(
    model: FamilyModel[C], stage: Stage[C], seen: Sequence[Tensor], more: Tensor | None, *, batched: bool
) -> Denoise:
    """The Denoise of a stage.

    `seen` is what `seen_by` gives; `more` is what a model that inpaints takes beside the latents, for all of the
    picture; `batched` runs prompts in one pass, as many as a large picture's two.
    """
    levels = evaluated(SAMPLERS[stage.job.sampler], stage.levels)
    positive, negative, regions = stage.read
    prompts = [positive, *regions, *([] if negative is None else [negative])]

    @cache
    def prepared(asked: tuple[int, ...]) -> Prepared | None:
        """The network for some of the prompts, by number; None where these are too unlike for one pass."""
        rows = model.joined([prompts[number] for number in asked])
        return None if rows is None else model.prepared(rows, levels, stage.parts[0].job)

    def of_group(group: Group) -> Denoise:
        asked = (0, *(1 + k for k in group.regions), *([] if negative is None else [len(prompts) - 1]))
        answers = _answers(prepared, asked, group.parts, _hints(stage, seen, group.parts), batched=batched)
        if more is not None:
            answers = beside(answers, torch.cat([part.box.of(more) for part in group.parts]))
        both = _sides(model, answers, group)
        if negative is None:
            return lambda x, level: both(x, level)[0]
        return guided_both(both, stage.job.cfg_scale, stage.job.cfg_rescale, model.prediction)

    groups = [Tiles([part.box for part in group.parts], of_group(group)) for group in _groups(stage, batched=batched)]
    _, height, width = model.noise_shape(stage.job)
    return groups[0].denoise if len(stage.parts) == 1 else tiled(groups, height, width)


class Group(NamedTuple):
    """Tiles that go through the network together, and the regions that any place in each of them belongs to."""

    parts: Sequence[Part]
    regions: tuple[int, ...]


def _groups(stage: Stage[C], *, batched: bool) -> list[Group]:
    """The tiles of a stage, in groups of about one number for the same regions."""
    alike: dict[tuple[int, ...], list[Part]] = {}
    for part in stage.parts:
        alike.setdefault(part.regions, []).append(part)
    found: list[Group] = []
    for regions, parts in alike.items():
        rows = 1 + len(regions) + (stage.read.negative is not None) if batched else 1
        most = max(TOGETHER // (rows * parts[0].box.height * parts[0].box.width), 1)
        count = -(-len(parts) // most)
        cuts = [len(parts) * k // count for k in range(count + 1)]
        found += [Group(parts[first:end], regions) for first, end in pairwise(cuts)]
    return found


def _hints(stage: Stage[C], seen: Sequence[Tensor], parts: Sequence[Part]) -> tuple[Hint, ...]:
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


def _sides(model: FamilyModel[C], answers: Answers, group: Group) -> Both:
    """The estimates with all prompts, each region's by its place, and without any, of all that were asked for."""
    job = group.parts[0].job
    _, height, width = model.noise_shape(job)
    weights = [
        torch.cat(
            [job.regions[k].scale * mask_tensor(part.job.region_masks[k], height, width) for part in group.parts]
        ).to(model.device)
        for k in group.regions
    ]

    def both(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        with_, *rest = answers(x, level)
        return blended(with_, rest[: len(weights)], weights) if weights else with_, rest[-1] if rest else with_

    return both


def _answers(
    prepared: Callable[[tuple[int, ...]], Prepared | None],
    asked: tuple[int, ...],
    parts: Sequence[Part],
    hints: Sequence[Hint],
    *,
    batched: bool,
) -> Answers:
    """The estimates with each of the prompts asked for, for a row of x for each of the parts."""
    area = len(parts) * parts[0].box.height * parts[0].box.width
    most = max(TOGETHER // area, 2) if batched else 1
    jobs = [part.job for part in parts]
    made: list[Answers] = []
    waiting = [asked[first : first + most] for first in range(0, len(asked), most)]
    while waiting:
        some = waiting.pop(0)
        ready = prepared(some)
        if ready is not None:
            made.append(sides(ready(jobs, hints), len(some)))
            continue
        assert len(some) > 1, "one prompt is like itself"
        waiting = [*((number,) for number in some), *waiting]
    return lambda x, level: [answer for each in made for answer in each(x, level)]
