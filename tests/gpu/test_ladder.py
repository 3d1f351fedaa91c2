"""The memory ladder on a CUDA device: every rung draws the same picture, within what it may take."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import pytest
import torch

import calotype
from calotype.memory import ladder
from calotype.memory.layers import Layer, layers_of

pytestmark = pytest.mark.gpu
SETTINGS = {"seed": 3, "steps": 4}


@pytest.fixture
def everything_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that layers of a small model come and go like those of a large one."""
    monkeypatch.setattr(ladder, "SMALL", 0)
    monkeypatch.setattr(ladder, "RESERVE", 1.0)


@pytest.fixture
def little_memory() -> Generator[None, None, None]:
    """Torch may take no more of the device than is taken now, and 32 MB."""
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 32e6) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def drawn(memory: str, **chosen: object) -> np.ndarray:
    model = calotype.load(device="cuda", memory=memory, **chosen)
    picture = np.asarray(model.generate("a red apple on a blue background", **SETTINGS))
    assert np.array_equal(np.asarray(model.generate("a red apple on a blue background", **SETTINGS)), picture)
    return picture


@pytest.mark.usefixtures("everything_passes")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_rung_draws_the_same_picture(dtype: str) -> None:
    resident = drawn("resident", dtype=dtype)
    for memory in ("components", "stream"):
        assert np.array_equal(drawn(memory, dtype=dtype), resident), memory


@pytest.mark.usefixtures("everything_passes")
@pytest.mark.parametrize("pinned", [True, False])
def test_a_stream_goes_from_pinned_memory_where_there_is_room(pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "PINNED", 0.5 if pinned else 0.0)
    model = calotype.load(device="cuda", memory="stream")
    model.generate("a red apple", **SETTINGS)
    large = [layer for layer in layers_of(model.family.backbone) if not any(layer.module.children())]
    assert all(weight.shown.is_pinned() == pinned for layer in large for weight in layer.weights)
    assert not any(weight.shown.is_cuda for layer in large for weight in layer.weights)


@pytest.mark.usefixtures("everything_passes")
def test_lower_rungs_hold_less() -> None:
    peaks: list[int] = []
    for memory in ("resident", "components", "stream"):
        model = calotype.load(device="cuda", memory=memory)
        model.generate("a red apple", **SETTINGS)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        model.generate("a blue car", **SETTINGS)
        peaks.append(torch.cuda.max_memory_allocated())
        del model
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 3


@pytest.mark.usefixtures("little_memory")
def test_running_out_of_memory_goes_down_a_rung() -> None:
    model = calotype.load(device="cuda", memory="components")
    with pytest.raises(calotype.OutOfMemory, match="smaller picture"):
        model.generate("a red apple", width=2048, height=2048, **SETTINGS)
    assert model.family.memory.rung == "stream"
    torch.cuda.set_per_process_memory_fraction(1.0)
    wanted = calotype.load(device="cuda").generate("a red apple", **SETTINGS)
    assert np.array_equal(np.asarray(model.generate("a red apple", **SETTINGS)), np.asarray(wanted))


def test_the_same_picture_as_on_the_cpu() -> None:
    on_gpu, on_cpu = (
        np.asarray(calotype.load(device=device, dtype="float32").generate("a red apple", **SETTINGS), dtype=int)
        for device in ("cuda", "cpu")
    )
    assert abs(on_gpu - on_cpu).mean() < 1


def test_layers_are_pinned_once() -> None:
    module = torch.nn.Linear(8, 8)
    layer = Layer(module, {}, ())
    wanted = module.weight.detach().clone()
    layer.pin()
    assert module.weight.is_pinned()
    assert torch.equal(module.weight, wanted)
