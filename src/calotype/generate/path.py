"""The one path from a request to pictures: prompt, conditioning, denoising, decoding.

Everything is an event of one iterator: progress, previews and cancelling are consumers of it, and closing it early
frees all that it held.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from calotype.control.image_prompts import ImageReaders
from calotype.control.upscalers import Upscaler, load_upscaler
from calotype.errors import NonFiniteImage, OutOfMemory, RequestError
from calotype.families.model import FamilyModel
from calotype.generate.denoisers import of_stage, seen_by
from calotype.generate.events import Events, Lowered, Picture, Progress
from calotype.generate.loras import wear
from calotype.generate.prompts import PromptCache
from calotype.generate.stages import Stage, planned
from calotype.image import embed_metadata, filled, mask_tensor, opened, to_pil, to_tensor
from calotype.memory.ladder import out_of_memory
from calotype.nn.leader import Leader
from calotype.request import Job, Request, resized
from calotype.request.parts import UPSCALERS
from calotype.sampling.samplers import SAMPLERS, Denoise, Step
from calotype.sampling.spatial import keeping

C = TypeVar("C")


@torch.inference_mode()
def stream(
    model: FamilyModel[C],
    request: Request,
    *,
    cache: PromptCache[C] | None = None,
    batched_guidance: bool = True,
    networks: Mapping[str, Leader] | None = None,
    readers: ImageReaders | None = None,
) -> Events:
    """Draw `request.count` pictures, one after another: for each the steps of all stages, then a Picture.

    A picture that runs out of memory is begun anew one rung lower on the memory ladder, which an event says.

    Picture k depends on seed + k alone, not on how many are asked for: its noise comes from a generator of its own,
    on the CPU in float32, and it is computed by itself. `cache` remembers what prompts became. `batched_guidance` runs
    both sides of classifier-free guidance in one pass instead of two. `networks` are those of the request's controls,
    by the `model` that these name; `readers` those of its image prompts, by their `networks`.

    Raises RequestError before any work, NonFiniteImage instead of a black picture, OutOfMemory on the last rung.
    """
    job = request.complete(model.defaults, secrets.randbelow(2**32), opened(request))
    networks = {} if networks is None else networks
    cache = PromptCache() if cache is None else cache
    upscalers = _upscalers(model, job)
    wear(model, job.loras)
    done = 0
    while done < job.count:
        try:
            if model.adapters is not None:
                model.adapters.apply()
            events = _pictures(model, job, cache, networks, readers or {}, upscalers, batched_guidance, first=done)
            with closing(events):
                for event in events:
                    yield event
                    done += isinstance(event, Picture)
            return
        except Exception as error:
            if not out_of_memory(error):
                raise
            reason = str(error).strip().split("\n")[0]
        # What the failed job held is free from here on: the error, and the frames in its traceback, are gone.
        before = model.memory.rung
        if not model.memory.lower():
            model.memory.release()
            raise OutOfMemory(
                f"{job.width}x{job.height} does not fit into the memory of {model.device}, with one layer there at a "
                f"time ({reason}); ask for a smaller picture, or close what else uses that memory"
            )
        yield Lowered(picture=done, before=before, rung=model.memory.rung, reason=reason)


def _upscalers(model: FamilyModel[C], job: Job) -> dict[str, Upscaler]:
    """The upscalers of a job that come from files, by what its passes call them."""
    found: dict[str, Upscaler] = {}
    for number, each in enumerate(job.high_res):
        if each.upscaler not in UPSCALERS and each.upscaler not in found:
            try:
                found[each.upscaler] = load_upscaler(each.upscaler, model.device)
            except RequestError as error:
                raise error.under(f"high_res[{number}].") from error
    return found


def _pictures(
    model: FamilyModel[C],
    job: Job,
    cache: PromptCache[C],
    networks: Mapping[str, Leader],
    readers: ImageReaders,
    upscalers: Mapping[str, Upscaler],
    batched_guidance: bool,
    *,
    first: int,
) -> Events:
    """The pictures of a job from number `first` on."""
    stages = planned(model, job, networks, readers, cache)
    input_latents = None if job.input_image is None else _begun(model, job, job.input_image)
    denoisers: dict[int, Denoise] = {}
    for k in range(first, job.count):
        x = input_latents
        for number, stage in enumerate(stages):
            begun = job.input_image
            # Whether the network sees the picture that the stage begins with, which for passes is another each time.
            sees = model.inpaints or stage.led_by_itself
            if number:
                assert x is not None
                by = job.high_res[number - 1].upscaler
                x, begun = _enlarged(model, x, stage.job, by, upscalers.get(by), job.seed + k, shown=sees)
            more = _beside(model, stage.job, begun) if model.inpaints else None
            seen = seen_by(model, stage, begun) if number not in denoisers or sees else ()
            with model.memory.holding(model.backbone, *stage.networks):
                if number not in denoisers or (number and sees):
                    denoisers[number] = of_stage(model, stage, seen, more, batched=batched_guidance)
                for step in _steps(model, stage, denoisers[number], x, job.seed + k):
                    x = step.x
                    yield Progress(
                        picture=k,
                        pictures=job.count,
                        step=step.number,
                        steps=step.total,
                        preview=lambda clean=step.clean: _preview(model, clean),
                        stage=number,
                        stages=len(stages),
                    )
        assert x is not None
        yield _picture(model, _decoded(model, x, job.seed + k), job, k)


def _begun(model: FamilyModel[C], job: Job, picture: Image.Image) -> Tensor:
    """The clean latents that a job begins with: of what is drawn from noise alone, its surroundings.

    An autoencoder sees far: a rim of what was taken away would be left in the latents beside it.
    """
    hidden = job.mask_image if job.denoising_strength == 1 and not model.inpaints else None
    return _encoded(model, picture if hidden is None else filled(picture, hidden))


def _encoded(model: FamilyModel[C], picture: Image.Image) -> Tensor:
    """A picture's clean latents."""
    with model.memory.holding(model.vae):
        return model.encode(to_tensor(picture)[None].to(model.device))


