"""Every family draws the same picture on every rung of the memory ladder, and is planned without being read."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_flux
import tiny_hunyuan
import tiny_sd3
import tiny_unets

import calotype
from calotype.loading.planning import plan
from calotype.memory import ladder
from calotype.memory.ladder import RUNGS
from calotype.memory.layers import layers_of
from calotype.nn import quantized
from calotype.nn.stored import Stored


def kolors(folder: Path) -> object:
    spec = importlib.util.find_spec("diffsynth")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the tokenizers that diffsynth 1.1.9's wheel carries: pip install --no-deps diffsynth==1.1.9")
    root = Path(next(iter(spec.submodule_search_locations)))
    return tiny_unets.kolors(folder, root / "tokenizer_configs" / "kolors" / "tokenizer")


FAMILIES: dict[str, Callable[[Path], object]] = {
    "flux": lambda folder: tiny_flux.build(folder, guidance=True),
    "sd1": tiny_unets.sd1,
    "sdxl": tiny_unets.sdxl,
    "sd3": lambda folder: tiny_sd3.build(folder, norms=True, dual=(0, 1)),
    "kolors": kolors,
    "hunyuan_dit": lambda folder: tiny_hunyuan.hunyuan(folder, styled=True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rung_draws_the_same_picture(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FAMILIES[family](tmp_path)
    monkeypatch.setattr(ladder, "SMALL", 0)  # so that every layer comes and goes
    fields = {"width": 64, "height": 64, "steps": 2, "seed": 0, "cfg_scale": 3.0, "negative_prompt": "dull"}
    pictures: dict[str, np.ndarray] = {}
    for rung in RUNGS:
        model = calotype.load(tmp_path, memory=rung, dtype="float32")
        assert model.family.family == family
        passing = [layer for layer in layers_of(model.family.backbone) if not any(layer.module.children())]
        met: set[object] = set()
        for layer in passing:
            layer.module.register_forward_hook(lambda module, *_, met=met: met.add(module))
        pictures[rung] = np.asarray(model.generate("a (red:1.3) fox", **fields))
        assert np.array_equal(pictures[rung], pictures["resident"]), rung
        # A layer that is read without being called would be missing on the lower rungs of a GPU.
        unmet = [type(layer.module).__name__ for layer in passing if layer.module not in met]
        assert not unmet, unmet


@pytest.mark.parametrize("kind", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_fewer_bits_stream_as_well(
    family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FAMILIES[family](tmp_path)
    monkeypatch.setattr(ladder, "SMALL", 0)
    monkeypatch.setattr(quantized, "LEAST", 2**10)
    pictures: list[np.ndarray] = []
    for rung in ("resident", "stream"):
        model = calotype.load(tmp_path, memory=rung, dtype="float32", storage=kind)
        assert sum(isinstance(layer, Stored) for layer in model.family.backbone.modules()) > 5
        pictures.append(np.asarray(model.generate("a red fox", width=64, height=64, steps=1, seed=0)))
    assert np.array_equal(*pictures)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_planned(family: str, tmp_path: Path) -> None:
    FAMILIES[family](tmp_path)
    planned = plan(tmp_path, width=128, height=64)
    assert planned.model.startswith(f"{family}/")
    assert all(phase.activations > 0 for phase in planned.phases)
    peaks = [planned.device_bytes[rung] for rung in RUNGS]
    assert peaks == sorted(peaks, reverse=True)
