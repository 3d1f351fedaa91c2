"""Encoders with the same content are loaded once in a process, and a prompt that one model met is known to the next."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from calotype import load
from calotype.generate import Model
from calotype.loading.sharing import PROMPTS
from calotype.memory.ladder import RUNGS


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Prompts of other tests are not remembered."""
    PROMPTS.clear()
    yield
    PROMPTS.clear()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return tiny.originals(tmp_path)


def encoders(model: Model[object]) -> tuple[nn.Module, ...]:
    return model.family.encoders


def changed(path: Path, to: Path) -> Path:
    """Another training of the same encoder: one tensor differs."""
    state = load_file(path)
    name = max(state, key=lambda key: state[key].numel())
    save_file({**state, name: state[name] + 1}, to)
    return to


@pytest.mark.parametrize("memory", ["auto", *RUNGS])
def test_two_models_hold_one_encoder(files: dict[str, Path], tmp_path: Path, memory: str) -> None:
    first = load(*files.values(), memory=memory)
    copy = tmp_path / "elsewhere.safetensors"  # the same bytes under another name
    shutil.copy(files["t5"], copy)
    second = load(*(copy if path == files["t5"] else path for path in files.values()), memory=memory)
    assert all(a is b for a, b in zip(encoders(first), encoders(second), strict=True))
    assert first.family.backbone is not second.family.backbone
    fields = {"width": 64, "height": 64, "steps": 1, "seed": 0}
    assert np.array_equal(np.asarray(first.generate("a fox", **fields)), np.asarray(second.generate("a fox", **fields)))


def test_an_encoder_whose_file_was_written_to_is_not_given_on(files: dict[str, Path], tmp_path: Path) -> None:
    """Views of it are of what it holds now."""
    gc.collect()  # another test's model may hold such an encoder, from a file of its own
    copy = tmp_path / "elsewhere.safetensors"
    shutil.copy(files["t5"], copy)
    wanted = sum(float(tensor.double().abs().sum()) for tensor in load_file(copy).values())
    first = load(*files.values())
    with files["t5"].open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(4096))
    second = load(*(copy if path == files["t5"] else path for path in files.values()))
    (clip, t5), (clip_again, t5_again) = encoders(first), encoders(second)
    assert clip is clip_again
    assert t5 is not t5_again
    assert sum(float(tensor.double().abs().sum()) for tensor in t5_again.state_dict().values()) == pytest.approx(wanted)


def test_another_training_type_or_storage_is_another_encoder(files: dict[str, Path], tmp_path: Path) -> None:
    first = load(*files.values())
    other = changed(files["t5"], tmp_path / "other.safetensors")
    second = load(*(other if path == files["t5"] else path for path in files.values()))
    assert encoders(first)[0] is encoders(second)[0]
    assert encoders(first)[1] is not encoders(second)[1]
    assert encoders(load(*files.values(), dtype="bfloat16"))[1] is not encoders(first)[1]
    assert encoders(load(*files.values(), memory="stream"))[1] is not encoders(first)[1]


def test_an_encoder_goes_with_the_last_model_that_has_it(files: dict[str, Path]) -> None:
    first, second = load(*files.values()), load(*files.values())
    here = encoders(first)[1]
    mark = nn.Parameter(torch.zeros(1))
    here.register_parameter("mark", mark)
    del here, first
    gc.collect()
    assert hasattr(encoders(second)[1], "mark")
    del second
    gc.collect()
    assert not hasattr(encoders(load(*files.values()))[1], "mark")


def test_a_prompt_is_read_once_for_all_models_of_a_kind(files: dict[str, Path], tmp_path: Path) -> None:
    fields = {"width": 64, "height": 64, "steps": 1, "seed": 0}
    first, second = load(*files.values()), load(*files.values())
    calls: list[str] = []
    encoders(first)[1].register_forward_hook(lambda *_: calls.append("t5"))
    first.generate("a fox", **fields)
    assert calls == ["t5"]
    second.generate("a fox", **fields)
    first.generate("a fox", **{**fields, "seed": 1})
    assert calls == ["t5"]
    second.generate("a hen", **fields)
    assert calls == ["t5", "t5"]
    other = changed(files["t5"], tmp_path / "other.safetensors")
    third = load(*(other if path == files["t5"] else path for path in files.values()))
    encoders(third)[1].register_forward_hook(lambda *_: calls.append("other t5"))
    third.generate("a fox", **fields)
    assert calls == ["t5", "t5", "other t5"]
