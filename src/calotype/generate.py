"""The one path from a request to pictures: prompt, conditioning, denoising, decoding.

Everything is an event of one iterator: progress, previews and cancelling are consumers of it, and closing it early
frees all that it held.
"""

from __future__ import annotations

import os
import secrets
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from typing import Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor

from calotype.checkpoint.files import Weights
from calotype.errors import NonFiniteImage, OutOfMemory, RequestError, UnexpectedKeys
from calotype.families.adapters import misfit
from calotype.families.model import FamilyModel
from calotype.image import embed_metadata, input_picture, to_pil, to_tensor
from calotype.lora.attach import Adapters
from calotype.lora.files import UNTOLD, find
from calotype.memory.ladder import Rung, out_of_memory
from calotype.request import Job, Request
from calotype.sampling.guidance import guided, guided_both
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


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """Memory ran out: the picture is begun anew, with less of the model on the device at a time from now on.

    `before` and `rung` are rungs of the memory ladder (`calotype.memory.ladder`).
    """

    picture: int  # from 0
    before: Rung
    rung: Rung
    reason: str


Event = Progress | Picture | Lowered
Events = Generator[Event, None, None]


@torch.inference_mode()
def stream(
    model: FamilyModel[C], request: Request, *, cache: PromptCache[C] | None = None, batched_guidance: bool = True
) -> Events:
    """Draw `request.count` pictures, one after another: `steps` of Progress, then a Picture, for each.

    A picture that runs out of memory is begun anew one rung lower on the memory ladder, which an event says.

    Picture k depends on seed + k alone, not on how many are asked for: its noise comes from a generator of its own,
    on the CPU in float32, and it is computed by itself. `cache` remembers what prompts became. `batched_guidance` runs
    both sides of classifier-free guidance in one pass instead of two.

    Raises RequestError before any work, NonFiniteImage instead of a black picture, OutOfMemory on the last rung.
    """
    picture = None if request.input_image is None else input_picture(request.input_image)
    job = request.complete(model.defaults, seed=secrets.randbelow(2**32), picture=picture)
    cache = PromptCache() if cache is None else cache
    done = 0
    while done < job.count:
        try:
            with closing(_pictures(model, job, cache, batched_guidance, first=done)) as events:
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


def _pictures(model: FamilyModel[C], job: Job, cache: PromptCache[C], batched_guidance: bool, *, first: int) -> Events:
    """The pictures of a job from number `first` on."""
    sampler = SAMPLERS[job.sampler]
    levels = model.levels(job)
    prompts = [job.prompt] if job.cfg_scale == 1 else [job.prompt, job.negative_prompt]
    positive, *negative = _conditioned(model, prompts, job, cache)
    begun = _encoded(model, job)
    with ExitStack() as stack:
        stack.enter_context(model.memory.holding(model.backbone))
        denoise = _denoiser(model, job, sampler, positive, negative, batched_guidance)
        for k in range(first, job.count):
            if k > first:
                stack.enter_context(model.memory.holding(model.backbone))
            noise = _noise(job.seed + k, (1, *model.noise_shape(job)), model.device)
            top = levels.path[0]
            x = model.start(job, levels, noise) if begun is None else top.alpha * begun + top.sigma * noise()
            for step in sampler(denoise, x, levels, noise):
                x = step.x
                yield Progress(
                    picture=k,
                    pictures=job.count,
                    step=step.number,
                    steps=step.total,
                    preview=lambda clean=step.clean: _preview(model, clean),
                )
            stack.close()  # the decoder may need the room
            with model.memory.holding(model.vae):
                decoded = model.decode(x)
            yield _picture(model, decoded, job, k)


class PromptCache(Generic[C]):
    """What prompts became, by content: the same words under the same settings are not encoded again.

    Holds the `room` entries used last.
    """

    def __init__(self, room: int = 32) -> None:
        self.room = room
        self._held: OrderedDict[Hashable, C] = OrderedDict()

    def get(self, key: Hashable) -> C | None:
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: Hashable, value: C) -> None:
        self._held[key] = value
        while len(self._held) > self.room:
            self._held.popitem(last=False)

    def clear(self) -> None:
        self._held.clear()


def _conditioned(model: FamilyModel[C], prompts: Sequence[str], job: Job, cache: PromptCache[C]) -> list[C]:
    """What each prompt becomes; the encoders are needed for those alone that are not remembered."""
    adapted = None if model.adapters is None else model.adapters.text
    of = (model.content, adapted, model.conditioned_by(job))
    keys = [(*of, number > 0, prompt) for number, prompt in enumerate(prompts)]
    known = {key: cache.get(key) for key in keys}
    if None in known.values():
        encoding = nullcontext() if model.adapters is None else model.adapters.encoding()
        with model.memory.holding(*model.encoders), encoding:
            for key, value in known.items():
                if value is None:
                    known[key] = value = model.condition(key[-1], job, negative=key[-2])
                    cache.put(key, value)
    return [value for key in keys if (value := known[key]) is not None]


