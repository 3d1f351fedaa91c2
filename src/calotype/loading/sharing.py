"""Encoders that several models have in common, in one process: held once, and asked once.

T5-XXL is the same in FLUX.1 and SD3, CLIP-L in four families. What is the same is told by content, not by where it
lies: two files, or a file and a folder, may hold it.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import nn

from calotype.checkpoint.entries import Entry
from calotype.checkpoint.files import Weights
from calotype.generate import PromptCache
from calotype.memory.layers import Maker
from calotype.memory.pages import Mapping as MappedFile

SAMPLE = 4096  # bytes, at the beginning, in the middle and at the end of every tensor

PROMPTS: PromptCache[object] = PromptCache(64)
"""What prompts became, of all models whose encoders are known by content."""


class Stamp(NamedTuple):
    """A file as it was when an encoder was read from it."""

    path: Path
    inode: int
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        found = path.stat()
        return cls(path, found.st_ino, found.st_size, found.st_mtime_ns)

    def overwritten(self) -> bool:
        """Whether the very file has been written to since, so that views of it are no longer what they were.

        One that was deleted, or replaced by another, is still there for those who had mapped it.
        """
        try:
            now = Stamp.of(self.path)
        except OSError:
            return False
        return now.inode == self.inode and now != self


_held: WeakValueDictionary[Hashable, nn.Module] = WeakValueDictionary()
_rest: WeakKeyDictionary[nn.Module, tuple[Mapping[str, Maker], tuple[MappedFile, ...], tuple[Stamp, ...]]] = (
    WeakKeyDictionary()
)


def fingerprint(weights: Weights, names: Mapping[str, str]) -> str:
    """What tells an encoder's content: names, shapes and types of its tensors, and samples of the values of each.

    `names` are its layout's keys, each with the one that the file has.

    Training changes every value of a tensor that it changes at all, so samples tell models apart that were trained
    apart. They do not guard against a file that was made to deceive.
    """
    digest = hashlib.blake2b(digest_size=16)
    for key, name in sorted(names.items()):
        entry = weights[name]
        digest.update(f"{key} {entry.stored} {entry.shape} {entry.strides}\n".encode())
        for part in (entry,) if entry.scale is None else (entry, entry.scale):
            for sample in _samples(part):
                digest.update(sample)
    return digest.hexdigest()


def _samples(entry: Entry) -> tuple[bytes, ...]:
    size = entry.stop - entry.start
    starts = sorted({0, max(size // 2 - SAMPLE // 2, 0), max(size - SAMPLE, 0)})
    file = entry.file.mapping
    return tuple(file[entry.start + start : min(entry.start + start + SAMPLE, entry.stop)] for start in starts)


def digest_of(*things: object) -> str:
    """What tells the content of tokenizers and settings."""
    return hashlib.blake2b(pickle.dumps(things), digest_size=16).hexdigest()


class Built(NamedTuple):
    """A network, what reads those of its weights that are on meta, and the files that others are views of."""

    network: nn.Module
    makers: Mapping[str, Maker]
    files: tuple[MappedFile, ...]


def shared(key: Hashable, paths: Iterable[Path], build: Callable[[], Built]) -> Built:
    """The encoder that another model holds under this key, or a new one, held for as long as any model has it.

    `paths` are the files that it is built from. One whose files were written to is not given on.
    """
    network = _held.get(key)
    if network is not None:
        makers, files, stamps = _rest[network]
        if not any(stamp.overwritten() for stamp in stamps):
            return Built(network, makers, files)
    stamps = tuple(Stamp.of(path) for path in paths)
    built = build()
    _held[key] = built.network
    _rest[built.network] = (built.makers, built.files, stamps)
    return built
