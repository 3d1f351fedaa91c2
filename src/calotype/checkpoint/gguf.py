"""GGUF files: headers read strictly, tensors as their blocks lie there.

The format is ggml's (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3: magic, counts, keys
with values, a name, shape, type and offset for each tensor, then the data, aligned. A file comes from strangers: every
count and length is bounded before anything is read by it, and the data must lie one tensor after the other, as ggml
itself demands.

Image models keep their original tensors' names; what city96's converter reshaped into rows of 256, so that blocks fit,
has its shape under the key comfy.gguf.orig_shape.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import torch

from calotype.checkpoint.entries import DTYPES, KEY, MAX_SIDE, MAX_TENSORS, Entry, Shape, TensorFile
from calotype.errors import DamagedFile, UnsupportedModel
from calotype.nn.formats import FORMATS

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER = 32 * 2**20  # bytes; a vocabulary of 256,000 words takes 8 MB
MAX_KEYS = 2**16
MAX_KEY = 1024  # bytes
MAX_ITEMS = 2**20  # in a list
MAX_DIMENSIONS = 4  # ggml's own limit
MAX_TEXT = 4096  # bytes of a text that is kept; longer ones are passed over
MAX_ALIGNMENT = 2**16
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."

# Types of values: how struct names them. 8 is text, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9

# Types of tensors by their number: ggml's enumeration.
TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    30: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}


class Told(NamedTuple):
    """What the header says of a tensor; `shape` is ours, the last side the one whose values lie together."""

    key: str
    shape: Shape
    type: str
    offset: int


class GgufFile(TensorFile):
    """One GGUF file. Raises DamagedFile, or UnsupportedModel for what is sound and not read here."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._size = path.stat().st_size
        with path.open("rb") as file:
            self._file = file
            try:
                self._read()
            finally:
                del self._file

    _file: BinaryIO

    def _read(self) -> None:
        if self._take(4) != MAGIC:
            self._damaged("it does not begin with GGUF")
        version = self._number("I")
        if version not in VERSIONS:
            if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
                raise UnsupportedModel(f"{self.path}: a GGUF file of a big-endian machine, which is not supported")
            raise UnsupportedModel(f"{self.path}: GGUF version {version} is not supported; versions 2 and 3 are")
        tensors, keys = self._count("tensors", MAX_TENSORS), self._count("keys", MAX_KEYS)
        values = self._values(keys)
        told = [self._told() for _ in range(tensors)]
        alignment = values.get("general.alignment", 32)
        sound = type(alignment) is int and 0 < alignment <= MAX_ALIGNMENT and not alignment & (alignment - 1)
        if not sound:
            self._damaged(f"its alignment is {alignment!r}, which is no power of two up to {MAX_ALIGNMENT:,}")
        start = -(-self._file.tell() // alignment) * alignment
        self._place(told, start, alignment, values)
        self.metadata = {key: value for key, value in values.items() if isinstance(value, str)}

    def _damaged(self, what: str) -> NoReturn:
        raise DamagedFile(f"{self.path}: {what}; the file is not sound, fetch it again")

    # Pieces of the header

    def _take(self, count: int) -> bytes:
        at = self._file.tell()
        if at + count > self._size:
            raise DamagedFile(
                f"{self.path}: cut short within its header: {self._size:,} bytes are present, {at + count:,} or more "
                "were expected; fetch it again"
            )
        if at + count > MAX_HEADER:
            self._damaged(f"its header is longer than {MAX_HEADER:,} bytes")
        return self._file.read(count)

    def _skip(self, count: int) -> None:
        """Pass over so many bytes, which must be there."""
        at = self._file.tell()
        if at + count > min(self._size, MAX_HEADER):
            self._take(count)  # says why not
        self._file.seek(count, 1)

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))
        return value

    def _count(self, what: str, most: int) -> int:
        count = self._number("Q")
        if count > most:
            self._damaged(f"it claims {count:,} {what}, and at most {most:,} are accepted")
        return count

    def _name(self, what: str) -> str:
        length = self._number("Q")
        if not 0 < length <= MAX_KEY:
            self._damaged(f"the name of a {what} has {length:,} bytes")
        return self._decoded(self._take(length), f"the name of a {what}")

    def _decoded(self, text: bytes, what: str) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError:
            self._damaged(f"{what} is no text")

    def _values(self, count: int) -> dict[str, Any]:
        """Keys and what they stand for; None for what nothing here needs."""
        values: dict[str, Any] = {}
        for _ in range(count):
            key = self._name("key")
            if key in values:
                self._damaged(f"it has the key {key[:80]!r} twice")
            values[key] = self._value(key, self._number("I"))
        return values

    def _value(self, key: str, kind: int) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == TEXT:
            length = self._number("Q")
            if length > MAX_TEXT:
                self._skip(length)
                return None
            return self._decoded(self._take(length), f"the value of {key[:80]!r}")
        if kind != ARRAY:
            self._damaged(f"{key[:80]!r} has a value of the unknown type {kind}")
        inner = self._number("I")
        count = self._count(f"items of {key[:80]!r}", MAX_ITEMS)
        if inner == TEXT:
            for _ in range(count):
                self._skip(self._number("Q"))
            return None
        if inner not in SCALARS:
            self._damaged(f"{key[:80]!r} has a list of the type {inner}, which is none that lists hold")
        code = f"<{count}{SCALARS[inner]}"
        if not key.startswith(ORIGINAL_SHAPE):
            self._skip(struct.calcsize(code))
            return None
        return struct.unpack(code, self._take(struct.calcsize(code)))

    def _told(self) -> Told:
        key = self._name("tensor")
        if not KEY.fullmatch(key):
            self._damaged(f"{key[:80]!r} is not an acceptable name of a tensor")
        dimensions = self._number("I")
        if dimensions > MAX_DIMENSIONS:
            self._damaged(f"{key!r} has {dimensions:,} dimensions; at most {MAX_DIMENSIONS} are accepted")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        if not all(0 < side <= MAX_SIDE for side in shape):
            self._damaged(f"{key!r} has the impossible shape {shape}")
        number = self._number("I")
        if number not in TYPES:
            raise UnsupportedModel(f"{self.path}: {key!r} is stored in ggml's type number {number}, which is not known")
        name = TYPES[number]
        if name not in FORMATS and name not in DTYPES:
            known = ", ".join(kind for kind in TYPES.values() if kind in FORMATS)
            raise UnsupportedModel(f"{self.path}: {key!r} is stored as {name}, which is not supported; known: {known}")
        return Told(key, shape, name, self._number("Q"))

    # Where the tensors are

    def _place(self, told: list[Told], start: int, alignment: int, values: dict[str, Any]) -> None:
        end = start
        for item in sorted(told, key=lambda item: item.offset):
            if item.key in self.entries:
                self._damaged(f"it names {item.key!r} twice")
            size = self._bytes(item)
            if start + item.offset != end:
                what = "overlaps the tensor before it" if start + item.offset < end else "leaves a hole before it"
                self._damaged(f"the place of {item.key!r} {what}")
            shape = self._shape(item, values.get(ORIGINAL_SHAPE + item.key))
            plain = item.type in DTYPES
            dtype = DTYPES[item.type] if plain else torch.float32
            kept = None if plain else item.type
            self.entries[item.key] = Entry(self, item.key, dtype, shape, end, end + size, format=kept)
            end = -(-(end + size) // alignment) * alignment
        last = max((entry.stop for entry in self.entries.values()), default=start)
        if last > self._size:
            raise DamagedFile(
                f"{self.path}: cut short: {self._size:,} bytes are present, {last:,} were expected; fetch it again"
            )
        if self._size > max(end, start):
            self._damaged(f"{self._size - end:,} bytes after its last tensor belong to nothing")

    def _bytes(self, item: Told) -> int:
        count = math.prod(item.shape)
        if item.type in DTYPES:
            return count * DTYPES[item.type].itemsize
        form = FORMATS[item.type]
        if not item.shape or item.shape[-1] % form.weights:
            self._damaged(f"{item.key!r} has rows that are no whole blocks of {item.type}: its shape is {item.shape}")
        return count // form.weights * form.bytes

    def _shape(self, item: Told, original: object) -> Shape:
        if original is None:
            # ggml drops sides of 1 in front, and this is the one tensor of our models that has one.
            table = item.key.rsplit(".", 1)[-1] == "pos_embed" and len(item.shape) == 2
            return (1, *item.shape) if table else item.shape
        sides: tuple[Any, ...] = original if isinstance(original, tuple) else ()
        if not all(type(side) is int and side > 0 for side in sides) or math.prod(sides) != math.prod(item.shape):
            self._damaged(f"{item.key!r} of the shape {item.shape} cannot have had the shape {original!r}")
        return sides
