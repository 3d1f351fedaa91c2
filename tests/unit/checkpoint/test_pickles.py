"""torch's own files: tensors come out of them bit for bit, and nothing else does."""

# pyright: reportDeprecated=false
# What attackers call is deprecated.

from __future__ import annotations

import argparse
import collections
import datetime
import pathlib
import pickle
import random
import struct
import sys
import tarfile
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tiny_pickles as made
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from calotype.checkpoint.embeddings import read_embedding
from calotype.checkpoint.entries import DTYPES, MAX_HEADER
from calotype.checkpoint.files import TorchFile, Weights
from calotype.checkpoint.inert import MAX_STEPS
from calotype.errors import CalotypeError, DamagedFile, UnsafeFile, UnsupportedModel

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
ONE = made.program(made.table({"a.weight": made.tensor(made.stored())}))


def save(content: object, path: Path, *, zipped: bool, protocol: int = 2) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return path


def opened(path: Path) -> Weights:
    return Weights.of(str(path), [path])


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


# ---- what comes out


def many() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    out = {f"kind.{name}": torch.randn(3, 5, generator=rng).to(dtype) for name, dtype in DTYPES.items()}
    large = torch.randn(4, 6, generator=rng)
    special = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45])
    picture = torch.randn(2, 3, 4, 5, generator=rng)
    return {
        **out,
        "large": large,
        "shared": large,
        "transposed": large.t(),
        "row": large[2],
        "column": large[:, 3],
        "inner": large[1:3, 2:5],
        "steps": large.view(-1)[1::5],
        "expanded": large[:1].expand(3, 6),
        "folded": large.view(-1).as_strided((3, 4), (2, 1)),
        "half": large.half()[1:],
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "element": large[3, 4],
        "empty": torch.empty(0, 4),
        "empty tail": large[4:, 1:],
        "special": special,
        "ones": torch.ones(1, 4, 1)[:, 1:3],
        "channels_last": picture.contiguous(memory_format=torch.channels_last),
        "permuted": picture.permute(2, 0, 3, 1),
        "parameter": nn.Parameter(large * 2),
    }


@FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_come_back_bit_for_bit(tmp_path: Path, zipped: bool, protocol: int) -> None:
    wanted = many()
    weights = opened(save(wanted, tmp_path / "x.ckpt", zipped=zipped, protocol=protocol))
    assert list(weights) == list(wanted)
    if zipped and protocol < 4:  # torch's own careful reader knows no more
        theirs = torch.load(tmp_path / "x.ckpt", weights_only=True)
        assert all(same(theirs[key], tensor) for key, tensor in wanted.items())
    for key, tensor in wanted.items():
        mapped = weights.mapped(key)
        assert same(mapped, tensor), key
        assert mapped.is_contiguous()
        assert weights[key].stop - weights[key].start == tensor.nbytes
        out = torch.empty(tensor.shape, dtype=tensor.dtype)
        weights.read(key, out)
        assert same(out, tensor), key


@FORMATS
def test_rows_are_read_and_converted_however_they_lie(tmp_path: Path, zipped: bool) -> None:
    wanted = many()
    weights = opened(save(wanted, tmp_path / "x.ckpt", zipped=zipped))
    for key in ("large", "transposed", "inner", "expanded", "channels_last", "permuted"):
        out = torch.zeros(wanted[key].shape, dtype=torch.bfloat16)
        weights.read(key, out[1:2], row=1)
        assert same(out[1:2], wanted[key][1:2].bfloat16())
        assert not out[0].any()


def test_mapped_tensors_share_the_file_and_never_change_it(tmp_path: Path) -> None:
    path = save({"a": torch.arange(8.0)}, tmp_path / "x.ckpt", zipped=True)
    before = path.read_bytes()
    weights = opened(path)
    first, second = weights.mapped("a"), weights.mapped("a")
    first += 1
    assert second.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert path.read_bytes() == before


@FORMATS
def test_modules_and_attributes_leave_their_tensors(tmp_path: Path, zipped: bool) -> None:
    plain, parameter = torch.arange(3.0), nn.Parameter(torch.arange(4.0))
    plain.note, parameter.note = {"of": "ours"}, 1  # type: ignore[attr-defined]
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict()  # an OrderedDict with _metadata
    content = {"plain": plain, "parameter": parameter, "network": network}
    weights = opened(save(content, tmp_path / "x.pt", zipped=zipped))
    assert set(weights) == {"plain", "parameter", *(f"network.{key}" for key in network)}
    assert weights.mapped("network.1.num_batches_tracked").item() == 0
    assert same(weights.mapped("parameter"), parameter)


