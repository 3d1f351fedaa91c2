"""The Denoise of a stage, made of those of its tiles, prompts and regions."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

from PIL import Image
from torch import Tensor

from calotype.control.hints import Hint
from calotype.families.model import FamilyModel
from calotype.generate.stages import Part, Stage
from calotype.image import mask_tensor, to_tensor
from calotype.sampling.guidance import guided, guided_both
from calotype.sampling.levels import Level
from calotype.sampling.samplers import SAMPLERS, Denoise, evaluated
from calotype.sampling.spatial import Box, Regional, Tile, beside, regional, tiled

C = TypeVar("C")


def of_stage(
    model: FamilyModel[C], stage: Stage[C], begun: Image.Image | None, more: Tensor | None, *, batched: bool
) -> Denoise:
    """The Denoise of a stage.

    `begun` is the picture that the stage begins with, where that is known; `more` is what a model that inpaints takes
    beside the latents, for all of the picture; `batched` runs both sides of guidance in one pass.
    """
    levels = evaluated(SAMPLERS[stage.job.sampler], model.levels(stage.job))
    shown = [led.by(begun) for led in stage.led]
    alike: dict[Hashable, Denoise] = {}
    tiles: list[Tile] = []
    for part in stage.parts:
        # Tiles of one size that are told the same are one picture to the network.
        own = part.box if part.read.regions or shown or more is not None else None
        same = (part.job.size, model.conditioned_by(part.job), own)
        if same not in alike:
            there = None if more is None else part.box.of(more)
            alike[same] = _of_part(model, part, levels, _hints(model, stage, shown, part.box), batched, there)
        tiles.append(Tile(part.box, alike[same]))
    _, height, width = model.noise_shape(stage.job)
    return tiles[0].denoise if len(tiles) == 1 else tiled(tiles, height, width)


def _hints(model: FamilyModel[C], stage: Stage[C], shown: Sequence[Image.Image], box: Box) -> tuple[Hint, ...]:
    """What the ControlNets of a stage are led by, in one of its tiles."""
    top, left, height, width = (side * stage.scale for side in box)
    return tuple(
        Hint(
            network=led.network,
            picture=to_tensor(picture.crop((left, top, left + width, top + height)))[None].to(model.device),
            scale=led.control.scale,
            start=led.control.start,
            end=led.control.end,
            kind=led.kind,
        )
        for led, picture in zip(stage.led, shown, strict=True)
    )


def _of_part(
    model: FamilyModel[C],
    part: Part[C],
    levels: Sequence[Level],
    hints: Sequence[Hint],
    batched: bool,
    more: Tensor | None,
) -> Denoise:
    """The family's own Denoise, with prompts for regions, under classifier-free guidance where the job asks for it."""
    job, read = part.job, part.read

    def denoiser(conditioning: C) -> Denoise:
        denoise = model.denoiser(conditioning, levels, job, hints=hints)
        return denoise if more is None else beside(denoise, more)

    if read.negative is not None and not read.regions and batched:
        both = model.both(read.positive, read.negative, levels, job, hints=hints)
        return guided_both(
            both if more is None else beside(both, more), job.cfg_scale, job.cfg_rescale, model.prediction
        )
    positive = denoiser(read.positive)
    if read.regions:
        _, height, width = model.noise_shape(job)
        weights = [
            region.scale * mask_tensor(mask, height, width).to(model.device)
            for region, mask in zip(job.regions, job.region_masks, strict=True)
        ]
        denoisers = [denoiser(conditioning) for conditioning in read.regions]
        positive = regional(positive, [Regional(*pair) for pair in zip(denoisers, weights, strict=True)])
    if read.negative is None:
        return positive
    return guided(positive, denoiser(read.negative), job.cfg_scale, job.cfg_rescale, model.prediction)
