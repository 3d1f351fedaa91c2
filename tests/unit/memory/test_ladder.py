"""Every rung of the memory ladder draws the same picture, and lets go of what it does not need."""

from __future__ import annotations

import mmap
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from torch import Tensor, nn

from calotype import Lowered, OutOfMemory, Picture, Progress, Request, load
from calotype.errors import RequestError
from calotype.generate import Event, Model, stream
from calotype.memory.ladder import RUNGS, SMALL, Memory, Rung, out_of_memory
from calotype.memory.layers import Layer, layers_of
from calotype.memory.pages import MADVISE, Mapping, pages_of
from calotype.memory.plan import choose, held_bytes, model_bytes, weight_bytes

CPU, META = torch.device("cpu"), torch.device("meta")


class Block(nn.Module):
    """A large layer, a small one, and one that only `prepare` uses."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(512, 512)
        self.small = nn.LayerNorm(512)
        self.once = nn.Linear(512, 512)
        self.more = nn.ModuleList(nn.Linear(512, 512) for _ in range(4))
        self.table = nn.Parameter(torch.randn(600, 512))

    def only_for_preparing(self) -> tuple[nn.Module, ...]:
        return (self.once, *self.more[:2])

    def prepare(self, x: Tensor) -> Tensor:
        return self.once(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.small(self.large(x)) + self.table[: len(x)]


class Stored:
    """A block whose weights are read when they are asked for, and what was read."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.block = Block()
        self.state = {name: tensor.detach().clone() for name, tensor in self.block.state_dict().items()}
        self.read: list[str] = []
        self.block.to(META)

    def makers(self) -> dict[nn.Module, dict[str, object]]:
        def maker(name: str) -> object:
            def read() -> Tensor:
                self.read.append(name)
                return self.state[name].clone()

            return read

        return {self.block: {name: maker(name) for name in self.state}}

    def present(self) -> set[str]:
        return {name for name, tensor in self.block.state_dict().items() if not tensor.is_meta}


@pytest.mark.parametrize("rung", ["components", "stream"])
def test_weights_are_there_inside_the_block_alone(rung: Rung) -> None:
    stored = Stored()
    memory = Memory(CPU, rung, makers=stored.makers())
    x = torch.randn(3, 512)
    assert not stored.present()
    with memory.holding(stored.block):
        assert {"small.weight", "small.bias", "table"} <= stored.present()  # the last is read by no layer's forward
        assert "once.weight" not in stored.present()
        assert ("large.weight" in stored.present()) == (rung == "components")
        first, second = stored.block.prepare(x), stored.block(x)
        assert "once.weight" not in stored.present()
    assert not stored.present()
    whole = Block()
    whole.load_state_dict(stored.state)
    assert torch.equal(first, whole.prepare(x))
    assert torch.equal(second, whole(x))


def test_a_nested_block_lets_nothing_go() -> None:
    stored = Stored()
    memory = Memory(CPU, "components", makers=stored.makers())
    with memory.holding(stored.block):
        with memory.holding(stored.block):
            pass
        assert "large.weight" in stored.present()
    assert stored.read.count("large.weight") == 1


@pytest.mark.parametrize("rung", ["components", "stream"])
def test_weights_go_home_on_every_way_out(rung: Rung) -> None:
    stored = Stored()
    memory = Memory(CPU, rung, makers=stored.makers())
    with pytest.raises(ZeroDivisionError), memory.holding(stored.block):
        stored.block.large.register_forward_hook(lambda *_: 1 / 0)
        stored.block(torch.randn(1, 512))
    assert not stored.present()
    assert not stored.block.large._forward_pre_hooks


def test_a_layer_that_cannot_be_read_leaves_nothing_behind() -> None:
    stored = Stored()
    makers = stored.makers()

    def broken() -> Tensor:
        raise OSError("gone")

    makers[stored.block]["table"] = broken
    memory = Memory(CPU, "components", makers=makers)
    with pytest.raises(OSError, match="gone"), memory.holding(stored.block):
        pass
    assert not stored.present()


def test_small_layers_stay_in_a_stream() -> None:
    stored = Stored()
    memory = Memory(CPU, "stream", makers=stored.makers())
    with memory.holding(stored.block):
        for _ in range(3):
            stored.block(torch.randn(1, 512))
    assert stored.read.count("large.weight") == 3
    assert stored.read.count("small.weight") == stored.read.count("table") == 1