def test_an_ordered_dict_of_python_2_is_read(tmp_path: Path) -> None:
    pair = made.EMPTY_LIST + b"(U\x08a.weight" + made.tensor(made.stored()) + b"e"
    pairs = call_list(pair)
    content = made.program(made.call(made.name("collections", "OrderedDict"), pairs))
    assert list(opened(made.archive(tmp_path / "x.pth", content))) == ["a.weight"]


def call_list(*items: bytes) -> bytes:
    return made.EMPTY_LIST + b"(" + b"".join(items) + b"e"


def test_a_storage_may_be_a_part_of_another(tmp_path: Path) -> None:
    part = made.stored("0", 6, "FloatStorage", made.together(made.text("1"), made.number(2), made.number(3)))
    whole = made.stored("0", 6, "FloatStorage", made.NOTHING)
    content = made.table({"part": made.tensor(part, (2,), (1,), 1), "whole": made.tensor(whole, (6,), (1,))})
    made.legacy(tmp_path / "x.pt", made.program(content), {"0": (6, struct.pack("<6f", *range(6)))})
    weights = opened(tmp_path / "x.pt")
    assert weights.mapped("part").tolist() == [3, 4]
    assert weights.mapped("whole").tolist() == [0, 1, 2, 3, 4, 5]


# ---- which tensors, under which names


@FORMATS
@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "module", "model_state", "model"])
def test_one_wrapping_is_taken_off(tmp_path: Path, zipped: bool, wrapper: str) -> None:
    content = {"name": "mine", "optimizer": {"a.weight": torch.ones(1)}, wrapper: {"a.weight": torch.zeros(2)}}
    weights = opened(save(content, tmp_path / "x.ckpt", zipped=zipped))
    assert weights.shapes == {"a.weight": (2,)}
    assert weights.metadata == {"name": "mine"}


def test_other_dicts_are_joined_by_dots(tmp_path: Path) -> None:
    content = {
        "image_proj": {"norm.weight": torch.zeros(2)},
        "ip_adapter": {1: torch.zeros(3), "deep": {"er": {"weight": torch.zeros(4)}}},
        "model": {"depth": 3},
        "top": torch.zeros(1),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(5)}}},
        "config": "not ours",
        "long": "x" * 1000,
        "nothing": None,
        "list": [torch.zeros(1)],
    }
    weights = opened(save(content, tmp_path / "ip-adapter.bin", zipped=True))
    assert weights.shapes == {
        "image_proj.norm.weight": (2,),
        "ip_adapter.1": (3,),
        "ip_adapter.deep.er.weight": (4,),
        "top": (1,),
    }
    assert weights.metadata == {}


@FORMATS
def test_textual_inversion_is_read(tmp_path: Path, zipped: bool) -> None:
    vectors = torch.randn(2, 768)
    forms: dict[str, dict[str, Any]] = {
        "a1111": {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": vectors},
            "name": "cat",
            "step": 500,
            "sd_checkpoint": None,
        },
        "original": {
            "string_to_token": {"*": torch.tensor(265)},
            "string_to_param": nn.ParameterDict({"*": nn.Parameter(vectors)}),
        },
        "diffusers": {"<cat-toy>": vectors},
    }
    for name, content in forms.items():
        weights = opened(save(content, tmp_path / f"{name}.pt", zipped=zipped))
        assert torch.equal(read_embedding(weights)[768], vectors)
    assert opened(tmp_path / "a1111.pt").metadata == {"name": "cat"}
    assert list(opened(tmp_path / "a1111.pt")) == ["string_to_param.*"]


@pytest.fixture
def lightning() -> Iterator[Callable[..., Any]]:
    """Classes of packages that are there while a file is written, and not when it is read."""
    names: list[str] = []

    def create(module: str, name: str, base: type = object) -> Any:  # noqa: ANN401
        for end in range(1, module.count(".") + 2):
            package = ".".join(module.split(".")[:end])
            if package not in sys.modules:
                names.append(package)
                sys.modules[package] = types.ModuleType(package)
        made_class = type(name, (base,), {"__module__": module})
        setattr(sys.modules[module], name, made_class)
        return made_class

    yield create
    for name in names:
        sys.modules.pop(name, None)


