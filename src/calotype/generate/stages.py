"""A job's stages, the picture at its first size and its passes at higher resolutions, and the tiles of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from PIL import Image

from calotype.control.annotators import Annotator, drawn_by
from calotype.control.hints import kind_of, leads
from calotype.control.image_prompts import ImageReaders, read_pictures
from calotype.errors import RequestError
from calotype.families.model import FamilyModel
from calotype.generate.prompts import PromptCache, Read, read, with_pictures
from calotype.nn.leader import Leader
from calotype.request import Control, Job, resized
from calotype.request.parts import INPAINT
from calotype.sampling.levels import Levels
from calotype.sampling.samplers import SAMPLERS, evaluated
from calotype.sampling.spatial import Box, boxes

C = TypeVar("C")


class Part(NamedTuple):
    """A tile of a stage, or all of it: a job of its own."""

    box: Box
    job: Job

    @property
    def regions(self) -> tuple[int, ...]:
        """The regions that count anywhere in it, by number."""
        places = enumerate(zip(self.job.regions, self.job.region_masks, strict=True))
        return tuple(number for number, (region, mask) in places if region.scale and mask.getbbox())


@dataclass(frozen=True)
class Led:
    """A control of one stage with its network.

    `shown` is what the network sees, at the stage's size; None where that is drawn from the picture that the stage
    begins with.
    """

    control: Control
    network: Leader
    kind: int | None
    annotator: Annotator | None
    shown: Image.Image | None

    def by(self, begun: Image.Image | None) -> Image.Image:
        """What the network sees where the stage begins with this picture."""
        if self.shown is not None:
            return self.shown
        assert begun is not None
        return _drawn(self.annotator, begun)


class Stage(NamedTuple, Generic[C]):
    """One pass over a picture."""

    job: Job
    levels: Levels
    scale: int  # pixels a side of one latent
    read: Read[C]
    parts: tuple[Part, ...]
    led: tuple[Led, ...]

    @property
    def networks(self) -> tuple[Leader, ...]:
        return tuple(dict.fromkeys(led.network for led in self.led))

    @property
    def led_by_itself(self) -> bool:
        """Whether a control is drawn from the picture that the stage begins with."""
        return any(led.shown is None for led in self.led)


def planned(
    model: FamilyModel[C],
    job: Job,
    networks: Mapping[str, Leader],
    readers: ImageReaders,
    cache: PromptCache[C],
) -> tuple[Stage[C], ...]:
    """All stages of a job, with their prompts read and what leads them drawn, as far as it is there by then.

    Raises RequestError for steps that a stage's part of the schedule does not hold, and for a control whose kind is not
    known, or not to its network.
    """
    jobs = {"": job} | {f"high_res[{number}].": job.at(number) for number in range(len(job.high_res))}
    levels = [_levels(model, each, prefix) for prefix, each in jobs.items()]
    own = [True, *(each.controls is not None for each in job.high_res)]
    led = [
        _led(model, each, networks, prefix, path, own=mine)
        for (prefix, each), path, mine in zip(jobs.items(), levels, own, strict=True)
    ]
    words = read(model, list(jobs.values()), cache)
    words = with_pictures(model, words, *read_pictures(job, readers, model.memory))
    made: list[Stage[C]] = []
    for each, path, known, by in zip(jobs.values(), levels, words, led, strict=True):
        scale = each.height // model.noise_shape(each)[1]
        made.append(Stage(each, path, scale, known, _parts(model, each, scale), by))
    return tuple(made)


def _levels(model: FamilyModel[C], job: Job, prefix: str) -> Levels:
    try:
        return model.levels(job)
    except RequestError as error:
        raise error.under(prefix) from None


def _parts(model: FamilyModel[C], job: Job, scale: int) -> tuple[Part, ...]:
    _, height, width = model.noise_shape(job)
    tiles: Sequence[Box] = (Box(0, 0, height, width),)
    if job.tiled and job.tile_size is not None and job.tile_stride is not None:
        tiles = boxes(height, width, job.tile_size // scale, job.tile_stride // scale)
    return tuple(Part(box, job.within(box, scale)) for box in tiles)


def _led(
    model: FamilyModel[C], job: Job, networks: Mapping[str, Leader], prefix: str, levels: Levels, *, own: bool
) -> tuple[Led, ...]:
    """The controls of a stage that count for something. Its `own` must lead a step, those of the request need not."""
    made: list[Led] = []
    steps = len(evaluated(SAMPLERS[job.sampler], levels))
    for number, (control, picture) in enumerate(zip(job.controls, job.control_images, strict=True)):
        field, network = f"{prefix}controls[{number}].", networks[control.source]
        kind = kind_of(network, control, field + "kind")
        try:
            drawing = drawn_by(control, str(model.device))
            _check_masked(control, network, job)
            if control.scale == 0:
                continue
            if own and not any(leads(control, step, steps) for step in range(steps)):
                span = f"start {control.start:g} and end {control.end:g}"
                raise RequestError("end", control.end, f"others: none of {steps} steps lies between {span}")
            begun = job.input_image if picture is None and not prefix else picture
            shown = None if begun is None else _drawn(drawing, resized(begun, job.size))
        except RequestError as error:
            raise error.under(field) from None
        made.append(Led(control, network, kind, drawing, shown))
    return tuple(made)


def _check_masked(control: Control, network: Leader, job: Job) -> None:
    """Whether a network that sees a mask has one, and one that sees none is asked for no more."""
    if control.kind == INPAINT and network.sees == "latents":
        raise RequestError("kind", INPAINT, "another: this ControlNet sees no mask")
    if (control.kind == INPAINT or network.sees == "masked") and job.mask_image is None:
        raise RequestError(
            "model", control.model, "one without a mask, or a mask_image: this one was made for inpainting"
        )


def _drawn(annotator: Annotator | None, picture: Image.Image) -> Image.Image:
    return picture if annotator is None else annotator.draw(picture)
