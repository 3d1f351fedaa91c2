"""What every file of tensors comes to, whatever its format: names, and the place of each tensor's bytes."""

from __future__ import annotations

import mmap
import re
import sys
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

MAX_HEADER = 16 * 2**20  # bytes; FLUX.1 needs 0.1 MB, a Stable Diffusion 1.x pickle with optimizer states 0.6 MB
MAX_TENSORS = 200_000
MAX_SIDE = 2**31
KEY = re.compile(r"(?!.*(?:^|\.)__\w*__(?:\.|$))[\w.\-/:+<> ]{1,512}(?:\.\*)?", re.ASCII)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Shape = tuple[int, ...]


class Entry(NamedTuple):
    """One tensor's place: bytes `start` to `stop` of `file`.

    With `strides` (in elements) its values do not lie packed in order: they are scattered from `start` on, and
    `stop - start` is only how many bytes they take.

    With a `format` (one of `calotype.nn.formats`) the bytes are its blocks, and with a `scale` the values in them are
    yet to be multiplied by that tensor's, one number or one a row; `dtype` is then float32, which holds what comes of
    it.
    """

    file: TensorFile
    key: str
    dtype: torch.dtype
    shape: Shape
    start: int
    stop: int
    strides: Shape | None = None
    format: str | None = None
    scale: Entry | None = None

    @property
    def stored(self) -> str:
        """How its values lie in the file: the name of a type or format."""
        return self.format or NAMES[self.dtype]


class TensorFile:
    """A file whose header was read; its data is opened when the first tensor is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}

    @cached_property
    def mapping(self) -> mmap.mmap:
        """The file as private memory: pages come from disk when touched, changes stay in this process."""
        with self.path.open("rb") as file:
            if sys.platform == "linux":
                # MAP_NORESERVE (0x4000): a file larger than the free memory may be mapped too.
                protection = mmap.PROT_READ | mmap.PROT_WRITE
                return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | 0x4000, prot=protection)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