@FORMATS
def test_a_training_checkpoint_gives_its_model(
    tmp_path: Path, zipped: bool, lightning: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = lightning("strange_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    attributes = lightning("strange_lightning.utilities.parsing", "AttributeDict", dict)
    config = lightning("strange_conf.dictconfig", "DictConfig")()
    config._content, config._metadata, config._parent = {"lr": 1e-4, "betas": (0.9, 0.999)}, config, None
    state = {
        "model.diffusion_model.out.2.weight": torch.randn(4, 8, 3, 3),
        "first_stage_model.quant_conv.bias": torch.randn(8).half(),
        "model_ema.decay": torch.tensor(0.9999),
    }
    content = {
        "epoch": 6,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": collections.OrderedDict(state),
        "callbacks": {
            checkpoint: {"best_model_score": torch.tensor(0.1), "best_model_path": pathlib.PurePosixPath("a")}
        },
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(4)}}, "param_groups": [{"params": [0, 1]}]}],
        "lr_schedulers": [{"base_lrs": [np.float64(1e-4)], "seen": {1, 2}, "frozen": frozenset({3})}],
        "hyper_parameters": attributes(config=config, when=datetime.datetime(2022, 8, 22), kinds=[int, dict]),
        "arguments": argparse.Namespace(
            array=np.arange(5), counts=collections.Counter("abc"), device=torch.device("cuda:0"), dtype=torch.half
        ),
        "loops": collections.defaultdict(list, fit=[b"raw", 2**80, -(2**40), 1.5, None, True]),
        "random": random.getstate(),
        "numpy": np.random.get_state(),
        "size": torch.Size([1, 2]),
    }
    save(content, tmp_path / "v1-5.ckpt", zipped=zipped)
    for module in [name for name in sys.modules if name.startswith("strange_")]:
        monkeypatch.delitem(sys.modules, module)
    weights = opened(tmp_path / "v1-5.ckpt")
    assert list(weights) == list(state)
    assert all(same(weights.mapped(key), tensor) for key, tensor in state.items())
    assert weights.metadata == {"pytorch-lightning_version": "1.4.2"}
    assert not any(name.startswith("strange_") for name in sys.modules)


def test_naming_a_class_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "canary_package.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Evil: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    evil = made.call(made.name("canary_package", "Evil"), made.text("x")) + made.table({"a": made.NOTHING}) + b"b"
    made.archive(tmp_path / "x.ckpt", made.program(made.table({"a": made.tensor(made.stored()), "b": evil})))
    assert list(opened(tmp_path / "x.ckpt")) == ["a"]
    assert "canary_package" not in sys.modules
    assert not (tmp_path / "canary").exists()


# ---- large files