def test_pinned_layers_wait_in_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)  # a copy, where there is no GPU to pin it for
    stored = Stored()
    makers = {
        "weight": stored.makers()[stored.block]["large.weight"],
        "bias": stored.makers()[stored.block]["large.bias"],
    }
    layer = Layer(stored.block.large, makers, ())
    layer.pin()
    assert stored.read == ["large.weight", "large.bias"]
    assert torch.equal(stored.block.large.weight, stored.state["large.weight"])
    layer.put(layer.fetch(CPU))
    layer.leave()
    again = Layer(stored.block.large, makers, ())  # as after going down a rung
    again.fetch(CPU)
    assert len(stored.read) == 2


# ---- pages


def mapped(path: Path, pages: int) -> tuple[mmap.mmap, Tensor]:
    path.write_bytes(np.arange(pages * mmap.PAGESIZE // 4, dtype=np.int32).tobytes())
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return mapping, torch.frombuffer(mapping, dtype=torch.int32)


def resident_kilobytes(address: int) -> int:
    """What the system counts of one mapping as in memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    inside = False
    for line in lines:
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(number, 16) for number in head.split("-"))
            inside = first <= address < last
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1])
    raise AssertionError("no such mapping")


@pytest.mark.skipif(not MADVISE or not Path("/proc/self/smaps").exists(), reason="Linux's memory counters")
def test_dropped_pages_leave_memory_and_come_back(tmp_path: Path) -> None:
    file, whole = mapped(tmp_path / "x", 64)
    files = [Mapping.of(file)]
    part = whole[10 * mmap.PAGESIZE // 4 : 50 * mmap.PAGESIZE // 4]
    wanted = part.sum()  # touches its pages
    before = resident_kilobytes(part.data_ptr())
    pages = pages_of(part, files)
    assert pages is not None
    assert pages.length == 40 * mmap.PAGESIZE
    pages.drop()
    after = resident_kilobytes(part.data_ptr())
    assert before - after >= 40 * mmap.PAGESIZE // 1024
    assert part.sum() == wanted
    pages.expect()


def test_memory_of_its_own_has_no_pages_to_drop(tmp_path: Path) -> None:
    file, whole = mapped(tmp_path / "x", 2)
    files = [Mapping.of(file)]
    assert pages_of(torch.zeros(4), files) is None
    assert pages_of(whole.clone(), files) is None
    assert pages_of(torch.zeros(4, device=META), files) is None
    assert pages_of(whole[-1:], files) is not None


# ---- whole models


def drawn(model: Model[object], **fields: object) -> np.ndarray:
    picture = model.generate(Request(prompt="a red apple", seed=3, steps=2, **fields))
    return np.asarray(picture)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])  # as stored, and read into another type
def test_every_rung_draws_the_same_picture(dtype: str | None) -> None:
    pictures = {rung: drawn(load(memory=rung, dtype=dtype)) for rung in ("auto", *RUNGS)}
    for rung, picture in pictures.items():
        assert np.array_equal(picture, pictures["auto"]), rung


@pytest.mark.parametrize("layout", ["original", "diffusers"])  # views of the file, and matrices put together
def test_a_streamed_model_holds_no_large_layer_between_jobs(tmp_path: Path, layout: str) -> None:
    files = tiny.originals(tmp_path / "a") if layout == "original" else {"all": tiny.pipeline(tmp_path / "a")}
    model = load(*files.values(), memory="stream", dtype="float32")
    wanted = load(*files.values(), memory="resident", dtype="float32")
    fields = {"width": 64, "height": 64}
    assert np.array_equal(drawn(model, **fields), drawn(wanted, **fields))
    for network in (*model.family.encoders, model.family.backbone, model.family.vae):
        for layer in layers_of(network):
            assert not layer.module._forward_pre_hooks


def test_auto_takes_the_highest_rung_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    networks: dict[str, nn.Module] = {"one": Block(), "two": Block()}
    sizes = [model_bytes(networks, rung) for rung in RUNGS]
    assert sizes[0] == sum(map(weight_bytes, networks.values()))
    assert sizes[0] > sizes[1] > sizes[2]
    for size, rung in zip(sizes, RUNGS, strict=True):
        monkeypatch.setattr("calotype.memory.plan.free_memory", lambda _, size=size: size / 0.8 + 1)
        assert choose(networks, CPU) == rung
    monkeypatch.setattr("calotype.memory.plan.free_memory", lambda _: 1)
    assert choose(networks, CPU) == "stream"


def test_held_bytes_are_what_is_held() -> None:
    block = Block()
    large = 4 * (512 * 512 + 512)
    rest = 4 * (2 * 512 + 600 * 512)
    assert held_bytes(block, "resident") == 6 * large + rest
    assert held_bytes(block, "components") == 3 * large + rest + 2 * large  # three pass by, two of them at a time
    assert held_bytes(block, "stream") == rest + 2 * large
    assert held_bytes(nn.Sequential(block.large), "stream") == large  # never more than there is
    assert max(layer.bytes for layer in layers_of(nn.LayerNorm(8))) <= SMALL


# ---- running out


class Exhausted:
    """Fails as torch does when memory is used up, so many times."""

    def __init__(self, times: int) -> None:
        self.left = times

    def __call__(self, *_: object) -> None:
        if self.left:
            self.left -= 1
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"
            )


def events_of(model: Model[object], request: Request) -> list[Event]:
    with closing(stream(model.family, request)) as events:
        return list(events)


def test_a_job_that_runs_out_of_memory_goes_down_a_rung_and_says_so() -> None:
    model = load(memory="resident")
    request = Request(prompt="a red apple", seed=3, count=2, steps=2)
    wanted = [np.asarray(e.image) for e in events_of(load(), request) if isinstance(e, Picture)]
    model.family.backbone.register_forward_pre_hook(Exhausted(1))
    events = events_of(model, request)
    (lowered,) = [event for event in events if isinstance(event, Lowered)]
    assert (lowered.picture, lowered.before, lowered.rung) == (0, "resident", "components")
    assert "can't allocate memory" in lowered.reason
    assert model.family.memory.rung == "components"
    pictures = [np.asarray(event.image) for event in events if isinstance(event, Picture)]
    assert all(map(np.array_equal, pictures, wanted))


def test_pictures_that_are_done_are_not_drawn_again() -> None:
    model = load(memory="resident")
    model.family.vae.register_forward_pre_hook(lambda *_: None)
    calls = iter([None, RuntimeError("CUDA error: out of memory"), None, None])
    decode = model.family.decode

    def decoded(latent: Tensor) -> Tensor:
        if (error := next(calls)) is not None:
            raise error
        return decode(latent)

    model.family.decode = decoded  # pyright: ignore[reportAttributeAccessIssue]
    events = events_of(model, Request(prompt="a red apple", seed=3, count=2, steps=2))
    assert [(e.picture, e.step) for e in events if isinstance(e, Progress)] == [
        (0, 1), (0, 2), (1, 1), (1, 2), (1, 1), (1, 2),
    ]  # fmt: skip
    assert [event.seed for event in events if isinstance(event, Picture)] == [3, 4]
    assert [event.picture for event in events if isinstance(event, Lowered)] == [1]


def test_a_job_that_never_fits_fails_cleanly_and_the_next_one_works() -> None:
    model = load(memory="resident")
    exhausted = Exhausted(3)
    model.family.backbone.register_forward_pre_hook(exhausted)
    with pytest.raises(OutOfMemory, match="ask for a smaller picture"):
        model.generate("a red apple", seed=3, steps=2)
    assert exhausted.left == 0
    assert np.array_equal(drawn(model), drawn(load()))


def test_other_errors_are_not_taken_for_it() -> None:
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_memory(ValueError("out of memory"))
    model = load()
    model.family.backbone.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate("a red apple", seed=3, steps=2)
    assert model.family.memory.rung == "resident"


def test_an_unknown_rung_is_refused() -> None:
    with pytest.raises(RequestError, match="auto, resident, components, stream"):
        load(memory="cloud")


def test_a_layer_has_its_own_weights_alone() -> None:
    layers = list(layers_of(Block()))
    assert [type(layer.module) for layer in layers] == [Block, nn.Linear, nn.LayerNorm, *[nn.Linear] * 5]
    assert isinstance(layers[0], Layer)
    assert [weight.name for weight in layers[0].weights] == ["table"]
