"""Pictures in requests: given as they are or by a path, named in plain values by a path or a fingerprint."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

from calotype.errors import RequestError
from calotype.request.checks import whole
from calotype.request.size import Size

if TYPE_CHECKING:
    from PIL import Image

    PictureSource = str | os.PathLike[str] | Image.Image

FINGERPRINT = "sha256:"  # before the hash of a picture that is known by it alone
_LANCZOS, _BILINEAR, _BOX = 1, 2, 4  # of PIL.Image.Resampling, without importing it


Extension = tuple[int, int, int, int]
"""Pixels to the left, at the top, to the right, at the bottom."""

MAX_EXTENSION = 8192


def extension(field: str, given: object) -> Extension:
    """Four whole numbers that are not all 0."""
    allowed = "four whole numbers of pixels, (left, top, right, bottom), not all 0"
    if not isinstance(given, (tuple, list)):
        raise RequestError(field, given, allowed)
    values: tuple[Any, ...] = tuple(given)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if len(values) != 4 or not any(values):
        raise RequestError(field, given, allowed)
    for value in values:
        whole(field, value, 0, MAX_EXTENSION)
    left, top, right, bottom = values
    return left, top, right, bottom


def extended_size(size: Size, by: Extension, grain: int) -> Size:
    """The size of an extended picture: a multiple of the grain, for which right and bottom grow if they must."""
    left, top, right, bottom = by
    width, height = size.width + left + right, size.height + top + bottom
    return Size(-(-width // grain) * grain, -(-height // grain) * grain)


def extended(
    picture: Image.Image, mask: Image.Image | None, by: Extension, size: Size
) -> tuple[Image.Image, Image.Image]:
    """A picture on its extended canvas, its edges drawn out to fill it, and the mask of what is to be drawn."""
    import numpy as np
    from PIL import Image

    left, top, _, _ = by
    margins = (
        (top, size.height - top - picture.height),
        (left, size.width - left - picture.width),
    )
    inside = np.zeros((picture.height, picture.width), np.uint8)
    if mask is not None:
        inside = np.asarray(resized_mask(mask, Size(*picture.size)))
    canvas = np.pad(np.asarray(picture.convert("RGB")), (*margins, (0, 0)), mode="edge")
    return Image.fromarray(canvas), Image.fromarray(np.pad(inside, margins, constant_values=255))


def softened(mask: Image.Image, pixels: int) -> Image.Image:
    """A grey mask whose edge goes from black to white over about so many pixels."""
    from PIL import ImageFilter

    mask = mask.convert("L")
    return mask.filter(ImageFilter.GaussianBlur(pixels / 2)) if pixels else mask


def resized(picture: Image.Image, size: Size) -> Image.Image:
    """A picture at a job's size."""
    wanted = (size.width, size.height)
    return picture if picture.size == wanted else picture.resize(wanted, _LANCZOS)


def resized_mask(mask: Image.Image, size: Size) -> Image.Image:
    """A mask at a job's size, grey: of a larger one the means, of a smaller one a straight way between its values.

    What is black or white with nothing else around it stays so: no filter that rings.
    """
    smaller = min(mask.width, size.width), min(mask.height, size.height)
    return mask.convert("L").resize(smaller, _BOX).resize((size.width, size.height), _BILINEAR)


def is_picture(value: object) -> bool:
    """Whether a value is a picture itself, and not only the path of one."""
    return hasattr(value, "tobytes") and hasattr(value, "convert")


def name_of(picture: PictureSource) -> str:
    """What a picture is called in plain values: its path, or its fingerprint."""
    return os.fspath(picture) if isinstance(picture, (str, os.PathLike)) else fingerprint(picture)


def fingerprint(picture: Image.Image) -> str:
    """The hash of what a picture shows, and how far, where it is clear in places."""
    shown = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    content = f"{shown.width}x{shown.height} ".encode() + shown.tobytes()
    return f"{FINGERPRINT}{hashlib.sha256(content).hexdigest()}"