@pytest.mark.parametrize("sizes", [{"0": 2**30}, {"0": 5 * 2**30, "1": 2**30}], ids=["1 GB", "6 GB"])
def test_a_large_file_is_mapped_and_not_read(tmp_path: Path, sizes: dict[str, int]) -> None:
    tensors = {
        f"{key}.weight": made.tensor(made.stored(key, size // 4), (size // 4,), (1,)) for key, size in sizes.items()
    }
    path = made.sparse_archive(tmp_path / "x.ckpt", made.program(made.table(tensors)), sizes)
    before, begun = psutil.Process().memory_info().rss, time.process_time()
    weights = opened(path)
    assert [weights.mapped(f"{key}.weight")[-1].item() for key in sizes] == [0] * len(sizes)
    assert time.process_time() - begun < 0.5
    assert psutil.Process().memory_info().rss - before < 50 * 2**20


def test_a_large_file_of_the_older_format_is_not_read_either(tmp_path: Path) -> None:
    size = 2**30
    content = made.program(made.table({"a": made.tensor(made.stored("0", size // 4), (size // 4,), (1,))}))
    path = made.legacy(tmp_path / "x.ckpt", content, {"0": (size // 4, b"")})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    begun = time.process_time()
    weights = opened(path)
    assert time.process_time() - begun < 0.5
    assert weights["a"].stop == path.stat().st_size


# ---- attacks


@pytest.fixture
def quick() -> Iterator[None]:
    """No attack takes a second, or much memory."""
    begun, before = time.process_time(), psutil.Process().memory_info().rss
    yield
    assert time.process_time() - begun < 1
    assert psutil.Process().memory_info().rss - before < 200 * 2**20


class Runs:
    """What an attacker's class looks like."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.reduced


def payloads(canary: Path) -> dict[str, tuple[bytes, str]]:
    """Programs that write a file, and the name that gives each away."""
    import builtins
    import os
    import subprocess

    system = os.system
    command, code = f"touch {canary}", f"__import__('pathlib').Path({str(canary)!r}).touch()"
    name, call, text = made.name, made.call, made.text
    builtin = "__builtin__"
    read = call(name(builtin, "getattr"), call(name(builtin, "__import__"), text("os")), text("system"))
    hidden = call(name("operator", "attrgetter"), text("system")) + b"q\x00"
    return {
        "os.system": (pickle.dumps(Runs(system, command), 2), r"(posix|nt)\.system"),
        "os.system, protocol 0": (pickle.dumps(Runs(system, command), 0), r"(posix|nt)\.system"),
        "os.system, protocol 4": (pickle.dumps(Runs(system, command), 4), r"(posix|nt)\.system"),
        "posix by name": (made.program(call(name("posix", "system"), text(command))), r"posix\.system"),
        "eval": (pickle.dumps(Runs(builtins.eval, code), 2), r"__builtin__\.eval"),
        "exec": (pickle.dumps(Runs(builtins.exec, code), 4), r"builtins\.exec"),
        "open": (pickle.dumps(Runs(builtins.open, str(canary), "w"), 4), r"io\.open"),
        "Popen": (pickle.dumps(Runs(subprocess.Popen, ["touch", str(canary)]), 2), r"(subprocess|commands)\.Popen"),
        "getattr chain": (made.program(call(read, text(command))), r"__builtin__\.getattr"),
        "attrgetter": (made.program(hidden), r"operator\.attrgetter"),
        "dotted name": (
            made.program(text("os") + text("path.os.system") + b"\x93" + made.together(text(command)) + b"R", 4),
            r"os\.path\.os\.system",
        ),
        "dotted class": (
            made.program(text("torch") + text("Tensor.__init__.__globals__") + b"\x93", 4),
            r"torch\.Tensor\.__init__",
        ),
        "inst": (b"(S'" + command.encode() + b"'\nios\nsystem\n.", ""),
        "inst, protocol 2": (made.program(b"(" + text(command) + b"ios\nsystem\n"), r"os\.system"),
        "newobj": (made.program(name("os", "_wrap_close") + made.together(text("x")) + b"\x81"), r"os\._wrap_close"),
        "torch.load": (
            made.program(call(name("torch.serialization", "load"), text("x"))),
            r"torch\.serialization\.load",
        ),
        "torch's storage loader": (
            made.program(call(name("torch.storage", "_load_from_bytes"), b"U\x01x")),
            r"torch\.storage\._load_from_bytes",
        ),
        "torch.hub": (made.program(call(name("torch.hub", "load"), text("evil/repo"))), r"torch\.hub\.load"),
        "numpy's runstring": (
            made.program(call(name("numpy.testing._private.utils", "runstring"), text(code), made.EMPTY_DICT)),
            r"runstring",
        ),
        "pip": (made.program(call(name("pip", "main"), made.EMPTY_LIST)), r"pip\.main"),
        "runpy": (made.program(call(name("runpy", "run_path"), text("x.py"))), r"runpy\.run_path"),
        "webbrowser": (made.program(call(name("webbrowser", "open"), text("http://x"))), r"webbrowser\.open"),
        "ctypes": (made.program(call(name("ctypes", "CDLL"), text("x.so"))), r"ctypes\.CDLL"),
        "a name in disguise": (made.program(b"cos\r\nsystem\n" + made.together(text(command)) + b"R"), r"os.*system"),
        "a private module": (made.program(call(name("calotype.checkpoint.inert", "sys.exit"))), r"sys\.exit"),
    }


NAMES = list(payloads(Path("canary")))


@pytest.mark.parametrize("where", ["zip", "within", "legacy", "bare"])
@pytest.mark.parametrize("attack", NAMES)
def test_no_payload_runs(tmp_path: Path, attack: str, where: str, quick: None) -> None:
    canary = tmp_path / "canary"
    content, why = payloads(canary)[attack]
    path = tmp_path / "x.ckpt"
    if where == "zip":
        made.archive(path, content)
    elif where == "within":
        if not content.startswith(b"\x80"):
            pytest.skip("older protocols end where they are")
        body = content[2:-1]
        body = body[9:] if body.startswith(b"\x95") else body  # without the frame
        inner = made.table({"a": made.tensor(made.stored()), "b": made.EMPTY_LIST + b"(" + body + b"e"})
        made.legacy(path, made.program(inner, 4))
    elif where == "legacy":
        made.legacy(path, content)
    else:
        path.write_bytes(content)
    with pytest.raises(UnsafeFile if why else CalotypeError, match=why or None):
        opened(path)
    assert not canary.exists()


@pytest.mark.parametrize("attack", ["os.system", "eval", "getattr chain", "dotted name", "Popen"])
def test_the_payloads_are_real(tmp_path: Path, attack: str) -> None:
    """Python's own reader runs them."""
    canary = tmp_path / "canary"
    result = pickle.loads(payloads(canary)[attack][0])
    if attack == "Popen":
        result.wait()
    assert canary.exists()


def damaged() -> dict[str, tuple[bytes, str]]:
    """Pickles that no torch.save wrote, and what is said of them."""
    table, tensor, stored, number = made.table, made.tensor, made.stored, made.number
    view, order = made.name("torch._utils", "_rebuild_tensor_v2"), made.name("collections", "OrderedDict")

    def one(value: bytes) -> bytes:
        return made.program(table({"a": value}))

    many = b"(" + b"K\x01" * 1000 + b"t"
    deep = b"".join(made.EMPTY_DICT + made.text("a") for _ in range(40)) + tensor(stored()) + b"s" * 40
    # Each dict holds the one before it ten times.
    laughs = made.EMPTY_DICT + made.text("k") + tensor(stored()) + b"s"
    for level in range(20):
        items = b"".join(made.text(str(number)) + b"h" + bytes([level]) for number in range(10))
        laughs += b"q" + bytes([level]) + b"0" + made.EMPTY_DICT + b"(" + items + b"u"
    colliding = b"".join(number((2**61 - 1) * (k + 1)) + b"N" for k in range(20_000))
    pairs = b"](" + (b"](" + made.text("k") + b"Ne") * 2000 + b"eq\x00"
    return {
        "nothing": (b"", "cut short"),
        "an archive": (b"PK\x03\x04" + bytes(100), "no opcode"),
        "no stop": (made.program(b"N")[:-1], "cut short"),
        "an empty stack": (made.program(b""), "more from the stack"),
        "a mark that is not there": (made.program(b"t"), "more from the stack"),
        "a tuple of too few": (made.program(b"N\x87"), "more from the stack"),
        "an unknown opcode": (made.program(b"\xff"), "no opcode"),
        "an extension": (made.program(b"\x82\x01"), "no opcode"),
        "a buffer": (made.program(b"\x97"), "no opcode"),
        "a persistent id as text": (made.program(b"P0\n"), "no opcode"),
        "protocol 200": (b"\x80\xc8N.", "protocol of the future"),
        "a memo that is not there": (made.program(b"h\x07"), "did not keep"),
        "a huge memo": (made.program(b"Nr\xff\xff\xff\xff" + b"j\xff\xff\xff\xff"), ""),
        "a text without end": (made.program(b"X\xff\xff\xff\xff"), "cut short"),
        "a text of 2^62": (made.program(b"\x8d" + bytes(7) + b"\x40"), "cut short"),
        "bytes of 2^62": (made.program(b"\x8e" + bytes(7) + b"\x40"), "cut short"),
        "a bytearray of 2^40": (made.program(b"\x96" + bytes(5) + b"\x01" + bytes(2)), "cut short"),
        "a frame of 2^62": (made.program(b"\x95" + bytes(7) + b"\x40" + b"N"), ""),
        "a long integer": (made.program(b"\x8b\x00\x00\x10\x00" + bytes(2**20)), "too long"),
        "text that is none": (made.program(b"X\x01\x00\x00\x00\xff"), "not UTF-8"),
        "a name that does not end": (made.program(b"cos" * 10_000), "does not end"),
        "a name of numbers": (made.program(b"NN\x93"), "no text"),
        "a call of a number": (made.program(b"K\x01)R"), "no class"),
        "a call of a result": (made.program(made.call(made.call(order))), "no class"),
        "a call without a tuple": (made.program(order + b"NR"), "no class"),
        "an item of a number": (made.program(b"K\x01K\x02a"), "no list"),
        "an item of a tensor": (one(tensor(stored()) + b"NNs"), "no dict"),
        "half an item": (made.program(b"}(Nu"), "no dict"),
        "the state of a tensor": (one(tensor(stored()) + b"}b"), "takes none"),
        "a number": (made.program(b"K\x01"), "a int without a name"),
        "itself": (made.program(b"}q\x00" + made.text("a") + b"h\x00s"), "deep"),
        "itself, often": (
            made.program(b"}q\x00(" + b"".join(made.text(str(n)) + b"h\x00" for n in range(9)) + b"u"),
            "",
        ),
        "too deep": (made.program(deep), "deep"),
        "a billion laughs": (made.program(laughs), r"more than [\d,]+ items"),
        "keys that collide": (made.program(b"}(" + colliding + b"u"), "without named tensors"),
        "pairs again and again": (
            made.program(pairs + (order + b"h\x00\x85R0") * 2000 + b"}"),
            f"more than {MAX_STEPS:,} steps",
        ),
        "too many steps": (made.program(b"N0" * MAX_STEPS), f"more than {MAX_STEPS:,} steps"),
        "a deep tuple": (made.program(b")" + b"\x85" * (MAX_STEPS // 2)), "without a name"),
        "a tensor with a thousand arguments": (made.program(view + many + b"R"), "arguments"),
        "a tensor of nothing": (one(made.call(view)), "as torch.save does not"),
        "a tensor of texts": (one(made.call(view, *[made.text("x")] * 6)), "as torch.save does not"),
        "a tensor of a name": (one(made.call(view, order, *[number(0)] * 5)), "as torch.save does not"),
        "a parameter of nothing": (one(made.call(made.name("torch._utils", "_rebuild_parameter"))), "parameter"),
        "more axes than strides": (one(tensor(stored(), (2, 2), (2,))), "impossible shape"),
        "a hundred axes": (one(tensor(stored(), (1,) * 100, (1,) * 100)), "impossible shape"),
        "a negative side": (one(tensor(stored(), (-2, -2))), "impossible shape"),
        "a negative stride": (one(tensor(stored(), (2, 2), (2, -1))), "impossible shape"),
        "a huge side": (one(tensor(stored(), (2**40, 0))), "impossible shape"),
        "a negative offset": (one(tensor(stored(), (1,), (1,), -1)), "does not fit"),
        "an offset beyond": (one(tensor(stored(), (1,), (1,), 4)), "does not fit"),
        "a shape beyond": (one(tensor(stored(), (2, 3), (3, 1))), "does not fit"),
        "a stride beyond": (one(tensor(stored(), (2, 2), (3, 1))), "does not fit"),
        "endless repetition": (one(tensor(stored(), (2**31, 2**31), (0, 0))), "more than the file has"),
        "a storage of nothing": (one(b"NQ"), "no storage"),
        "a storage of a class": (one(made.together(made.text("storage"), order, made.text("0")) + b"Q"), "no storage"),
        "a storage elsewhere": (one(tensor(stored("../0"))), "impossible storage"),
        "a storage under a long name": (one(tensor(stored("0" * 100))), "impossible storage"),
        "a storage of 2^60": (one(tensor(stored("0", 2**60))), "impossible storage"),
        "a negative storage": (one(tensor(stored("0", -4))), "impossible storage"),
        "a part beyond": (
            one(tensor(stored("0", 4, "FloatStorage", made.together(made.text("1"), number(2), number(3))))),
            "impossible part",
        ),
        "a storage of two sizes": (
            made.program(table({"a": tensor(stored("0", 4)), "b": tensor(stored("0", 2), (1,), (1,))})),
            "two sizes",
        ),
        "a storage of two types": (
            made.program(table({"a": tensor(stored("0", 4)), "b": tensor(stored("0", 4, "HalfStorage"), (1,), (1,))})),
            "two sizes",
        ),
        "a dunder name": (made.program(table({"x.__class__.y": tensor(stored())})), "acceptable name"),
        "a name with a line break": (made.program(table({"a\nb": tensor(stored())})), "acceptable name"),
        "a star within": (made.program(table({"a*b": tensor(stored())})), "acceptable name"),
        "an endless name": (made.program(table({"a" * 10_000: tensor(stored())})), "too long"),
        "two of one name": (
            made.program(table({"a": table({"b": tensor(stored())}), "a.b": tensor(stored())})),
            "two tensors called",
        ),
    }


DAMAGED = damaged()


@pytest.mark.parametrize("attack", DAMAGED)
@FORMATS
def test_broken_pickles_are_damaged(tmp_path: Path, attack: str, zipped: bool, quick: None) -> None:
    content, why = DAMAGED[attack]
    path = (made.archive if zipped else made.legacy)(tmp_path / "x.ckpt", content)
    with pytest.raises((DamagedFile, UnsupportedModel), match=(why or None) if zipped else None):
        opened(path)  # in the older format, what follows the pickle may be found wanting first


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_tensors_that_are_no_place_in_the_file_are_named(tmp_path: Path) -> None:
    dense = torch.eye(3)
    negated = torch.imag(torch.ones(2, dtype=torch.complex64).conj())
    assert negated.is_neg()
    for content, why in (
        ({"a": dense.to_sparse()}, "sparse tensor"),
        ({"a": torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8)}, "qtensor"),
        ({"a": torch.empty(2, device="meta")}, "meta tensor"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "complex64"),
        ({"a": negated}, "negated"),
        (dense, "one tensor without a name"),
        ([dense, dense], "a list without a name"),
        ({"a": 1, "b": "two"}, "without named tensors"),
    ):
        with pytest.raises(UnsupportedModel, match=why):
            opened(save(content, tmp_path / "x.pt", zipped=True))


# ---- the archive


@FORMATS
def test_a_file_cut_short_anywhere_is_damaged(tmp_path: Path, zipped: bool) -> None:
    whole = save(
        {"a": torch.arange(100.0), "b": torch.zeros(3).half()}, tmp_path / "x.ckpt", zipped=zipped
    ).read_bytes()
    path = tmp_path / "cut.ckpt"
    for keep in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:keep])
        with pytest.raises(DamagedFile):
            opened(path)


def test_compressed_archives_are_refused_before_they_are_unpacked(tmp_path: Path, quick: None) -> None:
    path = tmp_path / "x.ckpt"
    zeros = made.program(made.table({"a": made.tensor(made.stored("0", 2**26), (2**26,), (1,))}))
    for compressed in ("x/data/0", "x/data.pkl"):
        with zipfile.ZipFile(path, "w") as file:
            for name, content in (("x/data.pkl", zeros), ("x/data/0", bytes(2**24))):
                kind = zipfile.ZIP_DEFLATED if name == compressed else zipfile.ZIP_STORED
                file.writestr(name, content, kind)
        with pytest.raises(DamagedFile, match="is compressed"):
            opened(path)


def entries(path: Path) -> bytearray:
    """The bytes of a sound archive of one tensor."""
    return bytearray(made.archive(path, ONE).read_bytes())


def patched(content: bytearray, mark: bytes, offset: int, layout: str, value: int, which: int = 0) -> bytearray:
    """With a number changed, at an offset from the which-th mark."""
    at = -1
    for _ in range(which + 1):
        at = content.index(mark, at + 1)
    struct.pack_into(layout, content, at + offset, value)
    return content


LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
PATCHES: dict[str, tuple[bytes, int, str, int, int, str]] = {
    "encrypted in the directory": (CENTRAL, 8, "<H", 1, 1, "encrypted"),
    "encrypted by its own header": (LOCAL, 6, "<H", 1, 1, "contradict"),
    "compressed by its own header": (LOCAL, 8, "<H", 8, 1, "contradict"),
    "compressed by bzip2": (CENTRAL, 10, "<H", 12, 1, "contradict"),
    "two sizes": (CENTRAL, 20, "<I", 8, 1, "two sizes"),
    "a longer name": (LOCAL, 26, "<H", 9, 1, "contradict"),
    "another name": (LOCAL, 30, "<B", 0x79, 1, "contradict"),
    "a long extra field": (LOCAL, 28, "<H", 60_000, 1, "overlaps"),
    "on the header of another": (CENTRAL, 42, "<I", 0, 1, "contradict"),
    "no header there": (CENTRAL, 42, "<I", 5, 1, "no 'x/data/0' where"),
    "far away": (CENTRAL, 42, "<I", 2**31, 1, "outside"),
    "64 bits that are not there": (CENTRAL, 42, "<I", 2**32 - 1, 1, "directory is broken"),
    "a directory elsewhere": (END, 16, "<I", 3, 0, "directory is broken"),
    "a directory beyond the end": (END, 16, "<I", 2**31, 0, "does not fit"),
    "a directory that is too long": (END, 12, "<I", 2**31, 0, "files; at most"),
    "fewer files than listed": (END, 10, "<H", 1, 0, "lists 2 files"),
    "more files than listed": (END, 10, "<H", 65_000, 0, "files; at most"),
    "no file": (END, 10, "<H", 0, 0, "files; at most"),
    "another volume": (END, 4, "<H", 1, 0, "volume"),
    "a comment that is not there": (END, 20, "<H", 7, 0, "after the archive's end"),
}


@pytest.mark.parametrize("attack", PATCHES)
def test_archives_that_lie_are_damaged(tmp_path: Path, attack: str, quick: None) -> None:
    mark, offset, layout, value, which, why = PATCHES[attack]
    path = tmp_path / "x.ckpt"
    path.write_bytes(patched(entries(path), mark, offset, layout, value, which))
    with pytest.raises(DamagedFile, match=why):
        opened(path)


def test_members_may_not_lie_in_one_another(tmp_path: Path) -> None:
    """The quoted overlap: one file's data holds another's header."""
    path = tmp_path / "x.ckpt"
    header = struct.pack("<4s5H3I2H", LOCAL, 20, 0, 0, 0, 0, 0, 4, 4, 8, 0) + b"x/data/1" + bytes(4)
    made.archive(path, ONE, {"0": header, "1": bytes(4)})
    content = bytearray(path.read_bytes())
    inner = content.index(b"x/data/1") - 30
    content = patched(content, CENTRAL, 42, "<I", inner, 2)
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match="overlaps"):
        opened(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["x/data.pkl", "x/data/0", "x/data/0"], "twice"),
        (["x/data.pkl", "x/data/0", "../../evil"], "acceptable name"),
        (["x/data.pkl", "x/data/0", "/etc/evil"], "acceptable name"),
        (["x/data.pkl", "x/data/0", "x\\evil"], "acceptable name"),
        (["x/data.pkl", "x/data/0", "x/" + "a" * 2000], "directory is broken"),
        (["x/data.pkl", "y/data.pkl", "x/data/0"], "one data.pkl"),
        (["data.pkl", "data/0"], "one data.pkl"),
        (["a/b/data.pkl", "a/b/data/0"], "one data.pkl"),
        (["x/data.pkl"], "data/0 is not there"),
        ([], "one data.pkl"),
    ],
)
def test_archives_of_other_files_are_damaged(tmp_path: Path, names: list[str], why: str) -> None:
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, ONE if name.endswith(".pkl") else bytes(16))
    with pytest.raises(DamagedFile, match=why):
        opened(path)


def test_storages_have_the_size_that_the_pickle_says(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    for size in (0, 12, 15, 20, 1000):
        made.archive(path, ONE, {"0": bytes(size)})
        with pytest.raises(DamagedFile, match=rf"has {size:,} bytes, not 16"):
            opened(path)
    for count, data, why in ((3, 16, "a storage of 12 bytes"), (2**60, 16, "a storage of"), (4, 12, "cut short")):
        made.legacy(path, ONE, {"0": (count, bytes(data))})
        with pytest.raises(DamagedFile, match=why):
            opened(path)
    for storages in ({}, {"1": (4, bytes(16))}, {"0": (4, bytes(16)), "1": (4, bytes(16))}):
        made.legacy(path, ONE, storages)
        with pytest.raises(DamagedFile, match="list of storages"):
            opened(path)


def test_an_archive_within_an_archive_is_no_pickle(tmp_path: Path) -> None:
    inner = made.archive(tmp_path / "inner.ckpt", ONE).read_bytes()
    with pytest.raises(DamagedFile, match="no opcode"):
        opened(made.archive(tmp_path / "x.ckpt", inner))


def test_a_pickle_over_the_limit_is_not_read(tmp_path: Path, quick: None) -> None:
    content = made.program(made.text("x" * MAX_HEADER) + b"0" + ONE[2:-1])
    for make in (made.archive, made.legacy):
        with pytest.raises(DamagedFile, match=r"at most 16,777,216|cut short"):
            opened(make(tmp_path / "x.ckpt", content))


def test_a_hundred_thousand_files_are_refused(tmp_path: Path, quick: None) -> None:
    path = made.sparse_archive(tmp_path / "x.ckpt", ONE, {"0": 16})
    content = bytearray(path.read_bytes())
    struct.pack_into("<2Q", content, content.index(b"PK\x06\x06") + 24, 100_000, 100_000)
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=r"100,000 files; at most 50,000"):
        opened(path)


def test_other_formats_of_torch_are_named(tmp_path: Path) -> None:
    module: Any = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    module.save(tmp_path / "script.pt")
    with pytest.raises(UnsupportedModel, match="TorchScript"):
        opened(tmp_path / "script.pt")
    with tarfile.open(tmp_path / "old.pt", "w", format=tarfile.PAX_FORMAT) as tar:
        (tmp_path / "storages").write_bytes(ONE)
        tar.add(tmp_path / "storages", "storages")
    with pytest.raises(UnsupportedModel, match="tar format"):
        opened(tmp_path / "old.pt")
    with pytest.raises(UnsupportedModel, match="big-endian"):
        opened(made.archive(tmp_path / "big.pt", ONE, byteorder=b"big"))
    (tmp_path / "x.ckpt").write_bytes(b"7z\xbc\xaf'\x1c" + bytes(100))
    with pytest.raises(DamagedFile):
        opened(tmp_path / "x.ckpt")
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps({"a": [1, 2]}))
    with pytest.raises(DamagedFile, match="not one that torch.save wrote"):
        opened(tmp_path / "x.ckpt")


# ---- damage at random

watching: list[bool] = []  # hooks cannot be taken away again: this one looks only while something is in here
seen: list[str] = []
FORBIDDEN = {
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "exec",
    "compile",
    "import",
    "pickle.find_class",
}


def watch(event: str, _: object) -> None:
    if watching and event in FORBIDDEN:
        seen.append(event)


sys.addaudithook(watch)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, bytes]:
    folder = tmp_path_factory.mktemp("sound")
    content = {
        "state_dict": {**many(), "more": nn.Parameter(torch.zeros(2))},
        "callbacks": {"x": argparse.Namespace(a={1}, b=np.float32(1))},
        "name": "x",
    }
    return {zipped: save(content, folder / "x.ckpt", zipped=zipped).read_bytes() for zipped in (True, False)}


@FORMATS
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_damage_runs_code_or_gives_another_error(
    tmp_path_factory: pytest.TempPathFactory, sound: dict[bool, bytes], zipped: bool, data: st.DataObject
) -> None:
    content = bytearray(sound[zipped])
    start = content.index(b"storage") - 200  # most of the pickle lies from here on
    places = st.one_of(st.integers(start, start + 5000), st.integers(0, len(content) - 1))
    for _ in range(data.draw(st.integers(1, 4))):
        at = min(data.draw(places), len(content) - 1)
        content[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b"Rbcio\x81\x93Q(tuse.")))
    path = tmp_path_factory.getbasetemp() / "mutated.ckpt"
    path.write_bytes(content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])
    try:
        watching.append(True)
        weights = opened(path)
        for key in weights:
            bits(weights.mapped(key))
    except CalotypeError:
        pass
    finally:
        watching.clear()
    assert not seen


def test_the_reader_is_told_from_the_file_alone(tmp_path: Path) -> None:
    file = TorchFile(save({"a": torch.zeros(2, 3), "name": "x"}, tmp_path / "x.safetensors", zipped=True))
    entry = file.entries["a"]
    assert (entry.key, entry.dtype, entry.shape, entry.strides) == ("a", torch.float32, (2, 3), None)
    assert file.metadata == {"name": "x"}
    assert file.mapping[entry.start : entry.stop] == bytes(24)
