"""The one path from a request to pictures: prompt, conditioning, denoising, decoding.

Everything is an event of one iterator: progress, previews and cancelling are consumers of it, and closing it early
frees all that it held.
"""

from __future__ import annotations

import os
import secrets
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from calotype.checkpoint.files import Weights
from calotype.control.annotators import annotate
from calotype.control.hints import Hint, kind_of
from calotype.control.image_prompts import ImageReader, read_pictures
from calotype.errors import NonFiniteImage, OutOfMemory, RequestError, UnexpectedKeys
from calotype.families.adapters import misfit
from calotype.families.model import FamilyModel
from calotype.image import embed_metadata, input_picture, mask_picture, mask_tensor, to_pil, to_tensor
from calotype.lora.attach import Adapters
from calotype.lora.files import UNTOLD, find
from calotype.memory.ladder import Rung, out_of_memory
from calotype.nn.controlnet import ControlNet
from calotype.request import Job, Lora, Request, resized
from calotype.sampling.guidance import guided, guided_both
from calotype.sampling.levels import Level
from calotype.sampling.samplers import SAMPLERS, Denoise, Step, evaluated
from calotype.sampling.spatial import Box, Regional, Tile, beside, boxes, keeping, regional, tiled

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One finished sampling step. `preview()` draws a small impression of the picture so far, only when called."""

    picture: int  # from 0
    pictures: int
    step: int  # from 1
    steps: int
    preview: Callable[[], Image.Image]
    stage: int = 0  # 0 for the picture at its first size, then its passes at higher resolutions
    stages: int = 1


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
    model: FamilyModel[C],
    request: Request,
    *,
    cache: PromptCache[C] | None = None,
    batched_guidance: bool = True,
    networks: Sequence[ControlNet] = (),
    readers: Sequence[ImageReader] = (),
) -> Events:
    """Draw `request.count` pictures, one after another: for each the steps of all stages, then a Picture.

    A picture that runs out of memory is begun anew one rung lower on the memory ladder, which an event says.

    Picture k depends on seed + k alone, not on how many are asked for: its noise comes from a generator of its own,
    on the CPU in float32, and it is computed by itself. `cache` remembers what prompts became. `batched_guidance` runs
    both sides of classifier-free guidance in one pass instead of two. `networks` are those of the request's controls,
    `readers` those of its image prompts.

    Raises RequestError before any work, NonFiniteImage instead of a black picture, OutOfMemory on the last rung.
    """
    job = request.complete(
        model.defaults,
        seed=secrets.randbelow(2**32),
        picture=None if request.input_image is None else input_picture(request.input_image),
        mask=None if request.mask_image is None else mask_picture(request.mask_image),
        region_masks=[mask_picture(region.mask, f"regions[{k}].mask") for k, region in enumerate(request.regions)],
        control_images=[input_picture(control.image) for control in request.controls],
        prompt_images=[
            input_picture(p.image, f"image_prompts[{k}].image") for k, p in enumerate(request.image_prompts)
        ],
    )
    job = replace(job, control_images=_annotated(job))
    assert len(networks) == len(job.controls)
    for number, (control, network) in enumerate(zip(job.controls, networks, strict=True)):
        kind_of(network, control.kind, f"controls[{number}].kind")
    _wear(model, job.loras)
    cache = PromptCache() if cache is None else cache
    done = 0
    while done < job.count:
        try:
            if model.adapters is not None:
                model.adapters.apply()
            with closing(_pictures(model, job, cache, networks, readers, batched_guidance, first=done)) as events:
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


def _annotated(job: Job) -> tuple[Image.Image, ...]:
    """What a job's controls show to their networks."""
    drawn: list[Image.Image] = []
    for number, (control, picture) in enumerate(zip(job.controls, job.control_images, strict=True)):
        if control.kind == "none" or control.kind.startswith("none:"):
            drawn.append(picture)
            continue
        try:
            drawn.append(annotate(control.kind, picture, job.size))
        except RequestError as error:
            raise RequestError(f"controls[{number}].{error.field}", error.value, error.allowed) from None
    return tuple(drawn)


