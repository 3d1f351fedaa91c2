"""Pickles and archives put together byte by byte, as no library would write them."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

NOTHING, EMPTY_DICT, EMPTY_LIST, FALSE = b"N", b"}", b"]", b"\x89"
MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
VERSION = b"\x80\x02M\xe9\x03."


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def together(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + together(*arguments) + b"R"


def table(items: Mapping[str, bytes]) -> bytes:
    return EMPTY_DICT + b"(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def stored(key: str = "0", count: int = 4, kind: str = "FloatStorage", *more: bytes) -> bytes:
    return together(text("storage"), name("torch", kind), text(key), text("cpu"), number(count), *more) + b"Q"


def tensor(
    storage: bytes, shape: tuple[int, ...] = (2, 2), strides: tuple[int, ...] = (2, 1), offset: int = 0
) -> bytes:
    sides, steps = together(*map(number, shape)), together(*map(number, strides))
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, storage, number(offset), sides, steps, FALSE, call(name("collections", "OrderedDict")))


def program(body: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


def archive(path: Path, content: bytes, storages: Mapping[str, bytes] | None = None, **more: bytes) -> Path:
    """A zip archive as torch.save lays it out."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", content)
        for key, data in ({"0": bytes(16)} if storages is None else storages).items():
            file.writestr(f"x/data/{key}", data)
        for key, data in more.items():
            file.writestr(f"x/{key}", data)
    return path


def legacy(path: Path, content: bytes, storages: Mapping[str, tuple[int, bytes]] | None = None) -> Path:
    """The older format: for each storage its number of elements, and its data."""
    storages = {"0": (4, bytes(16))} if storages is None else storages
    machine = program(table({"protocol_version": number(1001), "little_endian": b"\x88"}))
    keys = program(EMPTY_LIST + b"(" + b"".join(map(text, storages)) + b"e")
    data = b"".join(count.to_bytes(8, "little") + raw for count, raw in storages.values())
    path.write_bytes(MAGIC + VERSION + machine + content + keys + data)
    return path


def sparse_archive(path: Path, content: bytes, sizes: Mapping[str, int]) -> Path:
    """An archive of storages whose bytes are holes, written as far apart as they are large; in the 64-bit format."""
    directory = b""
    with path.open("wb") as file:
        for key, size in {"data.pkl": len(content), **{f"data/{key}": size for key, size in sizes.items()}}.items():
            raw, at = f"x/{key}".encode(), file.tell()
            padding = -(at + 30 + len(raw)) % 64
            local = (b"PK\x03\x04", 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, len(raw), padding)
            file.write(struct.pack("<4s5H3I2H", *local) + raw + bytes(padding))
            extra = struct.pack("<2H3Q", 1, 24, size, size, at)
            fields = (b"PK\x01\x02", 45, 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, len(raw), len(extra), 0, 0, 0, 0)
            directory += struct.pack("<4s6H3I5H2I", *fields, 2**32 - 1) + raw + extra
            file.write(content if key == "data.pkl" else b"")
            file.seek(at + 30 + len(raw) + padding + size)
        start, count = file.tell(), 1 + len(sizes)
        file.write(directory)
        end = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(directory), start)
        file.write(end + struct.pack("<4sIQI", b"PK\x06\x07", 0, start + len(directory), 1))
        file.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0))
    return path