def _encoded(model: FamilyModel[C], job: Job) -> Tensor | None:
    """The input image's clean latents; None where there is none."""
    if job.input_image is None:
        return None
    with model.memory.holding(model.vae):
        return model.encode(to_tensor(job.input_image)[None].to(model.device))


def _denoiser(
    model: FamilyModel[C], job: Job, sampler: Sampler, positive: C, negative: Sequence[C], batched: bool
) -> Denoise:
    """The job's Denoise: the family's own, under classifier-free guidance where the job asks for it."""
    asked = evaluated(sampler, model.levels(job))
    if not negative:
        return model.denoiser(positive, asked, job)
    if batched:
        both = model.both(positive, negative[0], asked, job)
        return guided_both(both, job.cfg_scale, job.cfg_rescale, model.prediction)
    return guided(
        model.denoiser(positive, asked, job),
        model.denoiser(negative[0], asked, job),
        job.cfg_scale,
        job.cfg_rescale,
        model.prediction,
    )


def _noise(seed: int, shape: tuple[int, ...], device: torch.device) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator).to(device)


def _preview(model: FamilyModel[C], clean: Tensor) -> Image.Image:
    with torch.inference_mode(), model.memory.holding(model.vae):
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

    def __init__(
        self,
        family: FamilyModel[C],
        *,
        storage_errors: Mapping[str, float] | None = None,
        left_out: Mapping[str, str] | None = None,
        prompts: PromptCache[C] | None = None,
    ) -> None:
        """`prompts` may be shared between models: each finds its own by `family.content`."""
        self.family = family
        self.storage_errors = dict(storage_errors or {})  # of parts kept in fewer bits, relative to what was read
        self.left_out = dict(left_out or {})  # parts that it does without, and what that means
        self.prompts = PromptCache[C]() if prompts is None else prompts

    @property
    def name(self) -> str:
        """Family and variant: flux/dev."""
        return f"{self.family.family}/{self.family.variant}"

    @property
    def attached(self) -> dict[str, float]:
        """The adapters attached, by name, each with its strength."""
        adapters = self.family.adapters
        return {} if adapters is None else {name: adapters[name].scale for name in adapters.names}

    def attach(self, file: str | os.PathLike[str], scale: float = 1.0, name: str | None = None) -> str:
        """Attach a LoRA (LoCon, DoRA, LoHa, LoKr) to the model, `scale` times as strong as it was trained to be.

        `file` is a path, a folder that PEFT or diffusers wrote, or the name of a file in CALOTYPE_HOME/loras. The name
        that it is attached under is returned: by default the file's, with a number where that is taken.

        Raises a LoadError for a file that is not sound, UnexpectedKeys for one that belongs to another family, which
        is named; RequestError for a name or scale that cannot be. The model is then as it was.
        """
        adapters = self._adapters()
        path = find(file)
        weights = Weights.of(str(file), [path])
        if name is None:
            stem = path.stem if path.stem not in UNTOLD else path.parent.name or path.stem
            taken = set(adapters.names)
            name = next(n for k in count(1) if (n := stem if k == 1 else f"{stem}-{k}") not in taken)
        try:
            adapters.attach(weights, name=name, scale=scale)
        except UnexpectedKeys as error:
            raise UnexpectedKeys(error.source, error.layout, error.keys, misfit(weights, self.family.family)) from error
        return name

    def scale(self, name: str, value: float) -> None:
        """Change an attached adapter's strength; 0 is without it, while the file stays at hand."""
        self._adapters().scale(name, value)

    def detach(self, name: str) -> None:
        """Take an adapter away: the model's numbers are those of before, bit for bit."""
        self._adapters().detach(name)

    def _adapters(self) -> Adapters:
        adapters = self.family.adapters
        if adapters is None or not adapters.applies_to(self.family.backbone):
            raise RequestError(
                "loras", self.name, "none with this model: its backend holds weights of its own; load it with torch"
            )
        if self.family.memory.busy:
            raise RequestError("loras", self.name, "a change between jobs: finish or close the one that runs first")
        return adapters

    def stream(self, request: Request) -> Events:
        """Progress and pictures as they come; close the iterator to stop early."""
        return stream(self.family, request, cache=self.prompts)

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
