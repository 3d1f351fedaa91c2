"""GGUF files: what the gguf library writes is read as it reads it, and what is not sound is refused at once."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import pytest
import tiny_gguf
import torch
from gguf import GGUFReader

from calotype.checkpoint import gguf as reading
from calotype.checkpoint.files import Weights, open_tensors
from calotype.checkpoint.gguf import GgufFile
from calotype.errors import DamagedFile, LoadError, UnsupportedModel
from calotype.nn.formats import FORMATS
from calotype.nn.packed import Packed

BLOCKS = list(tiny_gguf.HALVES)


def every_format(path: Path) -> dict[str, torch.Tensor]:
    tensors = {f"{name.lower()}.weight": (name, torch.randn(24, 512) * 0.1) for name in BLOCKS}
    tensors |= {"norm.weight": ("F32", torch.randn(7)), "half.weight": ("F16", torch.randn(3, 5, 2, 2))}
    return tiny_gguf.write(path, tensors)


def test_what_the_library_wrote_is_read(tmp_path: Path) -> None:
    held = every_format(tmp_path / "x.gguf")
    weights = Weights.of("x", [tmp_path / "x.gguf"])
    assert weights.keys() == held.keys()
    assert weights.metadata["general.architecture"] == "flux"
    for key, wanted in held.items():
        assert weights[key].shape == wanted.shape
        assert torch.equal(weights.mapped(key).float(), wanted)
        out = torch.empty(wanted.shape)
        weights.read(key, out)
        assert torch.equal(out, wanted)
    assert weights["q4_k.weight"].stored == "Q4_K"
    assert weights["norm.weight"].stored == "F32"
    assert weights["half.weight"].dtype == torch.float16


def test_places_are_those_that_the_library_finds(tmp_path: Path) -> None:
    every_format(tmp_path / "x.gguf")
    mine = GgufFile(tmp_path / "x.gguf").entries
    for tensor in GGUFReader(tmp_path / "x.gguf").tensors:
        entry = mine[tensor.name]
        assert (entry.start, entry.stop - entry.start) == (tensor.data_offset, tensor.n_bytes)
        assert entry.stored == tensor.tensor_type.name


@pytest.mark.parametrize("name", BLOCKS)
def test_some_rows_can_be_read(name: str, tmp_path: Path) -> None:
    held = tiny_gguf.write(tmp_path / "x.gguf", {"x": (name, torch.randn(40, 256))})["x"]
    weights = Weights.of("x", [tmp_path / "x.gguf"])
    for start, rows in ((0, 1), (7, 20), (39, 1)):
        out = torch.empty(rows, 256, dtype=torch.bfloat16)
        weights.read("x", out, row=start)
        assert torch.equal(out, held[start : start + rows].bfloat16())


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_reshaped_tensors_have_their_shapes_again(name: str, tmp_path: Path) -> None:
    """Convolutions, and rows that are no whole blocks, as city96's converter writes them."""
    given = {"conv": (name, torch.randn(32, 16, 3, 3)), "narrow": (name, torch.randn(64, 40))}
    held = tiny_gguf.write(tmp_path / "x.gguf", given, reshaped=True)
    weights = Weights.of("x", [tmp_path / "x.gguf"])
    for key, (_, tensor) in given.items():
        assert weights[key].shape == tensor.shape
        assert torch.equal(weights.mapped(key), held[key])
    for start in (0, 1, 31, 50):  # blocks cross the borders of rows
        out = torch.empty(9, 40)
        weights.read("narrow", out, row=start)
        assert torch.equal(out, held["narrow"][start : start + 9])
    with_blocks = weights.piece("narrow", 0, 64, mapped=True)
    assert with_blocks is not None
    made = Packed((64, 40), [with_blocks], torch.float32)
    assert torch.equal(made.widen(3, 50), held["narrow"][3:50])


def test_pieces_are_views_of_the_file(tmp_path: Path) -> None:
    tiny_gguf.write(tmp_path / "x.gguf", {"x": ("Q8_0", torch.randn(64, 64))})
    weights = Weights.of("x", [tmp_path / "x.gguf"])
    entry = weights["x"]
    mapped = weights.piece("x", 16, 8, mapped=True)
    read = weights.piece("x", 16, 8, mapped=False)
    assert mapped is not None
    assert read is not None
    assert torch.equal(mapped.values, read.values)
    start = np.frombuffer(entry.file.mapping, np.uint8).ctypes.data
    assert mapped.values.data_ptr() == start + entry.start + 16 * 2 * 34


def test_tables_of_positions_have_their_first_side_again(tmp_path: Path) -> None:
    """ggml drops it, being 1."""
    tiny_gguf.write(tmp_path / "x.gguf", {"pos_embed": ("F32", torch.randn(9, 4))})
    assert GgufFile(tmp_path / "x.gguf").entries["pos_embed"].shape == (1, 9, 4)


def test_types_have_ggmls_numbers() -> None:
    assert {kind.value: kind.name for kind in gguf.GGMLQuantizationType}.items() <= reading.TYPES.items()


