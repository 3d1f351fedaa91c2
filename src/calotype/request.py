"""What a picture is asked for with: one frozen type for every door (Python, command line, HTTP, batch file).

A `Request` holds what the user said; None means the family's default. `Request.complete` fills the gaps from a
family's `Defaults` and returns a `Job`, in which every value is settled. Both check themselves once, when built.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from calotype.errors import RequestError

if TYPE_CHECKING:
    from PIL import Image

    PictureSource = str | os.PathLike[str] | Image.Image

MAX_PROMPT = 20_000
MAX_SIDE = 16_384
MAX_STEPS = 1_000
MAX_COUNT = 1_000
MAX_SEED = 2**63 - 1 - MAX_COUNT


@dataclass(frozen=True)
class Size:
    """A picture's size in pixels."""

    width: int
    height: int

    def nearest(self, grain: int) -> Size:
        """The closest size whose sides are multiples of `grain` (at least one grain each)."""
        width, height = (max(grain, int(side / grain + 0.5) * grain) for side in (self.width, self.height))
        return Size(width, height)

    def of_area(self, pixels: int, grain: int) -> Size:
        """A size of about these proportions and so many pixels, its sides multiples of `grain`."""
        factor = (pixels / (self.width * self.height)) ** 0.5
        return Size(round(self.width * factor), round(self.height * factor)).nearest(grain)

    def tokens(self, grain: int) -> int:
        """How many square tokens of `grain` pixels a side cover the picture."""
        return (self.width // grain) * (self.height // grain)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def _whole(field: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(field, value, f"a whole number from {low:,} to {high:,}")


def _real(field: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:  # NaN is neither
        raise RequestError(field, value, f"a finite number from {low:g} to {high:g}")


def _text(field: str, value: object) -> None:
    if not isinstance(value, str):
        raise RequestError(field, value, "text")
    if len(value) > MAX_PROMPT:
        raise RequestError(field, value, f"at most {MAX_PROMPT:,} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        # What a terminal sends in another encoding: neither a tokenizer nor a file's metadata can hold it.
        raise RequestError(field, value, "text in valid Unicode") from None


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a family does where a request is silent.

    `grain` is the number of pixels that both sides must be a multiple of; `samplers` and `schedules` are the names
    that the family's process allows; `text_tokens` and `clip_skip` are None where a request cannot choose them; `sizes`
    says whether the network is told sizes and a crop, `original_size` which one it is told of the original (None: that
    of the picture); `shifts` whether schedules can be shifted; `largest` is the longest side that the network has
    positions for, None where any will do; `denoising_strength` is for requests with an input image.
    """

    width: int
    height: int
    grain: int
    steps: int
    cfg_scale: float
    embedded_guidance: float | None
    sampler: str
    schedule: str
    shift: float | None
    text_tokens: int | None
    samplers: tuple[str, ...]
    schedules: tuple[str, ...]
    clip_skip: int | None = None
    sizes: bool = False
    original_size: tuple[int, int] | None = None
    shifts: bool = False
    largest: int | None = None
    denoising_strength: float = 0.7

    @property
    def useless(self) -> dict[str, str]:
        """The fields that a request to this model must leave at None, and why."""
        found: dict[str, str] = {}
        if self.embedded_guidance is None:
            found["embedded_guidance"] = "this model has no guidance input; use cfg_scale"
        for field in ("text_tokens", "clip_skip"):
            if getattr(self, field) is None:
                found[field] = "this model leaves no choice there"
        if not self.shifts:
            found["shift"] = "this model's schedules have no shift; choose another schedule"
        if not self.sizes:
            found |= dict.fromkeys(SIZES, "this model is not told sizes")
        return found


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request with every gap filled: what one run of the engine needs to know.

    What a model has no use for stays None: `embedded_guidance`, `shift` (also where the schedule derives it from the
    size, as FLUX.1 dev does), `text_tokens`, `clip_skip`, the sizes that SDXL is told. `input_image` is an RGB picture
    of the job's own size, `input_name` the path that it came from, or its fingerprint.
    """

    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    cfg_scale: float
    cfg_rescale: float
    embedded_guidance: float | None
    seed: int
    count: int
    sampler: str
    schedule: str
    shift: float | None
    text_tokens: int | None
    clip_skip: int | None = None
    input_image: Image.Image | None = None
    input_name: str | None = None
    denoising_strength: float | None = None
    original_width: int | None = None
    original_height: int | None = None
    crop_left: int | None = None
    crop_top: int | None = None
    target_width: int | None = None
    target_height: int | None = None

    @property
    def size(self) -> Size:
        return Size(self.width, self.height)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the names of a request, for metadata; a picture is named by its path or fingerprint."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["input_image"] = values.pop("input_name")
        return values


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for. None means the family's default; a bad value raises RequestError at once.

    prompt             what to draw
    negative_prompt    what to steer away from; used where cfg_scale is not 1
    width, height      pixels, multiples of the family's grain
    steps              sampling steps
    cfg_scale          classifier-free guidance, two passes (Ho and Salimans 2022); 1 skips the negative pass
    cfg_rescale        0..1: how far the guided estimate is pulled back to the positive one's spread (Lin et al. 2023)
    embedded_guidance  the distilled guidance input of FLUX.1 dev (3.5); refused by models without that input
    seed               picture k of the request is drawn from seed + k; None draws a seed at random
    count              how many pictures
    sampler, schedule  names, as `calotype models` lists them
    shift              how far a flow schedule leans to the noisy side; None follows the family
    text_tokens        length of the sequence that T5 or ChatGLM reads
    clip_skip          which of CLIP's layers is taken, from the end: 1 the last, 2 the one before it
    input_image        a picture to start from (a PIL image, or the path of one), resized to the request's size; a
                       side that is not given follows the picture's proportions, and both the family's usual area
    denoising_strength 0..1, exclusive of 0: how far the input image is taken back to noise. All `steps` are taken over
                       that part of the way
    original_width, original_height, crop_left, crop_top, target_width, target_height
                       what SDXL and early Hunyuan-DiT are told of the picture: the size before it was scaled, where
                       it was cut, the size aimed at (Podell et al. 2023); None follows width and height, uncropped,
                       but Hunyuan-DiT takes an original of 1024 x 1024
    """

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    cfg_rescale: float = 0.0
    embedded_guidance: float | None = None
    seed: int | None = None
    count: int = 1
    sampler: str | None = None
    schedule: str | None = None
    shift: float | None = None
    text_tokens: int | None = None
    clip_skip: int | None = None
    input_image: PictureSource | None = None
    denoising_strength: float | None = None
    original_width: int | None = None
    original_height: int | None = None
    crop_left: int | None = None
    crop_top: int | None = None
    target_width: int | None = None
    target_height: int | None = None

    def __post_init__(self) -> None:
        _text("prompt", self.prompt)
        _text("negative_prompt", self.negative_prompt)
        _whole("count", self.count, 1, MAX_COUNT)
        _real("cfg_rescale", self.cfg_rescale, 0, 1)
        for field, low, high in (
            ("width", 1, MAX_SIDE),
            ("height", 1, MAX_SIDE),
            ("steps", 1, MAX_STEPS),
            ("seed", 0, MAX_SEED),
            ("text_tokens", 1, 4096),
            ("clip_skip", 1, 32),
            ("original_width", 1, MAX_SIDE),
            ("original_height", 1, MAX_SIDE),
            ("crop_left", 0, MAX_SIDE),
            ("crop_top", 0, MAX_SIDE),
            ("target_width", 1, MAX_SIDE),
            ("target_height", 1, MAX_SIDE),
        ):
            value = getattr(self, field)
            if value is not None:
                _whole(field, value, low, high)
        for field, low, high in (
            ("cfg_scale", 0, 100),
            ("embedded_guidance", 0, 100),
            ("shift", 0.01, 100),
        ):
            value = getattr(self, field)
            if value is not None:
                _real(field, value, low, high)
        if self.input_image is not None and not isinstance(self.input_image, (str, os.PathLike)):
            from PIL import Image

            if not isinstance(self.input_image, Image.Image):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise RequestError("input_image", self.input_image, "a PIL image, or the path of a picture")
        if self.denoising_strength is not None:
            _real("denoising_strength", self.denoising_strength, 0, 1)
            if self.denoising_strength == 0:
                raise RequestError(
                    "denoising_strength", self.denoising_strength, "more than 0: nothing of the picture would change"
                )
            if self.input_image is None:
                raise RequestError("denoising_strength", self.denoising_strength, "None without an input_image")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Request:
        """A request from plain values (a batch line, PNG metadata, an HTTP body); unknown names raise RequestError."""
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                raise RequestError(name, values[name], "one of the fields " + ", ".join(sorted(known)))
        if "prompt" not in values:
            raise RequestError("prompt", None, "text")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the fields left to the family; a picture is named by its path or its fingerprint."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.input_image is not None:
            values["input_image"] = _name(self.input_image)
        return {name: value for name, value in values.items() if value is not None}

    def complete(self, defaults: Defaults, seed: int, picture: Image.Image | None = None) -> Job:
        """The job that this request is for a family with these defaults; `seed` is used where none was asked for.

        `picture` is the input image, opened. Raises RequestError for sizes off the grid, samplers or schedules that the
        family's process does not have, and values for what the model has no use for.
        """
        assert (picture is None) == (self.input_image is None)
        usual = Size(defaults.width, defaults.height)
        if picture is not None:
            usual = _in_proportion(Size(*picture.size), self.width, self.height, usual, defaults.grain)
        width = usual.width if self.width is None else self.width
        height = usual.height if self.height is None else self.height
        nearest = Size(width, height).nearest(defaults.grain)
        for field, value, near in (("width", width, nearest.width), ("height", height, nearest.height)):
            if value != near:
                raise RequestError(field, value, f"multiples of {defaults.grain}; the nearest valid size is {nearest}")
            if defaults.largest is not None and value > defaults.largest:
                raise RequestError(field, value, f"at most {defaults.largest:,}: this model knows no positions beyond")
        sampler = defaults.sampler if self.sampler is None else self.sampler
        if sampler not in defaults.samplers:
            raise RequestError("sampler", sampler, "one of " + ", ".join(defaults.samplers))
        schedule = defaults.schedule if self.schedule is None else self.schedule
        if schedule not in defaults.schedules:
            raise RequestError("schedule", schedule, "one of " + ", ".join(defaults.schedules))
        for field, why in defaults.useless.items():
            if getattr(self, field) is not None:
                raise RequestError(field, getattr(self, field), f"None: {why}")
        told = {name: getattr(self, name) for name in SIZES}
        if defaults.sizes:
            usually = (*(defaults.original_size or (width, height)), 0, 0, width, height)
            told = {name: told[name] if told[name] is not None else u for name, u in zip(SIZES, usually, strict=True)}
        strength = name = None
        if picture is not None:
            assert self.input_image is not None
            name = _name(self.input_image)
            picture = resized(picture, Size(width, height))
            strength = self.denoising_strength or defaults.denoising_strength
        return Job(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            width=width,
            height=height,
            steps=defaults.steps if self.steps is None else self.steps,
            cfg_scale=float(defaults.cfg_scale if self.cfg_scale is None else self.cfg_scale),
            cfg_rescale=float(self.cfg_rescale),
            embedded_guidance=(
                defaults.embedded_guidance if self.embedded_guidance is None else float(self.embedded_guidance)
            ),
            seed=seed if self.seed is None else self.seed,
            count=self.count,
            sampler=sampler,
            schedule=schedule,
            shift=defaults.shift if self.shift is None else float(self.shift),
            text_tokens=defaults.text_tokens if self.text_tokens is None else self.text_tokens,
            clip_skip=defaults.clip_skip if self.clip_skip is None else self.clip_skip,
            input_image=picture,
            input_name=name,
            denoising_strength=None if strength is None else float(strength),
            **told,
        )


SIZES = ("original_width", "original_height", "crop_left", "crop_top", "target_width", "target_height")
_LANCZOS = 1  # PIL.Image.Resampling.LANCZOS, without importing it


def _in_proportion(picture: Size, width: int | None, height: int | None, usual: Size, grain: int) -> Size:
    """A size for a job that starts from a picture, where its request leaves sides open."""
    if width is not None and height is not None:
        return usual
    if width is not None:
        found = Size(width, round(width * picture.height / picture.width)).nearest(grain)
    elif height is not None:
        found = Size(round(height * picture.width / picture.height), height).nearest(grain)
    else:
        found = picture.of_area(usual.width * usual.height, grain)
    if max(found.width, found.height) > MAX_SIDE:
        raise RequestError(
            "input_image", f"{picture} pixels", f"milder proportions: {found} would follow; give width and height"
        )
    return found


def resized(picture: Image.Image, size: Size) -> Image.Image:
    """A picture at a job's size."""
    wanted = (size.width, size.height)
    return picture if picture.size == wanted else picture.resize(wanted, _LANCZOS)


def _name(picture: PictureSource) -> str:
    """What a picture is called in plain values: its path, or its fingerprint."""
    return os.fspath(picture) if isinstance(picture, (str, os.PathLike)) else fingerprint(picture)


def fingerprint(picture: Image.Image) -> str:
    """The hash of what a picture shows."""
    shown = picture.convert("RGB")
    content = f"{shown.width}x{shown.height} ".encode() + shown.tobytes()
    return f"{FINGERPRINT}{hashlib.sha256(content).hexdigest()}"


FINGERPRINT = "sha256:"  # before the hash of a picture that is known by it alone
