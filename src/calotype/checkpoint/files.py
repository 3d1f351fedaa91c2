"""Files of tensors: headers read strictly, tensors mapped from disk or read straight into their place.

What a file is shows in its content, not in its name: safetensors here, what torch.save wrote in `pickles`, GGUF in
`gguf`. A header is
checked whole before anything else happens (its size, the number of tensors, their names, types and places), because a
checkpoint comes from strangers. Tensors are views of a private mapping: nothing is copied, and a write to one never
reaches the file.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calotype.checkpoint.entries import (
    DTYPES,
    KEY,
    MAX_HEADER,
    MAX_SIDE,
    MAX_TENSORS,
    NAMES,
    Entry,
    Shape,
    TensorFile,
)
from calotype.checkpoint.gguf import MAGIC, GgufFile
from calotype.checkpoint.pickles import SUFFIXES as PICKLE_SUFFIXES
from calotype.checkpoint.pickles import TorchFile, looks_saved_by_torch
from calotype.errors import DamagedFile, SourceNotFound
from calotype.nn.formats import FORMATS
from calotype.nn.packed import Packed, Piece

__all__ = [
    "DTYPES",
    "MAX_HEADER",
    "MAX_TENSORS",
    "NAMES",
    "PICKLE_SUFFIXES",
    "Entry",
    "SafetensorsFile",
    "Shape",
    "TensorFile",
    "TorchFile",
    "Weights",
    "looks_saved_by_torch",
    "open_tensors",
]


def open_tensors(path: Path) -> TensorFile:
    """A file of tensors in any format that is read here, told by its first bytes.

    Raises SourceNotFound, UnsafeFile, UnsupportedModel or DamagedFile.
    """
    if not path.is_file():
        raise SourceNotFound(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(MAGIC):
        return GgufFile(path)
    # The length of a safetensors header may look like the first bytes of something else.
    sound = start[8:9] == b"{"
    other = None if sound else _something_else(path, start)
    if other is not None:
        raise DamagedFile(f"{path}: not a safetensors file, but {other}")
    if not sound and (looks_saved_by_torch(start) or path.suffix.lower() in PICKLE_SUFFIXES):
        return TorchFile(path)
    return SafetensorsFile(path)


# First bytes of what is given for a file of tensors by mistake.
OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer, which stands in a repository for the file itself; fetch that, by "
    "`git lfs pull` or from the model's page",
    b"<": "a page of a web site, saved in its place (a login, an error); fetch it again",
    b"\x89PNG": "a picture; give the model, and a picture as input_image",
    b"\xff\xd8\xff": "a picture; give the model, and a picture as input_image",
    b"RIFF": "a picture; give the model, and a picture as input_image",
    b"{": "JSON text; give the folder that it lies in, or the files of weights beside it",
    b"Rar!": "a packed archive; unpack it, and give what is in it",
    b"7z\xbc\xaf": "a packed archive; unpack it, and give what is in it",
    b"\x1f\x8b": "a packed archive; unpack it, and give what is in it",
    b"\x89HDF": "an HDF5 file, as Keras writes it; take the model's safetensors file",
    b"\x93NUMPY": "an array of numpy; take the model's safetensors file",
}
TEXT = bytes(range(32, 127)) + b"\t\r\n"
ENDINGS = {
    ".onnx": "an ONNX graph; take the model's safetensors file",
    ".engine": "a TensorRT engine; take the model's safetensors file",
    ".msgpack": "weights for Flax; take the model's safetensors file",
    ".tflite": "a TensorFlow Lite graph; take the model's safetensors file",
    ".mlmodel": "a Core ML model; take the model's safetensors file",
}


def _something_else(path: Path, start: bytes) -> str | None:
    """What a file is that begins so, and what to do; None where it may be tensors."""
    suffix = path.suffix.lower()
    begun = next((what for mark, what in OTHERS.items() if start.startswith(mark)), None) or ENDINGS.get(suffix)
    if begun is None and start and not start.strip(TEXT) and suffix not in PICKLE_SUFFIXES:
        return "text; give a file of weights: .safetensors, .ckpt, .pt, .pth or .bin"
    return begun


class SafetensorsFile(TensorFile):
    """One file in the format of safetensors. Raises SourceNotFound or DamagedFile."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if not path.is_file():
            raise SourceNotFound(f"{path}: no such file")
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(9)
            if len(start) < 9:
                raise DamagedFile(f"{path}: {size} bytes, too short for a safetensors file; fetch it again")
            length = int.from_bytes(start[:8], "little")
            if start[8:] != b"{":
                raise DamagedFile(
                    f"{path}: not a safetensors file (its header does not begin with '{{'); give one that is, or what "
                    "torch.save wrote: .ckpt, .pt, .pth or .bin"
                )
            if length > MAX_HEADER:
                raise DamagedFile(f"{path}: a header of {length:,} bytes; at most {MAX_HEADER:,} are accepted")
            if 8 + length > size:
                raise DamagedFile(
                    f"{path}: cut short within its header: {size:,} bytes are present, {8 + length:,} or more were "
                    "expected; fetch it again"
                )
            text = start[8:] + file.read(length - 1)
        self._parse(_json(path, text), data_start=8 + length, data_bytes=size - 8 - length)

    def _parse(self, header: dict[str, Any], data_start: int, data_bytes: int) -> None:
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
            raise DamagedFile(f"{self.path}: __metadata__ must be a map from text to text")
        self.metadata = metadata  # pyright: ignore[reportUnknownMemberType]
        if len(header) > MAX_TENSORS:
            raise DamagedFile(f"{self.path}: {len(header):,} tensors; at most {MAX_TENSORS:,} are accepted")
        for key, value in header.items():
            self.entries[key] = self._entry(key, value, data_start)
        end = data_start
        for entry in sorted(self.entries.values(), key=lambda entry: (entry.start, entry.stop)):
            if entry.start != end:
                what = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
                raise DamagedFile(f"{self.path}: the place of {entry.key!r} {what}; the file is not sound")
            end = entry.stop
        if end > data_start + data_bytes:
            raise DamagedFile(
                f"{self.path}: cut short: {data_start + data_bytes:,} bytes are present, {end:,} were expected; "
                "fetch it again"
            )
        if end < data_start + data_bytes:
            raise DamagedFile(
                f"{self.path}: {data_start + data_bytes - end:,} bytes after its last tensor belong to nothing"
            )

    def _entry(self, key: str, value: Any, data_start: int) -> Entry:  # noqa: ANN401
        if not KEY.fullmatch(key):
            raise DamagedFile(f"{self.path}: {key[:80]!r} is not an acceptable name of a tensor")
        try:
            dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise DamagedFile(f"{self.path}: {key!r} lacks dtype, shape or data_offsets") from None
        if dtype not in DTYPES:
            raise DamagedFile(f"{self.path}: {key!r} has the unknown type {dtype!r}; known: {', '.join(DTYPES)}")
        numbers = [*shape, start, stop] if isinstance(shape, list) else [None]
        if not all(type(number) is int and number >= 0 for number in numbers) or max(shape, default=0) > MAX_SIDE:
            raise DamagedFile(f"{self.path}: {key!r} has an impossible shape or place")
        if stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
            raise DamagedFile(
                f"{self.path}: {key!r} has {stop - start:,} bytes, but {dtype} {tuple(shape)} takes "
                f"{math.prod(shape) * DTYPES[dtype].itemsize:,}"
            )
        return Entry(self, key, DTYPES[dtype], tuple(shape), data_start + start, data_start + stop)