def _decoded(model: FamilyModel[C], x: Tensor, seed: int) -> Image.Image:
    with model.memory.holding(model.vae):
        decoded = model.decode(x)
    if not decoded.isfinite().all():
        raise NonFiniteImage(
            f"seed {seed}: the decoded picture holds NaN or infinity; load the model with dtype='float32' "
            "(or 'bfloat16'): float16 overflows in some networks"
        )
    return to_pil(decoded[0])


def _enlarged(
    model: FamilyModel[C], x: Tensor, job: Job, by: str, upscaler: Upscaler | None, seed: int, *, shown: bool
) -> tuple[Tensor, Image.Image | None]:
    """The latents of a stage before, at the size of this one, and what they show, where that is known or wanted."""
    latent = by == "latent"
    picture = None
    if shown or not latent:
        decoded = _decoded(model, x, seed)
        picture = resized(decoded, job.size) if upscaler is None else upscaler.enlarge(decoded, job.size)
    if latent or picture is None:
        return F.interpolate(x, size=model.noise_shape(job)[1:], mode="bilinear"), picture
    return _encoded(model, picture), picture


def _beside(model: FamilyModel[C], job: Job, picture: Image.Image | None) -> Tensor:
    """What a model that inpaints is shown; without a mask, or a picture, everything is to be drawn."""
    shown, mask = picture, job.mask_image
    if shown is None or mask is None:
        mask = Image.new("L", (job.width, job.height), 255)
        shown = shown or Image.new("RGB", mask.size)
    drawn = mask_tensor(mask, job.height, job.width)
    if drawn.max() < 0.5:
        raise RequestError("mask_image", job.mask_name, "one half white somewhere: this model draws nothing else")
    with model.memory.holding(model.vae):
        return model.beside(to_tensor(shown)[None].to(model.device), drawn.to(model.device))


def _steps(model: FamilyModel[C], stage: Stage[C], denoise: Denoise, begun: Tensor | None, seed: int) -> Iterator[Step]:
    """The steps of one stage, from clean latents taken back to noise in part, or from noise alone."""
    job, levels = stage.job, stage.levels
    if model.inpaints and job.denoising_strength == 1:
        begun = None  # as they were trained: from noise alone, with the picture beside it
    noise = _noise(seed, (1, *model.noise_shape(job)), model.device)
    if begun is None:
        return SAMPLERS[job.sampler](denoise, model.start(job, levels, noise), levels, noise)
    top, drawn = levels.path[0], noise()
    x = top.alpha * begun + top.sigma * drawn
    if job.mask_image is not None and not model.inpaints:
        mask = mask_tensor(job.mask_image, *x.shape[2:]).to(model.device)
        denoise = keeping(denoise, begun, mask)
        if job.denoising_strength == 1:
            # Even at their noisiest level many models see some of the picture: of what is hidden nothing may be left.
            x = x.lerp(model.start(job, levels, lambda: drawn), mask)
    return SAMPLERS[job.sampler](denoise, x, levels, noise)


def _noise(seed: int, shape: tuple[int, ...], device: torch.device) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator).to(device)


def _preview(model: FamilyModel[C], clean: Tensor) -> Image.Image:
    with torch.inference_mode(), model.memory.holding(model.vae):
        return to_pil(model.preview(clean).nan_to_num(0.5)[0])


def _picture(model: FamilyModel[C], image: Image.Image, job: Job, k: int) -> Picture:
    own = replace(job, seed=job.seed + k, count=1)
    if job.keep_unmasked:
        assert job.input_image is not None
        assert job.mask_image is not None
        image = Image.composite(image, job.input_image, job.mask_image)
    attached = () if model.adapters is None else model.adapters.told
    embed_metadata(image, own, model=f"{model.family}/{model.variant}", source=model.source, attached=attached)
    return Picture(image=image, job=own, seed=own.seed)
