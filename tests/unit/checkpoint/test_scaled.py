"""float8 with scales beside the weights: taken together, and what is scaled otherwise left to be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch
from torch import Tensor

from calotype.checkpoint.files import Weights
from calotype.checkpoint.scaled import with_scales
from calotype.errors import UnsupportedModel
from calotype.loading import convert, describe, load
from calotype.nn.packed import Packed

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def opened(folder: Path, state: dict[str, Tensor]) -> Weights:
    return with_scales(Weights.of("x", [tiny.save(folder / "x.safetensors", state)]))


def note(**content: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1)])
def test_scales_are_taken_to_their_weights(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    weight, scale = torch.randn(6, 8).to(dtype), torch.rand(shape) + 0.1
    state = {
        "a.weight": weight,
        "a.bias": torch.randn(6),
        f"a.{name}": scale,
        "scaled_fp8": torch.empty(0, dtype=dtype),
    }
    state |= {"a.scale_input": torch.ones(()), "b.weight": torch.randn(2, 2)}
    weights = opened(tmp_path, state)
    assert set(weights) == {"a.weight", "a.bias", "b.weight"}
    wanted = weight.float() * (scale if scale.numel() == 1 else scale.view(6, 1))
    assert torch.equal(weights.mapped("a.weight"), wanted)
    out = torch.empty(3, 8, dtype=torch.bfloat16)
    weights.read("a.weight", out, row=2)
    assert torch.equal(out, wanted[2:5].bfloat16())
    piece = weights.piece("a.weight", 2, 3, mapped=True)
    assert piece is not None
    assert torch.equal(Packed((3, 8), [piece], torch.float32).widen(0, 3), wanted[2:5])
    assert weights["a.weight"].stored == ("F8_E4M3" if dtype == E4M3 else "F8_E5M2")


def test_weights_of_any_float_may_have_a_scale(tmp_path: Path) -> None:
    weight = torch.randn(6, 8).bfloat16()
    weights = opened(tmp_path, {"a.weight": weight, "a.scale_weight": torch.tensor(0.3)})
    assert torch.equal(weights.mapped("a.weight"), weight.float() * torch.tensor(0.3))


def test_plain_files_stay_as_they_are(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "x.safetensors", {"a.weight": torch.randn(2, 2).to(E4M3), "norm.scale": torch.ones(2)})
    weights = Weights.of("x", [path])
    assert with_scales(weights) is weights


def test_newer_files_name_their_format(tmp_path: Path) -> None:
    state = {
        "a.weight": torch.randn(4, 4).to(E4M3),
        "a.weight_scale": torch.tensor(2.0),
        "a.comfy_quant": note(format="float8_e4m3fn", full_precision_matrix_mult=True),
    }
    assert set(opened(tmp_path, state)) == {"a.weight"}


BLOCKS: dict[str, dict[str, Tensor]] = {
    "scales of blocks": {"img_in.weight_scale": torch.ones(8, 2)},
    "another format": {"img_in.comfy_quant": note(format="mxfp8"), "img_in.weight_scale": torch.tensor(1.0)},
    "no JSON": {"img_in.comfy_quant": torch.ones(5, dtype=torch.uint8)},
    "a list": {"img_in.comfy_quant": torch.frombuffer(bytearray(b"[1]"), dtype=torch.uint8)},
    "two scales": {"img_in.weight_scale": torch.tensor(1.0), "img_in.weight_scale_2": torch.tensor(1.0)},
    "a scale of whole numbers": {"img_in.weight_scale": torch.tensor(1)},
    "a scale of nothing": {"img_out.weight_scale": torch.tensor(1.0)},
}


@pytest.mark.parametrize("what", BLOCKS)
def test_other_scales_are_refused_by_name(what: str, tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    state = tiny.tensors(tiny.TRANSFORMER, "original", tiny.FLUX) | BLOCKS[what]
    path = tiny.save(tmp_path / "other.safetensors", state)
    with pytest.raises(UnsupportedModel, match="quantised by ComfyUI in blocks"):
        load(path, files["clip"], files["t5"], files["vae"])
    seen = describe(path)
    assert not seen.supported
    assert "in blocks" in seen.note


def test_scaled_files_are_described_and_not_converted(tmp_path: Path) -> None:
    state = tiny.tensors(tiny.TRANSFORMER, "original", tiny.FLUX)
    state |= {"img_in.weight": state["img_in.weight"].to(E4M3), "img_in.scale_weight": torch.tensor(0.5)}
    path = tiny.save(tmp_path / "x.safetensors", state)
    (part,) = describe(path).parts
    assert part.dtypes["F8_E4M3 scaled"] == 1
    assert part.parameters == sum(tensor.numel() for tensor in state.values()) - 1
    with pytest.raises(UnsupportedModel, match="F8_E4M3 with scales"):
        convert(path, tmp_path / "out", "diffusers")
