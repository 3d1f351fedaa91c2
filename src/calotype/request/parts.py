"""What a request is made of beside single values: regions, controls, image prompts, passes at higher resolutions.

Each part checks itself when built, and goes to and from plain values as the request does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from calotype.errors import RequestError
from calotype.request.checks import MAX_SIDE, MAX_STEPS, picture, real, text, whole
from calotype.request.pictures import is_picture, name_of

if TYPE_CHECKING:
    from calotype.request.pictures import PictureSource

MAX_PARTS = 64
INPAINT = "inpaint"
"""The kind of a control's picture of which the job's mask takes away what is to be drawn."""
UPSCALERS = ("lanczos", "latent")
WEIGHTS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")  # how a file of an upscaler's ends


class Part:
    """One of several things of a kind in a request."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without those left open; a picture is named by its path or its fingerprint."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # pyright: ignore[reportArgumentType]
        return {name: _plain(value) for name, value in values.items() if value is not None}


def _plain(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, tuple):
        items: tuple[Part, ...] = value
        return [item.to_dict() for item in items]
    return name_of(value) if isinstance(value, os.PathLike) or is_picture(value) else value


P = TypeVar("P", bound=Part)


def parts_of(kind: type[P], field: str, given: object) -> tuple[P, ...]:
    """Parts as they are, or of plain values (none of None); errors name the one that is wrong, as regions[1].mask."""
    if given is None:
        return ()
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise RequestError(field, given, f"a list of {kind.__name__}, or of their values")
    items: Sequence[object] = given  # pyright: ignore[reportUnknownVariableType]
    if len(items) > MAX_PARTS:
        raise RequestError(field, f"{len(items)} of them", f"at most {MAX_PARTS}")
    return tuple(_part(kind, f"{field}[{number}]", item) for number, item in enumerate(items))


def _part(kind: type[P], field: str, given: object) -> P:
    if isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise RequestError(field, given, f"{kind.__name__}, or its values by name")
    values: Mapping[Any, Any] = given
    known = [each.name for each in fields(kind)]  # pyright: ignore[reportArgumentType]
    for name in values:
        if name not in known:
            raise RequestError(f"{field}.{name}", values[name], "one of the fields " + ", ".join(known))
    try:
        return kind(**values)
    except RequestError as error:
        raise error.under(f"{field}.") from None
    except TypeError:
        raise RequestError(field, dict(values), f"all that {kind.__name__} needs: {', '.join(known)}") from None


@dataclass(frozen=True, kw_only=True)
class Region(Part):
    """A prompt for a place in the picture.

    prompt   what to draw there
    mask     where: a picture (or its path), white for the place, resized to the job's size; greys are in between
    scale    how much it counts there, against 1 for the request's own prompt, which counts everywhere
    """

    prompt: str
    mask: PictureSource
    scale: float = 1.0

    def __post_init__(self) -> None:
        text("prompt", self.prompt)
        picture("mask", self.mask)
        real("scale", self.scale, 0, 1000)


@dataclass(frozen=True)
class Lora(Part):
    """A LoRA (or its kin) to draw with.

    file     its path, a folder of PEFT's or diffusers', or the name of a file in CALOTYPE_HOME/loras
    scale    how strong it is, against what it was trained to be
    """

    file: str | os.PathLike[str]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.file, (str, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise RequestError("file", self.file, "the path of a file")
        object.__setattr__(self, "file", os.fspath(self.file))
        text("file", self.file)
        if not self.file:
            raise RequestError("file", self.file, "the path of a file")
        real("scale", self.scale, -100, 100)


@dataclass(frozen=True, kw_only=True)
class Control(Part):
    """A picture that leads a ControlNet.

    kind        the annotator that draws what the network sees ("canny", "depth", ...), or "none" where the picture is
                ready; for a union ControlNet, which must be told what it sees, "none:canny" and the like.
                "inpaint" takes away of a ready picture what the request's mask_image says to draw
    model       the ControlNet: a file, a folder, a hub id, or org/name/path of a file on the hub
    image       the picture, or its path; resized to the job's size. None: the picture that the job, or the pass, begins
                with
    scale       how much it counts
    start, end  the part of the steps that it leads, as fractions of them
    settings    those of the annotator, by name ({"low": 50}); None: as it has them
    """

    kind: str
    model: str | os.PathLike[str]
    image: PictureSource | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    settings: Mapping[str, str | float | bool] | None = None

    def __post_init__(self) -> None:
        text("kind", self.kind)
        _path("model", self)
        if self.image is not None:
            picture("image", self.image)
        real("scale", self.scale, 0, 10)
        real("start", self.start, 0, 1)
        real("end", self.end, 0, 1)
        if self.start >= self.end:
            raise RequestError("end", self.end, f"more than start, {self.start}: it would never lead")
        if self.settings is not None:
            object.__setattr__(self, "settings", _settings("settings", self.settings))

    @property
    def source(self) -> str:
        """Its network, as a name."""
        return os.fspath(self.model)

    @property
    def ready(self) -> bool:
        """Whether the network sees the picture as it is, and no annotator draws from it."""
        return self.kind in ("none", INPAINT) or self.kind.startswith("none:")

    @property
    def shows(self) -> str:
        """What the network sees: of canny and of none:canny, canny."""
        return self.kind.removeprefix("none:")


def _path(field: str, part: Part) -> None:
    """A path in a field, made text."""
    value = getattr(part, field)
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):  # pyright: ignore[reportUnknownArgumentType]
        raise RequestError(field, value, "the path of a file")
    object.__setattr__(part, field, os.fspath(value))  # pyright: ignore[reportUnknownArgumentType]
    text(field, getattr(part, field))