def _pictures(
    model: FamilyModel[C],
    job: Job,
    cache: PromptCache[C],
    networks: Sequence[ControlNet],
    readers: Sequence[ImageReader],
    batched_guidance: bool,
    *,
    first: int,
) -> Events:
    """The pictures of a job from number `first` on."""
    stages = _shown(model, job, _read(model, _stages(model, job), cache), readers)
    input_latents = None if job.input_image is None else _encoded(model, job.input_image)
    denoisers: dict[int, Denoise] = {}
    for k in range(first, job.count):
        x = input_latents
        for number, stage in enumerate(stages):
            begun = job.input_image
            if number:
                assert x is not None
                x, begun = _enlarged(model, x, stage.job, job.high_res[number - 1].upscaler, job.seed + k)
            more = _beside(model, stage.job, begun) if model.inpaints else None
            with model.memory.holding(model.backbone, *networks):
                # What later stages of a model that inpaints see is another picture each time.
                if number not in denoisers or (number and model.inpaints):
                    denoisers[number] = _denoiser(model, stage, networks, batched_guidance, more)
                for step in _steps(model, stage.job, denoisers[number], x, job.seed + k):
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


def _wear(model: FamilyModel[C], loras: Sequence[Lora]) -> None:
    """Have the model draw with a request's LoRAs; what an earlier one asked for stays where this one has it too."""
    adapters = model.adapters
    if not loras and (adapters is None or not adapters.worn):
        return
    able = _adapters(model)
    wanted: dict[str, float] = {}
    for number, lora in enumerate(loras):
        path = str(find(lora.file).resolve())
        if path in wanted:
            raise RequestError(f"loras[{number}]", str(lora.file), "each file once; add up its scales")
        wanted[path] = lora.scale
    try:
        able.wear(wanted, lambda path: Weights.of(path, [Path(path)]))
    except UnexpectedKeys as error:
        raise _advised(model, error, Weights.of(error.source, [Path(error.source)])) from error


def _adapters(model: FamilyModel[C]) -> Adapters:
    """What attaches adapters to a model. RequestError where it cannot have any, or not now."""
    adapters = model.adapters
    name = f"{model.family}/{model.variant}"
    if adapters is None or not adapters.applies_to(model.backbone):
        raise RequestError("loras", name, "none for it: its backend holds weights of its own; load it with torch")
    if model.memory.busy:
        raise RequestError("loras", name, "a change between jobs: finish or close the one that runs first")
    return adapters


def _advised(model: FamilyModel[C], error: UnexpectedKeys, weights: Weights) -> UnexpectedKeys:
    """The error of a file that does not fit, with the family that it does fit."""
    return UnexpectedKeys(error.source, error.layout, error.keys, misfit(weights, model.family))


class _Part(NamedTuple, Generic[C]):
    """A tile of a stage, or all of it: a job of its own, and what its prompts became."""

    box: Box
    job: Job
    positive: C
    negative: C | None
    regions: tuple[C, ...]


class _Stage(NamedTuple, Generic[C]):
    """One pass over a picture."""

    job: Job
    parts: tuple[_Part[C], ...]


def _stages(model: FamilyModel[C], job: Job) -> list[tuple[Job, list[tuple[Box, Job]]]]:
    """The job at each of its sizes, and the tiles of each."""
    jobs = [job, *(job.at(stage) for stage in job.high_res)]
    return [(each, [(box, each.within(box, _scale(model, each))) for box in _boxes(model, each)]) for each in jobs]


def _scale(model: FamilyModel[C], job: Job) -> int:
    """Pixels a side of one latent."""
    return job.height // model.noise_shape(job)[1]


