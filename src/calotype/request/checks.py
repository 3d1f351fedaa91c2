"""What values may be. Each check raises RequestError naming the field, the value and what is allowed."""

from __future__ import annotations

import os

from calotype.errors import RequestError

MAX_PROMPT = 20_000
MAX_SIDE = 16_384
MAX_STEPS = 1_000
MAX_COUNT = 1_000
MAX_SEED = 2**63 - 1 - MAX_COUNT


def whole(field: str, value: object, low: int, high: int) -> None:
    """A whole number in these bounds."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(field, value, f"a whole number from {low:,} to {high:,}")


def real(field: str, value: object, low: float, high: float) -> None:
    """A finite number in these bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:  # NaN is neither
        raise RequestError(field, value, f"a finite number from {low:g} to {high:g}")


def text(field: str, value: object) -> None:
    """Text that tokenizers and files can hold."""
    if not isinstance(value, str):
        raise RequestError(field, value, "text")
    if len(value) > MAX_PROMPT:
        raise RequestError(field, value, f"at most {MAX_PROMPT:,} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        # What a terminal sends in another encoding: neither a tokenizer nor a file's metadata can hold it.
        raise RequestError(field, value, "text in valid Unicode") from None


def flag(field: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise RequestError(field, value, "True or False")


def picture(field: str, value: object) -> None:
    """A picture, or where one is."""
    if not isinstance(value, (str, os.PathLike)):
        from PIL import Image

        if not isinstance(value, Image.Image):
            raise RequestError(field, value, "a PIL image, or the path of a picture")
