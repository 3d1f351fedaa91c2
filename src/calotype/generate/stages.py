"""A job's stages, the picture at its first size and its passes at higher resolutions, and the tiles of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from PIL import Image

from calotype.control.annotators import annotate, annotator
from calotype.control.hints import kind_of
from calotype.errors import RequestError
from calotype.families.model import FamilyModel
from calotype.generate.prompts import PromptCache, Read, read
from calotype.nn.leader import Leader
from calotype.request import Control, Job, resized
from calotype.sampling.spatial import Box, boxes

C = TypeVar("C")


class Part(NamedTuple, Generic[C]):
    """A tile of a stage, or all of it: a job of its own, and what its prompts became."""

    box: Box
    job: Job
    read: Read[C]


@dataclass(frozen=True)
class Led:
    """A control of one stage with its network.

    `shown` is what the network sees, at the stage's size; None where that is drawn from the picture that the stage
    begins with.
    """

    control: Control
    network: Leader
    kind: int | None
    shown: Image.Image | None

    def by(self, begun: Image.Image | None) -> Image.Image:
        """What the network sees where the stage begins with this picture."""
        if self.shown is not None:
            return self.shown
        assert begun is not None
        return _drawn(self.control.kind, begun)


class Stage(NamedTuple, Generic[C]):
    """One pass over a picture."""

    job: Job
    scale: int  # pixels a side of one latent
    parts: tuple[Part[C], ...]
    led: tuple[Led, ...]

    @property
    def networks(self) -> tuple[Leader, ...]:
        return tuple(dict.fromkeys(led.network for led in self.led))

    @property
    def led_by_itself(self) -> bool:
        """Whether a control is drawn from the picture that the stage begins with."""
        return any(led.shown is None for led in self.led)


def planned(
    model: FamilyModel[C], job: Job, networks: Mapping[str, Leader], cache: PromptCache[C]
) -> tuple[Stage[C], ...]:
    """All stages of a job, with their prompts read and what leads them drawn, as far as it is there by then.

    Raises RequestError for a control whose kind is not known, or not to its network.
    """
    jobs = [job, *(job.at(number) for number in range(len(job.high_res)))]
    led = [_led(each, networks, "" if number == 0 else f"high_res[{number - 1}].") for number, each in enumerate(jobs)]
    scales = [each.height // model.noise_shape(each)[1] for each in jobs]
    tiles = [
        [(box, each.within(box, scale)) for box in _boxes(model, each, scale)]
        for each, scale in zip(jobs, scales, strict=True)
    ]
    found = iter(read(model, [own for stage in tiles for _, own in stage], cache))
    return tuple(
        Stage(each, scale, tuple(Part(box, own, next(found)) for box, own in stage), by)
        for each, scale, stage, by in zip(jobs, scales, tiles, led, strict=True)
    )


def _boxes(model: FamilyModel[C], job: Job, scale: int) -> Sequence[Box]:
    _, height, width = model.noise_shape(job)
    if not job.tiled or job.tile_size is None or job.tile_stride is None:
        return (Box(0, 0, height, width),)
    return boxes(height, width, job.tile_size // scale, job.tile_stride // scale)


def _led(job: Job, networks: Mapping[str, Leader], prefix: str) -> tuple[Led, ...]:
    made: list[Led] = []
    for number, (control, picture) in enumerate(zip(job.controls, job.control_images, strict=True)):
        field, network = f"{prefix}controls[{number}].", networks[control.model]
        kind = kind_of(network, control.kind, field + "kind")
        try:
            if not _ready(control.kind):
                annotator(control.kind)
            begun = job.input_image if picture is None and not prefix else picture
            shown = None if begun is None else _drawn(control.kind, resized(begun, job.size))
        except RequestError as error:
            raise RequestError(field + error.field, error.value, error.allowed) from None
        made.append(Led(control, network, kind, shown))
    return tuple(made)


def _ready(kind: str) -> bool:
    return kind == "none" or kind.startswith("none:")


def _drawn(kind: str, picture: Image.Image) -> Image.Image:
    return picture if _ready(kind) else annotate(kind, picture)
