from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from calotype.checkpoint.files import DTYPES, MAX_HEADER, MAX_TENSORS, SafetensorsFile, TorchFile, Weights, open_tensors
from calotype.checkpoint.writing import Planned, write, write_random
from calotype.errors import DamagedFile, LoadError, OutputError, SourceNotFound, UnsupportedModel


def raw(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def simple(**changes: Any) -> bytes:  # noqa: ANN401
    """A file of one tensor, with some of its header's values changed."""
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}
    return raw(json.dumps({"a.weight": entry}).encode(), bytes(16))


def some_tensors() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    out = {str(dtype).split(".")[1]: torch.randn(3, 5, generator=rng).to(dtype) for dtype in DTYPES.values()}
    return {**out, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "odd": torch.ones(7, dtype=torch.bool)}


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.view(-1).tolist() == b.view(-1).tolist()


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    wanted = some_tensors()
    save_file(wanted, tmp_path / "x.safetensors", {"format": "pt"})
    weights = Weights.of("x", [tmp_path / "x.safetensors"])
    assert weights.shapes == {key: tuple(tensor.shape) for key, tensor in wanted.items()}
    assert weights.metadata == {"format": "pt"}
    for key, tensor in wanted.items():
        assert same(weights.mapped(key).float(), tensor.float())
        assert weights.mapped(key).dtype == tensor.dtype
        out = torch.empty(tensor.shape, dtype=tensor.dtype)
        weights.read(key, out)
        assert same(out.float(), tensor.float())


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    wanted = some_tensors()
    plan = [Planned(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in wanted.items()]
    write(tmp_path / "new" / "x.safetensors", plan, wanted.__getitem__, {"about": "tests"})
    back = load_file(tmp_path / "new" / "x.safetensors")
    assert back.keys() == wanted.keys()
    assert all(same(back[key].float(), wanted[key].float()) for key in wanted)
    assert SafetensorsFile(tmp_path / "new" / "x.safetensors").metadata == {"about": "tests"}


def test_mapped_tensors_share_the_file_and_never_change_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(8.0), "b": torch.zeros(4)}, path)
    before = path.read_bytes()
    weights = Weights.of("x", [path])
    first, second = weights.mapped("a"), weights.mapped("a")
    assert first.data_ptr() == second.data_ptr()
    assert weights.mapped("b").data_ptr() - first.data_ptr() == weights["b"].start - weights["a"].start
    first += 1
    assert second.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert path.read_bytes() == before


def test_reads_rows_converting_as_it_goes(tmp_path: Path) -> None:
    save_file({"a": torch.arange(12.0).view(4, 3)}, tmp_path / "x.safetensors")
    weights = Weights.of("x", [tmp_path / "x.safetensors"])
    out = torch.zeros(4, 3, dtype=torch.bfloat16)
    weights.read("a", out[1:3], row=2)
    assert out.tolist() == [[0, 0, 0], [6, 7, 8], [9, 10, 11], [0, 0, 0]]


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    header += b" " * ((1 - len(header)) % 8)
    (tmp_path / "x.safetensors").write_bytes(raw(header, struct.pack("<3f", 1, 2, 3)))
    assert Weights.of("x", [tmp_path / "x.safetensors"]).mapped("a").tolist() == [1, 2, 3]


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 40, -20, -1])
def test_a_truncated_file_is_damaged(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(64)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedFile, match=r"fetch it again|does not begin"):
        SafetensorsFile(path)


