"""The kinds of annotators: a frozen dataclass each, whose fields are its settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageFilter, ImageOps

from calotype.control.annotators import learned
from calotype.errors import RequestError
from calotype.image import input_picture
from calotype.request import Control, Request, Size, resized
from calotype.request.checks import MAX_SIDE, flag, real, text, whole

if TYPE_CHECKING:
    from calotype.control.annotators.edges import Floats

STEEPEST = 2040  # |dx| + |dy| of 3 x 3 Sobel slopes between black and white
MOST_BLUR = 1024


class Annotator(ABC):
    """One kind, with its settings as fields. They are checked when it is made: RequestError names one that is wrong."""

    @abstractmethod
    def draw(self, picture: Image.Image) -> Image.Image:
        """An RGB picture -> the one to lead by, RGB, of the same size."""


@dataclass(frozen=True, kw_only=True)
class Canny(Annotator):
    """Edges one pixel wide, white on black.

    low     slopes above this are edges if they touch one above `high`; 0 .. 2040
    high    slopes above this are edges
    blur    the Gaussian before, its standard deviation in pixels; none by default, as OpenCV and the networks' training
    """

    low: float = 100
    high: float = 200
    blur: float = 0

    def __post_init__(self) -> None:
        real("low", self.low, 0, STEEPEST)
        real("high", self.high, 0, STEEPEST)
        real("blur", self.blur, 0, MOST_BLUR)
        if self.low > self.high:
            raise RequestError("low", self.low, f"at most high, {self.high:g}")

    def draw(self, picture: Image.Image) -> Image.Image:
        import numpy as np

        from calotype.control.annotators.edges import canny

        found = canny(np.asarray(_softened(picture, self.blur)), self.low, self.high)
        return Image.fromarray(found.astype(np.uint8) * np.uint8(255)).convert("RGB")


@dataclass(frozen=True, kw_only=True)
class Lineart(Annotator):
    """A line drawing, white on black: what is darker than its surroundings, drawn along contours.

    line_width    in 512ths of the picture's shorter side
    strength      brightness of the lines: higher draws fainter ones too
    """

    line_width: float = 0.7
    strength: float = 1.0

    def __post_init__(self) -> None:
        real("line_width", self.line_width, 0.25, 16)
        real("strength", self.strength, 0.01, 100)

    def draw(self, picture: Image.Image) -> Image.Image:
        import numpy as np

        from calotype.control.annotators.edges import lines

        small, unit = _at_scale(picture, self.line_width)
        found = lines(_levels(small), unit)
        # Bright where one place in twenty is; floors, or a flat picture's noise would be lines.
        bright = min(max(float(np.quantile(found, 0.95)), 0.012), 0.03)
        return _grey(np.tanh(np.maximum(found * self.strength / bright - 0.25, 0)), picture.size)


@dataclass(frozen=True, kw_only=True)
class SoftEdge(Annotator):
    """Soft edges, white on black, by slopes at several scales. Not the learned HED: that is `hed`.

    line_width    the finest scale, in 512ths of the picture's shorter side
    strength      brightness of the edges: higher shows fainter ones too
    """

    line_width: float = 1.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        real("line_width", self.line_width, 0.25, 16)
        real("strength", self.strength, 0.01, 100)

    def draw(self, picture: Image.Image) -> Image.Image:
        import numpy as np

        from calotype.control.annotators.edges import soft_edges

        small, unit = _at_scale(picture, self.line_width)
        found = soft_edges(_levels(small), unit)
        # Half white at the slope that one place in ten exceeds.
        half = max(float(np.quantile(found, 0.9)), 0.05) / self.strength
        return _grey(1 - np.reciprocal(1 + np.square(found * np.float32(1 / half))), picture.size)


@dataclass(frozen=True, kw_only=True)
class Tile(Annotator):
    """The picture itself, for networks that add detail to it.

    factor    how much smaller it is made, and then large again, to lose detail
    blur      a Gaussian after, its standard deviation in pixels
    """

    factor: float = 1
    blur: float = 0

    def __post_init__(self) -> None:
        real("factor", self.factor, 1, 64)
        real("blur", self.blur, 0, MOST_BLUR)

    def draw(self, picture: Image.Image) -> Image.Image:
        small = Size(*(max(1, round(side / self.factor)) for side in picture.size))
        lesser = picture.resize((small.width, small.height), Image.Resampling.BOX)
        return _softened(lesser.resize(picture.size, Image.Resampling.BICUBIC), self.blur)


@dataclass(frozen=True, kw_only=True)
class Blur(Annotator):
    """The picture under a Gaussian.

    blur    its standard deviation in pixels
    """

    blur: float = 8

    def __post_init__(self) -> None:
        real("blur", self.blur, 0, MOST_BLUR)

    def draw(self, picture: Image.Image) -> Image.Image:
        return _softened(picture, self.blur)


@dataclass(frozen=True, kw_only=True)
class Color(Annotator):
    """The colours alone: a mosaic of the mean in each cell.

    cell    its side in pixels; where sides are no multiples of it, the nearest that divides them evenly
    """

    cell: int = 64

    def __post_init__(self) -> None:
        whole("cell", self.cell, 1, 1024)

    def draw(self, picture: Image.Image) -> Image.Image:
        width, height = (max(1, round(side / self.cell)) for side in picture.size)
        return picture.resize((width, height), Image.Resampling.BOX).resize(picture.size, Image.Resampling.NEAREST)


@dataclass(frozen=True, kw_only=True)
class Gray(Annotator):
    """The picture without its colours, by ITU-R 601 luma."""

    def draw(self, picture: Image.Image) -> Image.Image:
        return picture.convert("L").convert("RGB")


@dataclass(frozen=True, kw_only=True)
class Invert(Annotator):
    """The negative: a drawing in black on white becomes white on black, as networks for lines want it."""

    def draw(self, picture: Image.Image) -> Image.Image:
        return ImageOps.invert(picture)


@dataclass(frozen=True, kw_only=True)
class Ready(Annotator):
    """A picture that is ready to lead by: only its size is changed."""

    def draw(self, picture: Image.Image) -> Image.Image:
        return picture


@dataclass(frozen=True, kw_only=True)
class Depth(Annotator):
    """How near things are, white the nearest, by a learned model (extra `depth`).

    weights    a depth-estimation model that transformers runs, by hub id or folder; nearer must be higher in it
    device     where it runs
    """

    weights: str = "depth-anything/Depth-Anything-V2-Small-hf"
    device: str = "cpu"

    def __post_init__(self) -> None:
        text("weights", self.weights)
        text("device", self.device)

    def draw(self, picture: Image.Image) -> Image.Image:
        return learned.depth(picture, self.weights, self.device)


@dataclass(frozen=True, kw_only=True)
class Learned(Annotator):
    """A detector of controlnet-aux (extra `annotators`).

    resolution    the shorter side at which it looks, in pixels, in steps of 64
    weights       where its weights are, by hub id or folder
    device        where it runs
    """

    resolution: int = 512
    weights: str = "lllyasviel/Annotators"
    device: str = "cpu"

    def __post_init__(self) -> None:
        whole("resolution", self.resolution, 64, 4096)
        if self.resolution % 64:
            raise RequestError("resolution", self.resolution, "a multiple of 64")
        text("weights", self.weights)
        text("device", self.device)

    def _detect(self, kind: str, name: str, picture: Image.Image, **options: Any) -> Image.Image:
        return learned.detect(kind, name, picture, self.resolution, self.weights, self.device, **options)


@dataclass(frozen=True, kw_only=True)
class OpenPose(Learned):
    """People's poses as coloured stick figures on black, learned (extra `annotators`).

    hands    draw hands too
    face     draw faces too
    """

    hands: bool = False
    face: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        flag("hands", self.hands)
        flag("face", self.face)

    def draw(self, picture: Image.Image) -> Image.Image:
        return self._detect("openpose", "OpenposeDetector", picture, include_hand=self.hands, include_face=self.face)


@dataclass(frozen=True, kw_only=True)
class Normal(Learned):
    """Which way surfaces face, as colours, by the learned BAE (extra `annotators`)."""

    def draw(self, picture: Image.Image) -> Image.Image:
        return self._detect("normal", "NormalBaeDetector", picture)


@dataclass(frozen=True, kw_only=True)
class Hed(Learned):
    """Soft edges, white on black, by the learned HED (extra `annotators`)."""

    def draw(self, picture: Image.Image) -> Image.Image:
        return self._detect("hed", "HEDdetector", picture)


@dataclass(frozen=True, kw_only=True)
class Mlsd(Learned):
    """Straight lines, white on black, by the learned M-LSD (extra `annotators`)."""

    def draw(self, picture: Image.Image) -> Image.Image:
        return self._detect("mlsd", "MLSDdetector", picture)


@dataclass(frozen=True, kw_only=True)
class LineartLearned(Learned):
    """A line drawing, white on black, by the network that ControlNet 1.1 was trained with (extra `annotators`).

    coarse    fewer lines, as its second set of weights draws them
    """

    coarse: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        flag("coarse", self.coarse)

    def draw(self, picture: Image.Image) -> Image.Image:
        return self._detect("lineart_learned", "LineartDetector", picture, coarse=self.coarse)


@dataclass(frozen=True, kw_only=True)
class LineartAnime(Learned):
    """A line drawing of drawn figures, white on black, learned (extra `annotators`)."""

    def draw(self, picture: Image.Image) -> Image.Image:
        return self._detect("lineart_anime", "LineartAnimeDetector", picture)


ANNOTATORS: Mapping[str, type[Annotator]] = MappingProxyType(
    {
        "canny": Canny,
        "lineart": Lineart,
        "softedge": SoftEdge,
        "tile": Tile,
        "blur": Blur,
        "color": Color,
        "gray": Gray,
        "invert": Invert,
        "none": Ready,
        "depth": Depth,
        "openpose": OpenPose,
        "normal": Normal,
        "hed": Hed,
        "mlsd": Mlsd,
        "lineart_learned": LineartLearned,
        "lineart_anime": LineartAnime,
    }
)


def drawn_by(control: Control, device: str = "cpu") -> Annotator | None:
    """The annotator of a control, on this device if it is learned and nothing else is said; None for a ready picture.

    Raises RequestError, naming a field of the control, for a kind or a setting that is not known, or a wrong value.
    """
    settings: dict[str, object] = dict(control.settings or {})
    if control.ready:
        if settings:
            raise RequestError("settings", settings, f"None: a picture of the kind {control.kind} is not drawn anew")
        return None
    if "device" in settings_of(control.kind):
        settings = {"device": device, **settings}
    try:
        return annotator(control.kind, **settings)
    except RequestError as error:
        if control.kind not in ANNOTATORS:
            raise
        raise RequestError(f"settings.{error.field}", error.value, error.allowed) from None


def settings_of(kind: str) -> tuple[str, ...]:
    """The names of a kind's settings; none of a kind that is not known."""
    made: Any = ANNOTATORS.get(kind, Ready)
    return tuple(field.name for field in fields(made))