def _json(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise DamagedFile(f"{path}: its header names {twice[:80]!r} twice")
        return content

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise DamagedFile(f"{path}: its header is not valid JSON") from None
    assert isinstance(header, dict)  # it begins with a brace
    return header  # pyright: ignore[reportUnknownVariableType]


class Weights(Mapping[str, Entry]):
    """Tensors of one or several files, by key. Nothing is read until it is asked for.

    `source` is what the user gave, for messages. Keys may differ from those in the files (a prefix taken off).
    """

    def __init__(self, source: str, entries: Mapping[str, Entry]) -> None:
        self.source = source
        self._entries = dict(entries)

    @classmethod
    def of(cls, source: str, paths: Iterable[Path]) -> Weights:
        """All tensors of several files; a key that two of them have raises DamagedFile."""
        entries: dict[str, Entry] = {}
        for path in paths:
            for key, entry in open_tensors(path).entries.items():
                if key in entries:
                    raise DamagedFile(f"{path}: {key!r} is also in {entries[key].file.path.name}")
                entries[key] = entry
        return cls(source, entries)

    def __getitem__(self, key: str) -> Entry:
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def shapes(self) -> dict[str, Shape]:
        return {key: entry.shape for key, entry in self._entries.items()}

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(entry.file.path for entry in self._entries.values()))

    @property
    def metadata(self) -> dict[str, str]:
        """The free text of the files' headers, merged."""
        merged: dict[str, str] = {}
        for file in dict.fromkeys(entry.file for entry in self._entries.values()):
            merged.update(file.metadata)
        return merged

    def mapped(self, key: str) -> Tensor:
        """The tensor as a view of the file: pages are read when touched. A copy only where its values lie scattered,
        or in another format.
        """
        entry = self._entries[key]
        count = math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if entry.format is not None:
            out = torch.empty(entry.shape, dtype=entry.dtype)
            self.read(key, out)
            return out
        if entry.strides is not None:
            return self._gathered(entry)
        if entry.start % entry.dtype.itemsize:
            # Written without alignment: views would be slow, or fail on some processors.
            out = torch.empty(entry.shape, dtype=entry.dtype)
            self.read(key, out)
            return out
        flat = torch.frombuffer(entry.file.mapping, dtype=entry.dtype, count=count, offset=entry.start)
        return flat.view(entry.shape)

    def read(self, key: str, out: Tensor, row: int = 0) -> None:
        """Fill `out` with the tensor's rows from `row` on, by reading: no page of the mapping stays behind.

        `out` is contiguous and as wide as the tensor; another dtype is converted to.
        """
        entry = self._entries[key]
        if out.numel() == 0:
            return
        assert out.is_contiguous()
        first = row * math.prod(entry.shape[1:])
        if entry.format is not None:
            _widen(out.view(max(len(out), 1) if out.ndim else 1, -1), entry, row)
            return
        if entry.strides is not None:
            out.view(-1).copy_(self._gathered(entry).view(-1)[first : first + out.numel()])
            return
        start = entry.start + first * entry.dtype.itemsize
        if out.dtype == entry.dtype:
            _fill(out, entry, start)
            return
        # Some at a time, through pages of their own: the allocator's would leave holes between the weights.
        flat = out.view(-1)
        pages = mmap.mmap(-1, min(CHUNK, len(flat)) * entry.dtype.itemsize)
        buffer = torch.frombuffer(pages, dtype=entry.dtype)
        for done in range(0, len(flat), CHUNK):
            part = buffer[: len(flat) - done]
            _fill(part, entry, start + done * entry.dtype.itemsize)
            flat[done : done + CHUNK].copy_(part)

    def piece(self, key: str, row: int, rows: int, *, mapped: bool) -> Piece | None:
        """Some rows just as the file has them, for a layer that keeps them so; None where that cannot be.

        With `mapped` they are a view of the file, else read.
        """
        entry = self._entries[key]
        if entry.strides is not None or entry.stored not in FORMATS:
            return None
        weights = FORMATS[entry.stored].weights
        columns = math.prod(entry.shape[1:])
        if row * columns % weights or rows * columns % weights or not rows * columns:
            return None
        return _piece(entry, row, rows, mapped=mapped)

    def _gathered(self, entry: Entry) -> Tensor:
        """A tensor whose values lie scattered, put in order: a copy."""
        assert entry.strides is not None
        reach = 1 + sum((side - 1) * step for side, step in zip(entry.shape, entry.strides, strict=True))
        span = torch.empty(reach, dtype=entry.dtype)
        _fill(span, entry, entry.start)
        return span.as_strided(entry.shape, entry.strides).contiguous()


