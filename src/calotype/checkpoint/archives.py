"""Zip archives as torch.save writes them: where each stored file's bytes lie, without unpacking anything.

Nothing is ever inflated, so there is no bomb to defuse. The directory is read under limits, members may be neither
encrypted nor overlap nor leave the file, and names may not lead out of it.
Layout: APPNOTE.TXT 6.3.10 (PKWARE), sections 4.3 to 4.5.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

from calotype.errors import DamagedFile

MAX_MEMBERS = 50_000  # a file for each tensor, and a few more; Stable Diffusion 1.x has some 1,200
MAX_NAME = 1024  # bytes
MAX_COMMENT = 2**16 - 1
END = struct.Struct("<4s4H2IH")
LOCATOR = struct.Struct("<4sIQI")
END_64 = struct.Struct("<4sQ2H2I4Q")
MEMBER = struct.Struct("<4s6H3I5H2I")
LOCAL = struct.Struct("<4s5H3I2H")
ENCRYPTED = 1 | 1 << 6 | 1 << 13  # flags: traditional, strong, masked headers
ABSENT = 0xFFFFFFFF  # the number is in the extra field


class Member(NamedTuple):
    """A file within the archive: its first byte, how many follow, and whether they are stored as they are."""

    start: int
    size: int
    stored: bool


class _Record(NamedTuple):
    name: bytes
    header: int
    size: int
    method: int


def members(path: Path) -> dict[str, Member]:
    """Every member of an archive, by name. Raises DamagedFile."""
    with path.open("rb", buffering=0) as file:
        directory, start, count = _directory(path, file)
        found: dict[str, Member] = {}
        spans: list[tuple[int, int, str]] = []
        for record in _records(path, directory):
            name = _name(path, record.name)
            if name in found:
                raise DamagedFile(f"{path}: the archive holds {name[:80]!r} twice")
            if record.header > start:
                raise DamagedFile(f"{path}: {name[:80]!r} begins outside the archive; the file is not sound")
            found[name] = member = _placed(path, file, record, name)
            spans.append((record.header, member.start + member.size, name))
    if len(found) != count:
        raise DamagedFile(f"{path}: the archive's directory lists {len(found):,} files, not {count:,}")
    end = 0
    for first, last, name in sorted(spans):
        if first < end or last > start:
            raise DamagedFile(
                f"{path}: {name[:80]!r} overlaps what lies beside it in the archive; the file is not sound"
            )
        end = last
    return found


def _directory(path: Path, file: BinaryIO) -> tuple[bytes, int, int]:
    """The bytes of the central directory, where they begin, and how many files they list."""
    size = file.seek(0, 2)
    tail_start = max(size - END.size - MAX_COMMENT, 0)
    tail = _read(file, tail_start, size - tail_start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + END.size > len(tail):
        raise DamagedFile(
            f"{path}: the archive's directory is missing at its end: the file is cut short; fetch it again"
        )
    _, disk, first_disk, _, count, length, start, comment = END.unpack_from(tail, at)
    if at + END.size + comment != len(tail):
        raise DamagedFile(f"{path}: bytes after the archive's end belong to nothing")
    end = tail_start + at
    locator = _read(file, max(end - LOCATOR.size, 0), LOCATOR.size)
    if len(locator) == LOCATOR.size and locator.startswith(b"PK\x06\x07"):
        end = LOCATOR.unpack(locator)[2]
        record = _read(file, end, END_64.size) if end < size else b""
        if len(record) < END_64.size or not record.startswith(b"PK\x06\x06"):
            raise DamagedFile(f"{path}: the archive's directory is broken")
        _, _, _, _, disk, first_disk, _, count, length, start = END_64.unpack(record)
    if disk or first_disk:
        raise DamagedFile(f"{path}: one volume of an archive that is split over several files")
    if count > MAX_MEMBERS or length > count * (MEMBER.size + MAX_NAME):
        raise DamagedFile(f"{path}: an archive of {count:,} files; at most {MAX_MEMBERS:,} are accepted")
    if start + length > end:
        raise DamagedFile(f"{path}: the archive's directory does not fit into the file; fetch it again")
    return _read(file, start, length), start, count


def _records(path: Path, directory: bytes) -> list[_Record]:
    found: list[_Record] = []
    at = 0
    while at < len(directory):
        if len(directory) - at < MEMBER.size or directory[at : at + 4] != b"PK\x01\x02":
            raise DamagedFile(f"{path}: the archive's directory is broken")
        values = MEMBER.unpack_from(directory, at)
        flags, method, packed, size, name_length, extra_length, comment = (*values[3:5], *values[8:13])
        header = values[16]
        name = directory[at + MEMBER.size : at + MEMBER.size + name_length]
        extra = directory[at + MEMBER.size + name_length : at + MEMBER.size + name_length + extra_length]
        at += MEMBER.size + name_length + extra_length + comment
        if at > len(directory) or name_length > MAX_NAME:
            raise DamagedFile(f"{path}: the archive's directory is broken")
        shown = name[:80].decode(errors="replace")
        if flags & ENCRYPTED:
            raise DamagedFile(f"{path}: {shown!r} is encrypted; checkpoints are not")
        size, packed, header = _long(path, extra, size, packed, header)
        if not method and size != packed:
            raise DamagedFile(f"{path}: {shown!r} has two sizes, {size:,} and {packed:,} bytes")
        found.append(_Record(name, header, packed, method))
    return found


def _long(path: Path, extra: bytes, *numbers: int) -> list[int]:
    """The numbers, those that did not fit into 32 bits from the extra field (4.5.3)."""
    at, long = 0, b""
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            long = extra[at + 4 : at + 4 + length]
        at += 4 + length
    out: list[int] = []
    for number in numbers:
        if number == ABSENT:
            if len(long) < 8:
                raise DamagedFile(f"{path}: the archive's directory is broken")
            number, long = int.from_bytes(long[:8], "little"), long[8:]
        out.append(number)
    return out


def _name(path: Path, raw: bytes) -> str:
    name = raw.decode(errors="surrogateescape")
    if not name or name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
        raise DamagedFile(f"{path}: {name[:80]!r} is no acceptable name for a file of an archive")
    return name


def _placed(path: Path, file: BinaryIO, record: _Record, name: str) -> Member:
    """Where the member's bytes are; its own header may be longer than the directory says, for their alignment."""
    header = _read(file, record.header, LOCAL.size + len(record.name))
    if len(header) < LOCAL.size + len(record.name) or not header.startswith(b"PK\x03\x04"):
        raise DamagedFile(f"{path}: the archive has no {name[:80]!r} where its directory says")
    values = LOCAL.unpack_from(header)
    flags, method, name_length, extra_length = values[2], values[3], values[9], values[10]
    if (
        flags & ENCRYPTED
        or method != record.method
        or name_length != len(record.name)
        or header[LOCAL.size :] != record.name
    ):
        raise DamagedFile(f"{path}: the archive's directory and {name[:80]!r} contradict each other")
    return Member(record.header + LOCAL.size + name_length + extra_length, record.size, record.method == 0)


def _read(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)