def _boxes(model: FamilyModel[C], job: Job) -> tuple[Box, ...]:
    _, height, width = model.noise_shape(job)
    if not job.tiled or job.tile_size is None or job.tile_stride is None:
        return (Box(0, 0, height, width),)
    scale = _scale(model, job)
    return boxes(height, width, job.tile_size // scale, job.tile_stride // scale)


def _read(
    model: FamilyModel[C], stages: Sequence[tuple[Job, list[tuple[Box, Job]]]], cache: PromptCache[C]
) -> tuple[_Stage[C], ...]:
    """Encode all prompts, while the encoders are there."""
    asked: dict[Hashable, tuple[str, Job, bool]] = {}
    adapted = None if model.adapters is None else model.adapters.text

    def key(prompt: str, job: Job, *, negative: bool = False) -> Hashable:
        made = (model.content, adapted, negative, model.conditioned_by(job), prompt)
        asked.setdefault(made, (prompt, job, negative))
        return made

    keys = [
        (
            key(job.prompt, job),
            None if job.cfg_scale == 1 else key(job.negative_prompt, job, negative=True),
            tuple(key(region.prompt, job) for region in job.regions),
        )
        for _, parts in stages
        for _, job in parts
    ]
    known = _conditioned(model, asked, cache)
    found = iter(keys)
    read: list[_Stage[C]] = []
    for stage, parts in stages:
        made: list[_Part[C]] = []
        for box, job in parts:
            positive, negative, regions = next(found)
            without = None if negative is None else known[negative]
            made.append(_Part(box, job, known[positive], without, tuple(known[region] for region in regions)))
        read.append(_Stage(stage, tuple(made)))
    return tuple(read)


def _shown(
    model: FamilyModel[C], job: Job, stages: tuple[_Stage[C], ...], readers: Sequence[ImageReader]
) -> tuple[_Stage[C], ...]:
    """All conditioning with the job's image prompts, which its networks read here, once."""
    positive, negative = read_pictures(job, readers, model.memory)
    if not positive:
        return stages

    def shown(part: _Part[C]) -> _Part[C]:
        return part._replace(
            positive=model.with_pictures(part.positive, positive),
            negative=None if part.negative is None else model.with_pictures(part.negative, negative),
            regions=tuple(model.with_pictures(region, positive) for region in part.regions),
        )

    return tuple(stage._replace(parts=tuple(shown(part) for part in stage.parts)) for stage in stages)


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


def _conditioned(
    model: FamilyModel[C], asked: Mapping[Hashable, tuple[str, Job, bool]], cache: PromptCache[C]
) -> dict[Hashable, C]:
    """What prompts become, by key; the encoders are needed for those alone that are not remembered."""
    known = {key: value for key in asked if (value := cache.get(key)) is not None}
    if len(known) < len(asked):
        encoding = nullcontext() if model.adapters is None else model.adapters.encoding()
        with model.memory.holding(*model.encoders), encoding:
            for key, (prompt, job, negative) in asked.items():
                if key not in known:
                    known[key] = model.condition(prompt, job, negative=negative)
                    cache.put(key, known[key])
    return known


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
    model: FamilyModel[C], x: Tensor, job: Job, upscaler: str, seed: int
) -> tuple[Tensor, Image.Image | None]:
    """The latents of a stage before, at the size of this one, and what they show where that is known."""
    if upscaler == "latent" and not model.inpaints:
        return F.interpolate(x, size=model.noise_shape(job)[1:], mode="bilinear"), None
    shown = resized(_decoded(model, x, seed), job.size)
    if upscaler == "latent":
        return F.interpolate(x, size=model.noise_shape(job)[1:], mode="bilinear"), shown
    return _encoded(model, shown), shown


def _beside(model: FamilyModel[C], job: Job, picture: Image.Image | None) -> Tensor:
    """What a model that inpaints is shown; without a mask, or a picture, everything is to be drawn."""
    shown, mask = picture, job.mask_image
    if shown is None or mask is None:
        mask = Image.new("L", (job.width, job.height), 255)
        shown = shown or Image.new("RGB", mask.size)
    drawn = mask_tensor(mask, job.height, job.width)
    with model.memory.holding(model.vae):
        return model.beside(to_tensor(shown)[None].to(model.device), drawn.to(model.device))


def _denoiser(
    model: FamilyModel[C], stage: _Stage[C], networks: Sequence[ControlNet], batched: bool, more: Tensor | None
) -> Denoise:
    """The Denoise of a stage, made of those of its tiles."""
    levels = evaluated(SAMPLERS[stage.job.sampler], model.levels(stage.job))
    alike: dict[Hashable, Denoise] = {}
    tiles: list[Tile] = []
    for part in stage.parts:
        # Tiles of one size that are told the same are one picture to the network.
        own = part.box if part.regions or networks or more is not None else None
        same = (part.job.size, model.conditioned_by(part.job), own)
        if same not in alike:
            there = None if more is None else part.box.of(more)
            alike[same] = _of_part(model, part, levels, _hints(model, part.job, networks), batched, there)
        tiles.append(Tile(part.box, alike[same]))
    _, height, width = model.noise_shape(stage.job)
    return tiles[0].denoise if len(tiles) == 1 else tiled(tiles, height, width)


def _hints(model: FamilyModel[C], job: Job, networks: Sequence[ControlNet]) -> tuple[Hint, ...]:
    """What the ControlNets of a job, or of a tile of it, are led by."""
    return tuple(
        Hint(
            network=network,
            picture=to_tensor(picture)[None].to(model.device),
            scale=control.scale,
            start=control.start,
            end=control.end,
            kind=kind_of(network, control.kind, "kind"),
        )
        for control, picture, network in zip(job.controls, job.control_images, networks, strict=True)
    )