def check(request: Request) -> None:
    """Refuse controls that cannot be drawn, before anything is loaded: RequestError, as of `drawn_by`."""
    for field, control in request.all_controls().items():
        try:
            drawn_by(control)
        except RequestError as error:
            raise RequestError(f"{field}.{error.field}", error.value, error.allowed) from None


def annotator(kind: str, /, **settings: object) -> Annotator:
    """The annotator of this kind. Raises RequestError for a kind or a setting that is not known, or a wrong value."""
    if kind not in ANNOTATORS:
        raise RequestError("kind", kind, f"one of {', '.join(ANNOTATORS)}")
    made: Any = ANNOTATORS[kind]
    known = settings_of(kind)
    for name, value in settings.items():
        if name not in known:
            raise RequestError(name, value, f"for {kind}, {', '.join(known) or 'no setting'}")
    return made(**settings)


def annotate(kind: str, picture: Image.Image, size: Size | None = None, **settings: object) -> Image.Image:
    """The picture to lead by, RGB, of `size` (by default the picture's own), always the same for the same picture.

    The picture is turned as its camera was held, put on white where it is clear, and resized before anything is drawn,
    so that lines are as fine as the size allows. `settings` are the fields of `ANNOTATORS[kind]`. Raises RequestError
    naming what is not known or not allowed, or the extra that a learned kind needs.
    """
    drawing = annotator(kind, **settings)
    if size is not None:
        whole("width", size.width, 1, MAX_SIDE)
        whole("height", size.height, 1, MAX_SIDE)
    source = input_picture(picture)
    return drawing.draw(resized(source, size or Size(*source.size)))


def _softened(picture: Image.Image, spread: float) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(spread)) if spread else picture


def _levels(picture: Image.Image) -> Floats:
    import numpy as np

    return np.asarray(picture, dtype=np.float32) * np.float32(1 / 255)


def _at_scale(picture: Image.Image, line_width: float) -> tuple[Image.Image, float]:
    """The picture, made smaller where lines are wider than a pixel, and how many pixels wide they are in it.

    So work does not grow with the size, and what is found is the same at every size.
    """
    unit = line_width * min(picture.size) / 512
    if unit <= 1:
        return picture, max(0.5, unit)
    width, height = (max(1, round(side / unit)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS), 1


def _grey(levels: Floats, size: tuple[int, int]) -> Image.Image:
    """h w in 0..1 -> RGB of this size."""
    import numpy as np

    grey = Image.fromarray(np.rint(np.clip(levels, 0, 1) * 255).astype(np.uint8))
    return grey.resize(size, Image.Resampling.BICUBIC).convert("RGB")