def _settings(field: str, given: object) -> dict[str, str | float | bool] | None:
    """Plain values by name; None where there are none."""
    if not isinstance(given, Mapping):
        raise RequestError(field, given, "values by name, as {'low': 50}")
    values: Mapping[Any, Any] = given
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, (str, int, float, bool)):
            raise RequestError(field, {name: value}, "text, numbers, True or False, each by a name")
    return dict(values) or None


@dataclass(frozen=True, kw_only=True)
class HighRes(Part):
    """A pass over the picture at a higher resolution, or the same: enlarge, go back to noise in part, denoise again.

    width, height   pixels, multiples of the family's grain
    strength        0..1, exclusive of 0: how far the enlarged picture is taken back to noise
    steps           sampling steps over that part of the way; None: those of the request
    upscaler        "lanczos" enlarges the picture, "latent" the latents (softer, without decoding between); or the
                    path of an ESRGAN or the like, a file of weights
    tiled           whether the network sees the picture in tiles; None: as the request has it
    tile_size, tile_stride
                    pixels a side of a tile, and from one to the next; None: as the request has it
    controls        pictures that lead ControlNets in this pass; None: those of the request
    prompt          what to draw; None: as the request has it. In tiles it is drawn in each: "" keeps what is there
    """

    width: int
    height: int
    strength: float = 0.5
    steps: int | None = None
    upscaler: str = "lanczos"
    tiled: bool | None = None
    tile_size: int | None = None
    tile_stride: int | None = None
    controls: tuple[Control, ...] | None = None
    prompt: str | None = None

    def __post_init__(self) -> None:
        whole("width", self.width, 1, MAX_SIDE)
        whole("height", self.height, 1, MAX_SIDE)
        real("strength", self.strength, 0, 1)
        if self.strength == 0:
            raise RequestError("strength", self.strength, "more than 0: nothing of the picture would change")
        if self.steps is not None:
            whole("steps", self.steps, 1, MAX_STEPS)
        text("upscaler", self.upscaler)
        if self.upscaler not in UPSCALERS and not self.upscaler.lower().endswith(WEIGHTS):
            allowed = f"one of {', '.join(UPSCALERS)}, or the path of a file that ends with {', '.join(WEIGHTS)}"
            raise RequestError("upscaler", self.upscaler, allowed)
        if self.tiled is not None and not isinstance(self.tiled, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise RequestError("tiled", self.tiled, "True, False or None")
        for field in ("tile_size", "tile_stride"):
            value = getattr(self, field)
            if value is not None:
                whole(field, value, 1, MAX_SIDE)
                if self.tiled is False:
                    raise RequestError(field, value, "None where nothing is tiled")
        if self.prompt is not None:
            text("prompt", self.prompt)
        if self.controls is not None:
            object.__setattr__(self, "controls", parts_of(Control, "controls", self.controls))


@dataclass(frozen=True)
class ImagePrompt(Part):
    """A picture that says what to draw, as a prompt does: its subject, its style.

    model    the IP-Adapter: a file, or org/name/path of a file on the hub
    image    the picture, or its path; its middle square is what is seen
    scale    how much it counts
    encoder  the image encoder that goes with it, a folder or a file; None: image_encoder/ beside the adapter
    """

    model: str | os.PathLike[str]
    image: PictureSource
    scale: float = 1.0
    encoder: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        _path("model", self)
        if self.encoder is not None:
            _path("encoder", self)
        picture("image", self.image)
        real("scale", self.scale, 0, 10)

    @property
    def networks(self) -> tuple[str, str | None]:
        """By what its networks are known: model and encoder."""
        return os.fspath(self.model), None if self.encoder is None else os.fspath(self.encoder)
