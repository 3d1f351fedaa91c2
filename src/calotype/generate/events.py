"""What a job says while it runs."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from PIL import Image

from calotype.memory.ladder import Rung
from calotype.request import Job


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
