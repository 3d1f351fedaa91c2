"""Pages of mapped files: asked for before a layer needs them, given back to the system when it is done.

A tensor that is a view of a mapped file takes memory from the moment it is read. The system takes such pages back when
it runs out, but only then, and it counts them as this process's until that. Giving them back by hand bounds what a
model takes, whatever its size. What was given back is read again when it is touched: nothing is lost, as long as
nobody has written to it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from torch import Tensor

MADVISE = hasattr(mmap.mmap, "madvise")  # Linux, macOS, BSD


class Mapping(NamedTuple):
    """A mapped file and the address where it begins."""

    file: mmap.mmap
    start: int

    @classmethod
    def of(cls, file: mmap.mmap) -> Mapping:
        return cls(file, np.frombuffer(file, np.uint8).ctypes.data)


class Pages(NamedTuple):
    """Whole pages of a mapped file."""

    file: mmap.mmap
    start: int
    length: int

    def expect(self) -> None:
        """Tell the system that they are needed soon."""
        if MADVISE:
            self.file.madvise(mmap.MADV_WILLNEED, self.start, self.length)

    def drop(self) -> None:
        """Give them back. Whatever was written to them is lost."""
        if MADVISE:
            self.file.madvise(mmap.MADV_DONTNEED, self.start, self.length)


def pages_of(tensor: Tensor, mappings: Iterable[Mapping]) -> Pages | None:
    """The pages that a view of one of these files lies on; None for a tensor with memory of its own."""
    storage = tensor.untyped_storage()
    begin = storage.data_ptr() + int(tensor.storage_offset()) * tensor.element_size()
    for file, start in mappings:
        if start <= begin < start + len(file):
            first = (begin - start) // mmap.PAGESIZE * mmap.PAGESIZE
            return Pages(file, first, min(begin - start + tensor.nbytes, len(file)) - first)
    return None
