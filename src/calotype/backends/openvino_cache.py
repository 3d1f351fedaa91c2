"""Compiled graphs and what was measured of them, on disk.

Files are written aside and then renamed, so that none is ever seen half done; each ends with its length and checksum.
Where a file is damaged or cannot be written, the work is done again, with a warning.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import time
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from calotype.errors import RequestError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

LIMIT = "CALOTYPE_OPENVINO_CACHE"
GIB = 2**30
USUAL_LIMIT = 8.0  # GiB; Stable Diffusion 1.5 takes 0.8 for each size of picture, SDXL 2.5
END = struct.Struct("<8sQI")  # mark, length and checksum of what stands before
MARK = b"calotype"
PART = ".part"
ABANDONED = 24 * 3600  # seconds after which a half-written file is of nobody who still runs


def usual() -> Cache | None:
    """The cache that the environment asks for; None where that switches it off.

    It lies in `openvino` under CALOTYPE_HOME, and takes CALOTYPE_OPENVINO_CACHE GiB: 8 if that is not set, none if 0.
    """
    given = os.environ.get(LIMIT, "").strip()
    try:
        limit = float(given) if given else USUAL_LIMIT
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf"):
        raise RequestError(LIMIT, given, "the most GiB that compiled graphs may take on disk; 0 for no cache")
    if limit == 0:
        return None
    home = Path(os.environ.get("CALOTYPE_HOME", "~/.cache/calotype")).expanduser()
    return Cache(home / "openvino", int(limit * GIB))


class Cache:
    """Values by key, in a folder that takes at most `limit` bytes: what was not used for longest gives way."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def get(self, key: str) -> Bytes | None:
        """The value, mapped from its file; None where there is none that is whole."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                held = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # ValueError: nothing to map in an empty file
            self.drop(key, str(error))
            return None
        value = held[: -END.size]
        end = held[-END.size :].tobytes()
        if len(end) != END.size or END.unpack(end) != (MARK, len(value), zlib.crc32(value.data)):
            self.drop(key, "its checksum is another")
            return None
        return value

    def put(self, key: str, value: bytes | memoryview) -> None:
        """Keep a value. Where that fails, a warning says why."""
        if len(value) + END.size > self.limit:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(len(value) + END.size)
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=PART, delete=False) as file:
                try:
                    file.write(value)
                    file.write(END.pack(MARK, len(value), zlib.crc32(value)))
                    file.close()
                    os.replace(file.name, self._path(key))
                except BaseException:
                    file.close()
                    Path(file.name).unlink(missing_ok=True)
                    raise
        except OSError as error:
            warnings.warn(
                f"{self.folder}: a compiled graph could not be kept ({error}); it will be compiled again next time. "
                f"CALOTYPE_HOME can name another place, {LIMIT}=0 switches the cache off",
                RuntimeWarning,
                stacklevel=2,
            )

    def drop(self, key: str, why: str) -> None:
        """Let go of a value that turned out to be damaged."""
        path = self._path(key)
        warnings.warn(f"{path}: damaged ({why}); compiling again", RuntimeWarning, stacklevel=2)
        _remove(path)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.bin"

    def _make_room(self, wanted: int) -> None:
        used: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process was faster
                continue
            if path.suffix == PART and time.time() - stat.st_mtime > ABANDONED:
                _remove(path)
            elif path.suffix == ".bin":
                used.append((stat.st_mtime, stat.st_size, path))
        room = self.limit - wanted - sum(size for _, size, _ in used)
        for _, size, path in sorted(used):
            if room >= 0:
                break
            _remove(path)
            room += size


def _remove(path: Path) -> None:
    """Where another process has the file open, some systems refuse: it then stays for the next time."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
