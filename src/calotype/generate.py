"""The one path from a request to pictures: prompt, conditioning, denoising, decoding.

Everything is an event of one iterator: progress, previews and cancelling are consumers of it, and closing it early
frees all that it held.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor

from calotype.errors import NonFiniteImage
from calotype.families.model import FamilyModel
from calotype.image import embed_metadata, to_pil
from calotype.memory.residency import resident
from calotype.request import Job, Request
from calotype.sampling.guidance import guided, guided_pair
from calotype.sampling.samplers import SAMPLERS, Denoise, Sampler, evaluated

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One finished sampling step. `preview()` draws a small impression of the picture so far, only when called."""

    picture: int  # from 0
    pictures: int
    step: int  # from 1
    steps: int
    preview: Callable[[], Image.Image]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One finished picture; `image.info` holds what made it."""

    image: Image.Image
    job: Job
    seed: int


Event = Progress | Picture
Events = Generator[Event, None, None]


@torch.inference_mode()
def stream(model: FamilyModel[C], request: Request, *, batched_guidance: bool = True) -> Events:
    """Draw `request.count` pictures, one after another: `steps` of Progress, then a Picture, for each.

    Picture k depends on seed + k alone, not on how many are asked for: its noise comes from a generator of its own,
    on the CPU in float32, and it is computed by itself. `batched_guidance` runs both sides of classifier-free
    guidance as one batch instead of two passes.

    Raises RequestError before any work, NonFiniteImage instead of a black picture.
    """
    job = request.complete(model.defaults, seed=secrets.randbelow(2**32))
    sampler = SAMPLERS[job.sampler]
    levels = model.levels(job)
    with resident(*model.encoders, device=model.device):
        positive = model.condition(job.prompt, job)
        negative = model.condition(job.negative_prompt, job) if job.cfg_scale != 1 else None
    with resident(model.backbone, device=model.device):
        denoise = _denoiser(model, job, sampler, positive, negative, batched_guidance)
        for k in range(job.count):
            noise = _noise(job.seed + k, (1, *model.noise_shape(job)), model.device)
            x = model.start(job, levels, noise)
            for step in sampler(denoise, x, levels, noise):
                x = step.x
                yield Progress(
                    picture=k,
                    pictures=job.count,
                    step=step.number,
                    steps=step.total,
                    preview=lambda clean=step.clean: _preview(model, clean),
                )
            with resident(model.vae, device=model.device):
                decoded = model.decode(x)
            yield _picture(model, decoded, job, k)


def _denoiser(
    model: FamilyModel[C], job: Job, sampler: Sampler, positive: C, negative: C | None, batched: bool
) -> Denoise:
    """The job's Denoise: the family's own, under classifier-free guidance where the job asks for it."""
    asked = evaluated(sampler, model.levels(job))
    if negative is None:
        return model.denoiser(positive, asked, job)
    if batched:
        pair = model.denoiser(model.pair(positive, negative), asked, job)
        return guided_pair(pair, job.cfg_scale, job.cfg_rescale, model.prediction)
    return guided(
        model.denoiser(positive, asked, job),
        model.denoiser(negative, asked, job),
        job.cfg_scale,
        job.cfg_rescale,
        model.prediction,
    )


def _noise(seed: int, shape: tuple[int, ...], device: torch.device) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator).to(device)


def _preview(model: FamilyModel[C], clean: Tensor) -> Image.Image:
    with torch.inference_mode(), resident(model.vae, device=clean.device):
        return to_pil(model.preview(clean).nan_to_num(0.5)[0])


def _picture(model: FamilyModel[C], decoded: Tensor, job: Job, k: int) -> Picture:
    if not decoded.isfinite().all():
        raise NonFiniteImage(
            f"seed {job.seed + k}: the decoded picture holds NaN or infinity; load the model with dtype='float32' "
            "(or 'bfloat16'): float16 overflows in some networks"
        )
    own = replace(job, seed=job.seed + k, count=1)
    image = to_pil(decoded[0])
    embed_metadata(image, own, model=f"{model.family}/{model.variant}", source=model.source)
    return Picture(image=image, job=own, seed=own.seed)


class Model(Generic[C]):
    """A loaded model, as `calotype.load` returns it."""

    def __init__(self, family: FamilyModel[C]) -> None:
        self.family = family

    @property
    def name(self) -> str:
        """Family and variant: flux/dev."""
        return f"{self.family.family}/{self.family.variant}"

    def stream(self, request: Request) -> Events:
        """Progress and pictures as they come; close the iterator to stop early."""
        return stream(self.family, request)

    def generate(self, prompt: str | Request, **fields: object) -> Image.Image | list[Image.Image]:
        """Draw a prompt: one picture, or a list when `count` is more than 1.

        `fields` are those of `Request`. `picture.info` holds what made the picture.
        """
        if isinstance(prompt, Request):
            request = replace(prompt, **fields)
        else:
            request = Request.from_dict({"prompt": prompt, **fields})
        with closing(self.stream(request)) as events:
            pictures = [event.image for event in events if isinstance(event, Picture)]
        return pictures if request.count > 1 else pictures[0]
