"""Safetensors files: headers read strictly, tensors mapped from disk or read straight into their place.

A header is checked whole before anything else happens (its size, the number of tensors, their names, types and
places), because a checkpoint comes from strangers. Tensors are views of a private mapping: nothing is copied, and a
write to one never reaches the file.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calotype.errors import DamagedFile, SourceNotFound, UnsafeFile, UnsupportedModel

MAX_HEADER = 16 * 2**20  # bytes; FLUX.1 needs 0.1 MB
MAX_TENSORS = 200_000
MAX_SIDE = 2**31
KEY = re.compile(r"(?!.*(?:^|\.)__\w*__(?:\.|$))[\w.\-/:+<> ]{1,512}", re.ASCII)
PICKLE_SUFFIXES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl"})
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
    """One tensor's place: bytes `start` to `stop` of `file`."""

    file: SafetensorsFile
    key: str
    dtype: torch.dtype
    shape: Shape
    start: int
    stop: int


class SafetensorsFile:
    """One file's header; its data is opened when the first tensor is asked for.

    Raises SourceNotFound, UnsafeFile (a pickle), UnsupportedModel (another known format) or DamagedFile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        if not path.is_file():
            raise SourceNotFound(f"{path}: no such file")
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(9)
            _refuse_other_formats(path, start)
            if len(start) < 9:
                raise DamagedFile(f"{path}: {size} bytes, too short for a safetensors file; fetch it again")
            length = int.from_bytes(start[:8], "little")
            if start[8:] != b"{":
                raise DamagedFile(f"{path}: not a safetensors file (its header does not begin with '{{')")
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

    @cached_property
    def mapping(self) -> mmap.mmap:
        """The file as private memory: pages come from disk when touched, changes stay in this process."""
        with self.path.open("rb") as file:
            if sys.platform == "linux":
                # MAP_NORESERVE (0x4000): a file larger than the free memory may be mapped too.
                protection = mmap.PROT_READ | mmap.PROT_WRITE
                return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | 0x4000, prot=protection)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _refuse_other_formats(path: Path, start: bytes) -> None:
    if start[8:] == b"{":
        return  # The length of a safetensors header may look like a pickle's first bytes.
    zipped = start.startswith(b"PK\x03\x04")
    pickled = start[:1] == b"\x80" and start[1:2] in {b"\x02", b"\x03", b"\x04", b"\x05"}
    if zipped or pickled or path.suffix.lower() in PICKLE_SUFFIXES:
        raise UnsafeFile(
            f"{path}: a pickle{' in a zip archive' if zipped else ''}, which can run code when read; only safetensors "
            "files are accepted: look for a .safetensors file of the same model"
        )
    if start.startswith(b"GGUF"):
        raise UnsupportedModel(f"{path}: a GGUF file (quantised weights), not supported yet; take the safetensors file")


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
            for key, entry in SafetensorsFile(path).entries.items():
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
        """The tensor as a view of the file: no copy, pages are read when touched."""
        entry = self._entries[key]
        count = math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
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
        target = out if out.dtype == entry.dtype else torch.empty(out.shape, dtype=entry.dtype)
        view = target.reshape(-1).view(torch.uint8).numpy().data
        row_bytes = (entry.stop - entry.start) // entry.shape[0] if entry.shape else 0
        with entry.file.path.open("rb", buffering=0) as file:
            file.seek(entry.start + row * row_bytes)
            while view:
                count = file.readinto(view)
                if not count:
                    raise DamagedFile(f"{entry.file.path}: ended within {entry.key!r}; was it changed while loading?")
                view = view[count:]
        if target is not out:
            out.copy_(target)
