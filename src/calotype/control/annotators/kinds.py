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
from calotype.request import Size, resized
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

    line_width: float = 1.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        real("line_width", self.line_width, 0.25, 16)
        real("strength", self.strength, 0.01, 100)

    def draw(self, picture: Image.Image) -> Image.Image:
        import numpy as np

        from calotype.control.annotators.edges import lines

        found = lines(_levels(picture), _pixels(picture, self.line_width))
        return _grey(np.tanh(np.maximum(found * self.strength - 0.006, 0) * 40))


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

        found = soft_edges(_levels(picture), _pixels(picture, self.line_width)) * self.strength
        # Half white at the slope that one place in ten exceeds; a floor, or a flat picture's noise would be edges.
        half = max(float(np.quantile(found, 0.9)), 0.03)
        return _grey(found**2 / (found**2 + half**2))


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

    def _detect(self, name: str, picture: Image.Image, **options: Any) -> Image.Image:
        return learned.detect(name, picture, self.resolution, self.weights, self.device, **options)


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
        return self._detect("OpenposeDetector", picture, include_hand=self.hands, include_face=self.face)


@dataclass(frozen=True, kw_only=True)
class Normal(Learned):
    """Which way surfaces face, as colours, by the learned BAE (extra `annotators`)."""

    def draw(self, picture: Image.Image) -> Image.Image:
        return self._detect("NormalBaeDetector", picture)


@dataclass(frozen=True, kw_only=True)
class Hed(Learned):
    """Soft edges, white on black, by the learned HED (extra `annotators`)."""

    def draw(self, picture: Image.Image) -> Image.Image:
        return self._detect("HEDdetector", picture)


@dataclass(frozen=True, kw_only=True)
class Mlsd(Learned):
    """Straight lines, white on black, by the learned M-LSD (extra `annotators`)."""

    def draw(self, picture: Image.Image) -> Image.Image:
        return self._detect("MLSDdetector", picture)


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
        return self._detect("LineartDetector", picture, coarse=self.coarse)


@dataclass(frozen=True, kw_only=True)
class LineartAnime(Learned):
    """A line drawing of drawn figures, white on black, learned (extra `annotators`)."""

    def draw(self, picture: Image.Image) -> Image.Image:
        return self._detect("LineartAnimeDetector", picture)


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


def annotator(kind: str, **settings: object) -> Annotator:
    """The annotator of this kind. Raises RequestError for a kind or a setting that is not known, or a wrong value."""
    if kind not in ANNOTATORS:
        raise RequestError("kind", kind, f"one of {', '.join(ANNOTATORS)}")
    drawn_by: Any = ANNOTATORS[kind]
    known = [field.name for field in fields(drawn_by)]
    for name, value in settings.items():
        if name not in known:
            raise RequestError(name, value, f"for {kind}, {', '.join(known) or 'no setting'}")
    return drawn_by(**settings)


def annotate(kind: str, picture: Image.Image, size: Size | None = None, **settings: object) -> Image.Image:
    """The picture to lead by, RGB, of `size` (by default the picture's own), always the same for the same picture.

    The picture is turned as its camera was held, put on white where it is clear, and resized before anything is drawn,
    so that lines are as fine as the size allows. `settings` are the fields of `ANNOTATORS[kind]`. Raises RequestError
    naming what is not known or not allowed, or the extra that a learned kind needs.
    """
    drawn_by = annotator(kind, **settings)
    if size is not None:
        whole("width", size.width, 1, MAX_SIDE)
        whole("height", size.height, 1, MAX_SIDE)
    source = input_picture(picture)
    return drawn_by.draw(resized(source, size or Size(*source.size)))


def _softened(picture: Image.Image, spread: float) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(spread)) if spread else picture


def _levels(picture: Image.Image) -> Floats:
    import numpy as np

    return np.asarray(picture, dtype=np.float32) / np.float32(255)


def _pixels(picture: Image.Image, line_width: float) -> float:
    return max(0.5, line_width * min(picture.size) / 512)


def _grey(levels: Floats) -> Image.Image:
    """h w in 0..1 -> RGB."""
    import numpy as np

    return Image.fromarray(np.rint(np.clip(levels, 0, 1) * 255).astype(np.uint8)).convert("RGB")