# Files that are not sound


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def many(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


class Told(NamedTuple):
    """A tensor of a header; sides as the file has them, the narrow one first."""

    name: str | bytes = "x"
    sides: tuple[int, ...] = (32, 2)
    kind: int = 8  # Q8_0: 34 bytes for 32
    offset: int = 0

    def bytes(self) -> bytes:
        sides = struct.pack(f"<I{len(self.sides)}Q", len(self.sides), *self.sides)
        return text(self.name) + sides + struct.pack("<IQ", self.kind, self.offset)


def made(
    path: Path,
    told: tuple[Told, ...] = (Told(),),
    keys: tuple[bytes, ...] = (),
    data: int = 68,
    *,
    counts: tuple[int, int] | None = None,
    version: int = 3,
    alignment: int = 32,
) -> Path:
    tensors, values = counts or (len(told), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, values)
    head += b"".join(keys) + b"".join(one.bytes() for one in told)
    path.write_bytes(head + bytes(-len(head) % alignment) + bytes(data))
    return path


def test_the_smallest_file_is_sound(tmp_path: Path) -> None:
    assert list(open_tensors(made(tmp_path / "x.gguf")).entries) == ["x"]
    assert list(open_tensors(made(tmp_path / "y.gguf", data=96)).entries) == ["x"]  # with the last padding
    assert list(open_tensors(made(tmp_path / "v2.gguf", version=2)).entries) == ["x"]
    none = made(tmp_path / "z.gguf", (), data=0)
    assert not open_tensors(none).entries


TWO = (Told("x", (32, 2), 8, 0), Told("y", (32, 1), 8, 96))
LONG = 2**62
UNSOUND = {
    "a claim of tensors": ({"counts": (2**60, 0)}, "claims 1,152,921,504,606,846,976 tensors"),
    "a claim of keys": ({"counts": (0, 2**60)}, "claims .* keys"),
    "more tensors than there are": ({"counts": (3, 0), "data": 0}, "cut short|name of a tensor has 0"),
    "more keys than there are": ({"counts": (1, 2)}, "cut short|name of a key"),
    "a long name of a key": ({"keys": (struct.pack("<Q", LONG) + b"x",)}, "name of a key has"),
    "no name of a key": ({"keys": (key("", 4, bytes(4)),)}, "name of a key has 0"),
    "a key twice": ({"keys": (key("a", 4, bytes(4)), key("a", 4, bytes(4)))}, "key 'a' twice"),
    "a key that is no text": ({"keys": (text(b"\xff\xfe") + struct.pack("<I", 0) + b"x",)}, "is no text"),
    "a long text": ({"keys": (key("a", 8, struct.pack("<Q", LONG)),)}, "cut short within its header"),
    "a value that is no text": ({"keys": (key("a", 8, text(b"\xff")),)}, "value of 'a' is no text"),
    "a value of no type": ({"keys": (key("a", 13, bytes(8)),)}, "unknown type 13"),
    "a long list": ({"keys": (key("a", 9, many(0, 2**50)),)}, "claims .* items of 'a'"),
    "a list longer than the file": ({"keys": (key("a", 9, many(10, 2**20)),)}, "cut short within its header"),
    "a list of long texts": ({"keys": (key("a", 9, many(8, 3, struct.pack("<Q", LONG))),)}, "cut short within"),
    "lists in a list": ({"keys": (key("a", 9, many(9, 1, many(0, 1, b"x"))),)}, "none that lists hold"),
    "a name of a tensor that is none": ({"told": (Told("../x\n"),)}, "not an acceptable name"),
    "a name with bytes of no text": ({"told": (Told(b"x\xff"),)}, "is no text"),
    "a long name of a tensor": ({"told": (Told("x" * 600),)}, "not an acceptable name"),
    "a longer name of a tensor": ({"told": (Told("x" * 2000),)}, "name of a tensor has 2,000"),
    "many dimensions": ({"told": (Told(sides=(32,) * 5),)}, "5 dimensions"),
    "a claim of dimensions": (
        {"told": (), "counts": (1, 0), "keys": (text("x") + struct.pack("<I", 2**31),)},
        "2,147,483,648 dimensions",
    ),
    "no width": ({"told": (Told(sides=(32, 0)),)}, "impossible shape"),
    "a great width": ({"told": (Told(sides=(2**40, 2)),)}, "impossible shape"),
    "great sides together": ({"told": (Told(sides=(2**31, 2**31, 2**31, 2**31)),)}, "cut short"),
    "rows that are no whole blocks": ({"told": (Told(sides=(33, 2)),)}, "no whole blocks of Q8_0"),
    "no dimensions in blocks": ({"told": (Told(sides=()),)}, "no whole blocks"),
    "a tensor twice": ({"told": (Told(), Told(offset=96)), "data": 200}, "names 'x' twice"),
    "tensors on one another": ({"told": (TWO[0], TWO[1]._replace(offset=32)), "data": 160}, "'y' overlaps"),
    "tensors in one place": ({"told": (TWO[0], TWO[1]._replace(offset=0)), "data": 160}, "overlaps"),
    "a hole": ({"told": (TWO[0], TWO[1]._replace(offset=128)), "data": 200}, "'y' leaves a hole"),
    "a place outside": ({"told": (TWO[0], TWO[1]._replace(offset=LONG)), "data": 200}, "'y' leaves a hole"),
    "a place out of step": ({"told": (TWO[0], TWO[1]._replace(offset=97)), "data": 200}, "'y' leaves a hole"),
    "a hole before the first": ({"told": (Told(offset=32),), "data": 100}, "'x' leaves a hole"),
    "too little data": ({"data": 67}, "cut short: .* expected"),
    "no data": ({"data": 0}, "cut short"),
    "data of nothing": ({"data": 97}, "1 bytes after its last tensor"),
    "an odd alignment": ({"keys": (key("general.alignment", 4, struct.pack("<I", 33)),)}, "alignment is 33"),
    "no alignment": ({"keys": (key("general.alignment", 4, struct.pack("<I", 0)),)}, "alignment is 0"),
    "a great alignment": ({"keys": (key("general.alignment", 4, struct.pack("<I", 2**31)),)}, "alignment is"),
    "an alignment that is text": ({"keys": (key("general.alignment", 8, text("32")),)}, "alignment is '32'"),
    "an alignment that is true": ({"keys": (key("general.alignment", 7, b"\1"),)}, "alignment is True"),
    "another original shape": (
        {"keys": (key("comfy.gguf.orig_shape.x", 9, many(5, 2, struct.pack("<2i", 32, 3))),)},
        "cannot have had the shape",
    ),
    "a negative original shape": (
        {"keys": (key("comfy.gguf.orig_shape.x", 9, many(5, 2, struct.pack("<2i", -32, -2))),)},
        "cannot have had the shape",
    ),
    "an original shape that is text": ({"keys": (key("comfy.gguf.orig_shape.x", 8, text("32x2")),)}, "cannot have"),
}


@pytest.mark.parametrize("what", UNSOUND)
def test_what_is_not_sound_is_refused(what: str, tmp_path: Path) -> None:
    how, why = UNSOUND[what]
    with pytest.raises(DamagedFile, match=why):
        open_tensors(made(tmp_path / "x.gguf", **how))


def test_an_alignment_of_ones_own_is_kept_to(tmp_path: Path) -> None:
    keys = (key("general.alignment", 4, struct.pack("<I", 64)),)
    path = made(tmp_path / "x.gguf", (TWO[0], TWO[1]._replace(offset=128)), keys, 162, alignment=64)
    assert [entry.start % 64 for entry in open_tensors(path).entries.values()] == [0, 0]


def test_what_is_sound_and_unknown_has_its_name(tmp_path: Path) -> None:
    for how, why in (
        ({"told": (Told(sides=(256, 1), kind=16),)}, "'x' is stored as IQ2_XXS, which is not supported; known: .*Q4_K"),
        ({"told": (Told(sides=(32, 1), kind=39),)}, "MXFP4"),
        ({"told": (Told(kind=4),)}, "type number 4"),
        ({"told": (Told(kind=2**31),)}, "type number 2147483648"),
        ({"version": 1}, "version 1"),
        ({"version": 4}, "version 4"),
        ({"version": 3 << 24}, "big-endian"),
    ):
        with pytest.raises(UnsupportedModel, match=why):
            open_tensors(made(tmp_path / "x.gguf", **how))


def test_a_header_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tuple(key(f"k{i}", 8, text("x" * 5000)) for i in range(10))
    path = made(tmp_path / "x.gguf", keys=keys)
    assert list(open_tensors(path).entries) == ["x"]
    monkeypatch.setattr(reading, "MAX_HEADER", 20_000)
    with pytest.raises(DamagedFile, match="longer than 20,000"):
        open_tensors(path)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    every_format(tmp_path / "x.gguf")
    content = (tmp_path / "x.gguf").read_bytes()
    last = max(entry.stop for entry in GgufFile(tmp_path / "x.gguf").entries.values())
    for size in [*range(4, 3000, 37), last - 1]:
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(DamagedFile):
            open_tensors(tmp_path / "cut.gguf")


def test_random_damage_is_an_error_or_harmless(tmp_path: Path) -> None:
    """Whatever stands in a header: no other error, no time, and no tensor outside the file."""
    every_format(tmp_path / "x.gguf")
    content = bytearray((tmp_path / "x.gguf").read_bytes())
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(600):
        broken = bytearray(content)
        for place in rng.integers(0, 1200, rng.integers(1, 4)):
            broken[place] = rng.integers(0, 256)
        (tmp_path / "broken.gguf").write_bytes(broken)
        try:
            opened = open_tensors(tmp_path / "broken.gguf")
        except LoadError:
            refused += 1
            continue
        for entry in opened.entries.values():
            assert 0 <= entry.start <= entry.stop <= len(content)
            assert entry.stored in FORMATS or entry.format is None
    assert refused > 300