def test_a_truncated_file_says_how_much_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(DamagedFile, match=f"{len(whole) - 1000:,} bytes are present, {len(whole):,} were expected"):
        SafetensorsFile(path)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "header of 2^63 bytes": ((2**63).to_bytes(8, "little") + b"{}", "at most"),
    "header of 100 MB": ((100 * 2**20).to_bytes(8, "little") + b"{}", "at most"),
    "not JSON": (raw(b"{nothing"), "not valid JSON"),
    "a list": (raw(b"[]"), "does not begin"),
    "deep JSON": (raw(b'{"a":' * 200_000 + b"1" + b"}" * 200_000), "not valid JSON"),
    "twice the same name": (
        raw(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            bytes(4),
        ),
        "twice",
    ),
    "an unknown type": (simple(dtype="F31"), "unknown type"),
    "a shape too large": (simple(shape=[2, 3]), "takes 24"),
    "a shape too small": (simple(shape=[1]), "takes 4"),
    "an endless shape": (simple(shape=[2**62, 0], data_offsets=[0, 0]), "impossible"),
    "a negative side": (simple(shape=[-2, -2]), "impossible"),
    "a true side": (simple(shape=[True, 4]), "impossible"),
    "a shape that is text": (simple(shape="22"), "impossible"),
    "places backwards": (simple(data_offsets=[16, 0]), "has -16 bytes"),
    "places far away": (simple(data_offsets=[2**70, 2**70 + 16]), "hole"),
    "one place": (simple(data_offsets=[0]), "lacks"),
    "no shape": (raw(b'{"a":{"dtype":"F32"}}'), "lacks"),
    "an entry that is a number": (raw(b'{"a":3}'), "lacks"),
    "bytes of nobody": (simple() + b"x", "belong to nothing"),
    "metadata of numbers": (raw(b'{"__metadata__":{"a":1}}'), "__metadata__"),
    "an overlap": (
        raw(
            b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}',
            bytes(6),
        ),
        "overlaps",
    ),
    "a hole": (
        raw(
            b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[5,9]}}',
            bytes(9),
        ),
        "hole",
    ),
    "a dunder name": (raw(b'{"x.__class__.__base__":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), "name"),
    "an empty name": (raw(b'{"":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), "name"),
    "a name with a line break": (raw(b'{"a\\nb":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), "name"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused(tmp_path: Path, name: str) -> None:
    content, why = HOSTILE[name]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(DamagedFile, match=why):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_a_header_over_the_limit_is_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER + 8).to_bytes(8, "little") + b"{}")
        file.truncate(MAX_HEADER + 16)
    with pytest.raises(DamagedFile, match=f"at most {MAX_HEADER:,}"):
        SafetensorsFile(path)


def test_too_many_tensors_are_refused(tmp_path: Path) -> None:
    entry = '"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = "{" + ",".join(entry % number for number in range(MAX_TENSORS + 1)) + "}"
    assert len(header) < MAX_HEADER
    (tmp_path / "x.safetensors").write_bytes(raw(header.encode()))
    with pytest.raises(DamagedFile, match=f"at most {MAX_TENSORS:,}"):
        SafetensorsFile(tmp_path / "x.safetensors")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_gives_another_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    content = bytearray(simple())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        weights = Weights.of("x", [path])
        for key in weights:
            weights.mapped(key).sum()
    except LoadError:
        pass


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "x.pt", "x.pth", "x.bin", "x"])
def test_the_content_tells_the_format_and_not_the_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    wanted = {"a.weight": torch.arange(6.0).view(2, 3)}
    save_file(wanted, path)
    assert isinstance(open_tensors(path), SafetensorsFile)
    assert torch.equal(Weights.of("x", [path]).mapped("a.weight"), wanted["a.weight"])
    for zipped in (True, False):
        torch.save(wanted, path, _use_new_zipfile_serialization=zipped)
        assert isinstance(open_tensors(path), TorchFile)
        assert torch.equal(Weights.of("x", [path]).mapped("a.weight"), wanted["a.weight"])
        with pytest.raises(DamagedFile, match="not a safetensors file"):
            SafetensorsFile(path)


def test_a_header_length_that_looks_like_a_pickle_is_none(tmp_path: Path) -> None:
    text = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(raw(text + b" " * (0x280 - len(text)), b"x"))
    assert (tmp_path / "x.safetensors").read_bytes()[:2] == b"\x80\x02"
    assert list(SafetensorsFile(tmp_path / "x.safetensors").entries) == ["a"]


def test_gguf_and_missing_files_have_their_own_errors(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UnsupportedModel, match="GGUF version 0"):
        open_tensors(tmp_path / "x.gguf")
    for read in (open_tensors, SafetensorsFile, TorchFile):
        with pytest.raises(SourceNotFound, match="no such file"):
            read(tmp_path / "nothing.safetensors")


def test_two_files_may_not_have_the_same_tensor(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"same": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(DamagedFile, match="also in a.safetensors"):
        Weights.of("x", [tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    plan = [Planned("a", torch.float32, (2,)), Planned("b", torch.float32, (2,))]

    def tensor(key: str) -> Tensor:
        if key == "b":
            raise KeyboardInterrupt
        return torch.zeros(2)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "x.safetensors", plan, tensor)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write(tmp_path / "file" / "x.safetensors", [], lambda _: torch.zeros(0))


def test_random_weights_fill_a_manifest(tmp_path: Path) -> None:
    manifest = [("in.weight", (64, 3)), ("norm.weight", (64,)), ("big", (2**22 + 5,))]
    write_random(tmp_path / "x.safetensors", manifest, torch.bfloat16)
    back = load_file(tmp_path / "x.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in back.items()} == dict(manifest)
    assert abs(back["norm.weight"].float().mean() - 1) < 0.02
    assert abs(back["big"].float().std() - 0.02) < 1e-3