def _piece(entry: Entry, row: int, rows: int, *, mapped: bool) -> Piece:
    """Some rows of whole blocks."""
    form = FORMATS[entry.stored]
    columns = math.prod(entry.shape[1:])
    start = entry.start + row * columns // form.weights * form.bytes
    size = rows * columns // form.weights * form.bytes
    if mapped:
        values = torch.frombuffer(entry.file.mapping, dtype=torch.uint8, count=size, offset=start)
    else:
        values = torch.empty(size, dtype=torch.uint8)
        _fill(values, entry, start)
    scale = None
    if entry.scale is not None:
        own = torch.empty(math.prod(entry.scale.shape), dtype=entry.scale.dtype)
        _fill(own, entry.scale, entry.scale.start)
        scale = (own if len(own) == 1 else own[row : row + rows].clone()).float()
    return Piece(rows, entry.stored, values, scale)


def _widen(out: Tensor, entry: Entry, row: int) -> None:
    """Fill `out` (rows columns) with what blocks mean, from a row on, reading some of them at a time."""
    weights = FORMATS[entry.stored].weights
    height, columns = entry.shape[0] if entry.shape else 1, math.prod(entry.shape[1:])
    unit = weights // math.gcd(weights, columns)  # as many rows as are whole blocks
    step = max(unit, CHUNK // columns // unit * unit)
    for start in range(row - row % unit, row + len(out), step):
        rows = min(step, height - start)
        block = Packed((rows, columns), [_piece(entry, start, rows, mapped=False)], torch.float32).widen(0, rows)
        first = max(row - start, 0)
        last = min(row + len(out) - start, rows)
        out[start + first - row : start + last - row] = block[first:last]


CHUNK = 2**20  # weights


def _fill(target: Tensor, entry: Entry, start: int) -> None:
    """Read a contiguous tensor of the entry's type from byte `start` of its file."""
    view = target.reshape(-1).view(torch.uint8).numpy().data
    with entry.file.path.open("rb", buffering=0) as file:
        file.seek(start)
        while view:
            count = file.readinto(view)
            if not count:
                raise DamagedFile(f"{entry.file.path}: ended within {entry.key!r}; was it changed while loading?")
            view = view[count:]