def _of_part(
    model: FamilyModel[C],
    part: _Part[C],
    levels: Sequence[Level],
    hints: Sequence[Hint],
    batched: bool,
    more: Tensor | None,
) -> Denoise:
    """The family's own Denoise, with prompts for regions, under classifier-free guidance where the job asks for it."""
    job = part.job

    def denoiser(conditioning: C) -> Denoise:
        denoise = model.denoiser(conditioning, levels, job, hints=hints)
        return denoise if more is None else beside(denoise, more)

    if part.negative is not None and not part.regions and batched:
        both = model.both(part.positive, part.negative, levels, job, hints=hints)
        return guided_both(
            both if more is None else beside(both, more), job.cfg_scale, job.cfg_rescale, model.prediction
        )
    positive = denoiser(part.positive)
    if part.regions:
        _, height, width = model.noise_shape(job)
        weights = [
            region.scale * mask_tensor(mask, height, width).to(model.device)
            for region, mask in zip(job.regions, job.region_masks, strict=True)
        ]
        denoisers = [denoiser(conditioning) for conditioning in part.regions]
        positive = regional(positive, [Regional(*pair) for pair in zip(denoisers, weights, strict=True)])
    if part.negative is None:
        return positive
    return guided(positive, denoiser(part.negative), job.cfg_scale, job.cfg_rescale, model.prediction)


def _steps(model: FamilyModel[C], job: Job, denoise: Denoise, begun: Tensor | None, seed: int) -> Iterator[Step]:
    """The steps of one stage, from clean latents taken back to noise in part, or from noise alone."""
    if model.inpaints and job.denoising_strength == 1:
        begun = None  # as they were trained: from noise alone, with the picture beside it
    levels = model.levels(job)
    noise = _noise(seed, (1, *model.noise_shape(job)), model.device)
    top = levels.path[0]
    x = model.start(job, levels, noise) if begun is None else top.alpha * begun + top.sigma * noise()
    if begun is not None and job.mask_image is not None and not model.inpaints:
        mask = mask_tensor(job.mask_image, *x.shape[2:]).to(model.device)
        denoise = keeping(denoise, begun, mask)
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
        controls: Callable[[str], ControlNet] | None = None,
        readers: Callable[[str, str | None], ImageReader] | None = None,
    ) -> None:
        """`controls` loads ControlNets for this model, `readers` IP-Adapters, each with its encoder.

        `prompts` may be shared between models: each finds its own by `family.content`.
        """
        self.family = family
        self.storage_errors = dict(storage_errors or {})  # of parts kept in fewer bits, relative to what was read
        self.left_out = dict(left_out or {})  # parts that it does without, and what that means
        self.prompts = PromptCache[C]() if prompts is None else prompts
        self._controls = controls
        self._loaded: dict[str, ControlNet] = {}
        self._readers = readers

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
        adapters = _adapters(self.family)
        path = find(file)
        weights = Weights.of(str(file), [path])
        if name is None:
            stem = path.stem if path.stem not in UNTOLD else path.parent.name or path.stem
            taken = set(adapters.names)
            name = next(n for k in count(1) if (n := stem if k == 1 else f"{stem}-{k}") not in taken)
        try:
            adapters.attach(weights, name=name, scale=scale)
        except UnexpectedKeys as error:
            raise _advised(self.family, error, weights) from error
        return name

    def scale(self, name: str, value: float) -> None:
        """Change an attached adapter's strength; 0 is without it, while the file stays at hand."""
        _adapters(self.family).scale(name, value)

    def detach(self, name: str) -> None:
        """Take an adapter away: the model's numbers are those of before, bit for bit."""
        _adapters(self.family).detach(name)

    def load_control(self, source: str | os.PathLike[str]) -> ControlNet:
        """The ControlNet that a file, folder or hub id holds, loaded once, where and as this model is.

        Raises a LoadError: WrongShape, which names the families that it fits, where this model's is not among them.
        """
        name = os.fspath(source)
        if name not in self._loaded:
            if self._controls is None:
                raise RequestError("controls", name, f"none: ControlNets of {self.name} do not run here yet")
            self._loaded[name] = self._controls(name)
        return self._loaded[name]

    def load_image_prompt(
        self, source: str | os.PathLike[str], encoder: str | os.PathLike[str] | None = None
    ) -> ImageReader:
        """The IP-Adapter in a file (or org/name/path of one on the hub) with its image encoder, loaded once.

        Raises a LoadError: WrongShape, which names the families that it fits, where this model's is not among them;
        MissingPart where the encoder is neither given nor beside it.
        """
        if self._readers is None:
            raise RequestError("image_prompts", os.fspath(source), f"none: they do not run with {self.name} yet")
        return self._readers(os.fspath(source), None if encoder is None else os.fspath(encoder))

    def stream(self, request: Request) -> Events:
        """Progress and pictures as they come; close the iterator to stop early."""
        networks = [self.load_control(control.model) for control in request.controls]
        readers = [self.load_image_prompt(each.model, each.encoder) for each in request.image_prompts]
        return stream(self.family, request, cache=self.prompts, networks=networks, readers=readers)

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
