"""How models are stored: files in fewer bits are run as they are, and give what the widened ones give."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
import tiny_gguf
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from calotype.errors import DamagedFile, RequestError
from calotype.families.flux import FluxModel
from calotype.generate import Model
from calotype.loading import describe, load
from calotype.loading.planning import plan
from calotype.memory.pages import pages_of
from calotype.nn import quantized
from calotype.nn.formats import FORMATS
from calotype.nn.linear import Linear
from calotype.nn.packed import Packed, PackedLinear
from calotype.nn.stored import Stored

JOB: dict[str, Any] = {"width": 32, "height": 32, "steps": 2, "seed": 3, "text_tokens": 10, "sampler": "euler"}
RUNGS = ("resident", "components", "stream", "auto")
FLOAT8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
PROMPT = "a red fox in the snow"
T5_256 = tiny.T5Config(
    vocabulary=40, width=48, layers=2, heads=4, head_width=64, mlp_width=256, buckets=8, distance=128
)


def picture(model: Model[Any]) -> np.ndarray[Any, Any]:
    made = model.generate(PROMPT, **JOB)
    assert not isinstance(made, list)
    return np.asarray(made)


def flux(model: Model[Any]) -> FluxModel:
    assert isinstance(model.family, FluxModel)
    return model.family


def kept(network: nn.Module) -> list[Packed]:
    return [layer for layer in network.modules() if isinstance(layer, Packed)]


def stored(state: Mapping[str, Tensor], dtype: torch.dtype, *, all_of_it: bool = False) -> dict[str, Tensor]:
    """As files in float8 are: matrices only, or every tensor."""
    return {key: value.to(dtype) if all_of_it or value.ndim > 1 else value for key, value in state.items()}


# Files in float8, without scales


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("kind", FLOAT8)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", None])
def test_float8_files_give_what_they_give_widened(layout: str, kind: str, dtype: str | None, tmp_path: Path) -> None:
    files = tiny.originals(tmp_path, dtype=torch.bfloat16)
    state = tiny.tensors(tiny.TRANSFORMER, layout, tiny.FLUX, dtype=torch.bfloat16)
    path = tiny.save(tmp_path / "x.safetensors", stored(state, FLOAT8[kind], all_of_it=layout == "original"))
    t5 = tiny.save(tmp_path / "t5.safetensors", stored(load_file(files["t5"]), FLOAT8[kind], all_of_it=True))
    parts = [path, files["clip"], t5, files["vae"]]
    whole = load(*parts, dtype=dtype, storage={"transformer": "none", "t5": "none"})
    wanted = picture(whole)
    assert not kept(flux(whole).transformer)
    assert {tensor.dtype for tensor in flux(whole).transformer.state_dict().values()} == {
        torch.bfloat16 if dtype is None else getattr(torch, dtype)
    }
    for memory in RUNGS:
        model = load(*parts, dtype=dtype, memory=memory)
        assert np.array_equal(picture(model), wanted)
        assert len(kept(flux(model).transformer)) == count(flux(whole).transformer)
        assert len(kept(flux(model).t5)) == count(flux(whole).t5)
        assert not model.storage_errors


def count(network: nn.Module) -> int:
    return sum(isinstance(layer, Linear) for layer in network.modules())


def test_answers_are_equal_to_the_last_bit(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path, dtype=torch.bfloat16)
    path = tiny.save(tmp_path / "x.safetensors", stored(load_file(files["transformer"]), torch.float8_e4m3fn))
    answers: list[Tensor] = []
    for storage in ({}, {"transformer": "none"}):
        network = flux(load(path, files["clip"], files["t5"], files["vae"], storage=storage, memory="resident"))
        drawn = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            text, pooled = (torch.randn(1, 12, 48, generator=drawn), torch.randn(1, 64, generator=drawn))
            given = network.transformer.prepare(text, pooled, 3.5, torch.tensor([0.7]), 10, 10)
            answers.append(network.transformer(torch.randn(1, 100, 64, generator=drawn), given, 0))
    assert torch.equal(*answers)


def test_what_is_kept_is_a_view_of_the_file(tmp_path: Path) -> None:
    """In diffusers' layout, whose queries, keys and values lie apart, and whose last scale has its halves exchanged."""
    files = tiny.originals(tmp_path)
    state = stored(tiny.tensors(tiny.TRANSFORMER, "diffusers", tiny.FLUX), torch.float8_e4m3fn)
    path = tiny.save(tmp_path / "x.safetensors", state)
    model = load(path, files["clip"], files["t5"], files["vae"], memory="stream")
    mapping = model.family.memory._files  # pyright: ignore[reportPrivateUsage]
    network = flux(model).transformer
    values = [tensor for layer in kept(network) for name, tensor in layer.named_buffers() if name.startswith("values")]
    assert len(values) > len(kept(network)), "some weights are made of several"
    assert all(pages_of(tensor, mapping) is not None for tensor in values)
    qkv = network.get_submodule("joint.0.image.qkv")
    assert isinstance(qkv, PackedLinear)
    assert len(qkv.pieces) == 3
    wanted = torch.cat([state[f"transformer_blocks.0.attn.to_{x}.weight"].float() for x in "qkv"])
    assert torch.equal(qkv.rows(0, len(wanted), torch.float32), wanted)
    swapped = network.get_submodule("modulation.out")
    assert isinstance(swapped, PackedLinear)
    assert torch.equal(swapped.widen(0, 512), state["norm_out.linear.weight"].float().roll(256, 0))
    resident = load(path, files["clip"], files["t5"], files["vae"], memory="resident")
    for layer in kept(flux(resident).transformer):
        assert all(pages_of(tensor, mapping) is None for tensor in layer.buffers())


def test_a_scale_for_each_piece(tmp_path: Path) -> None:
    """Scaled files: queries, keys and values have one each, and text encoders in one file with the transformer too."""
    files = tiny.originals(tmp_path)
    state: dict[str, Tensor] = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    plain: dict[str, Tensor] = {}
    drawn = torch.Generator().manual_seed(5)
    for key, value in tiny.tensors(tiny.TRANSFORMER, "diffusers", tiny.FLUX, dtype=torch.bfloat16).items():
        state[key] = plain[key] = value
        if key.endswith(".weight") and value.ndim == 2:
            scale = torch.rand((), generator=drawn) * 1e-3
            state[key] = (value.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            owner = key.removesuffix(".weight")
            state |= {f"{owner}.scale_weight": scale, f"{owner}.scale_input": torch.ones(())}
            plain[key] = (state[key].float() * scale).bfloat16()
    wanted = tiny.save(tmp_path / "plain.safetensors", plain)
    path = tiny.save(tmp_path / "scaled.safetensors", state)
    parts = files["clip"], files["t5"], files["vae"]
    expected = picture(load(wanted, *parts, dtype="bfloat16"))
    for memory in RUNGS:
        model = load(path, *parts, dtype="bfloat16", memory=memory)
        assert np.array_equal(picture(model), expected)
        assert len(kept(flux(model).transformer)) == count(flux(load(wanted, *parts)).transformer)
    widened = load(path, *parts, dtype="bfloat16", storage={"transformer": "none"})
    assert np.array_equal(picture(widened), expected)
    part = next(part for part in describe(path).parts if part.name == "transformer")
    assert list(part.dtypes)[0] in ("F8_E4M3 scaled", "BF16")
    assert set(part.dtypes) == {"F8_E4M3 scaled", "BF16"}


def test_another_scale_is_another_encoder(tmp_path: Path) -> None:
    """Encoders with the same content are loaded once: scales are content."""
    files = tiny.originals(tmp_path)
    state = load_file(files["t5"])
    key = "encoder.block.0.layer.0.SelfAttention.q"
    state[f"{key}.weight"] = state[f"{key}.weight"].to(torch.float8_e4m3fn)
    answers: list[Tensor] = []
    for scale in (1.0, 2.0):
        path = tiny.save(tmp_path / f"{scale}.safetensors", state | {f"{key}.scale_weight": torch.tensor(scale)})
        model = load(files["transformer"], files["clip"], path, files["vae"])
        with torch.inference_mode():
            answers.append(flux(model).t5(torch.tensor([[3, 4, 5]])))
    assert not torch.equal(*answers)


# GGUF files


def as_gguf(state: Mapping[str, Tensor], kinds: tuple[str, ...]) -> dict[str, tuple[str, Tensor]]:
    """Matrices whose rows are whole blocks in these formats, in turns; all else in float32, as city96's files are."""
    turns = cycle(kinds)
    out: dict[str, tuple[str, Tensor]] = {}
    for key, value in state.items():
        kind = next(turns) if value.ndim == 2 else "F32"
        fits = kind != "F32" and value.shape[-1] % FORMATS[kind].weights == 0
        out[key] = (kind if fits else "F32", value)
    return out


LLAMA = {
    "shared.": "token_embd.",
    "encoder.final_layer_norm.": "enc.output_norm.",
    "encoder.block.": "enc.blk.",
    "layer.0.SelfAttention.relative_attention_bias.": "attn_rel_b.",
    "layer.0.SelfAttention.": "attn_",
    "layer.0.layer_norm.": "attn_norm.",
    "layer.1.layer_norm.": "ffn_norm.",
    "layer.1.DenseReluDense.wi_0.": "ffn_gate.",
    "layer.1.DenseReluDense.wi_1.": "ffn_up.",
    "layer.1.DenseReluDense.wo.": "ffn_down.",
}


def llama_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        for theirs, ours in LLAMA.items():
            key = key.replace(theirs, ours)
        out[key] = value
    return out


@pytest.mark.parametrize(
    "kinds", [("Q8_0",), ("Q4_K", "Q6_K"), ("Q5_K",), ("Q4_0",), ("Q4_1", "Q5_0", "Q5_1"), ("IQ4_XS", "Q2_K", "Q3_K")]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gguf_files_give_what_they_give_widened(kinds: tuple[str, ...], dtype: str, tmp_path: Path) -> None:
    """A transformer and a T5 encoder, the latter under llama.cpp's names: end to end, on every rung."""
    files = tiny.originals(tmp_path)
    held = tiny_gguf.write(tmp_path / "flux1-dev.gguf", as_gguf(load_file(files["transformer"]), kinds))
    encoder = tiny.tensors(tiny.T5, "transformers", T5_256, seed=2)
    encoder_held = tiny_gguf.write(tmp_path / "t5.gguf", as_gguf(llama_names(encoder), kinds), "t5encoder")
    names = dict(zip(llama_names(encoder), encoder, strict=True))
    transformer = tiny.save(tmp_path / "wide.safetensors", held)
    t5 = tiny.save(tmp_path / "wide-t5.safetensors", {names[key]: value for key, value in encoder_held.items()})
    beside = files["clip"], files["vae"], tmp_path / "tokenizer_2"
    wanted = picture(load(transformer, t5, *beside, dtype=dtype))
    parts = tmp_path / "flux1-dev.gguf", tmp_path / "t5.gguf", *beside
    for memory in RUNGS if kinds == ("Q8_0",) else ("stream",):
        model = load(*parts, dtype=dtype, memory=memory)
        assert np.array_equal(picture(model), wanted)
        assert len(kept(flux(model).transformer)) > 20
        assert len(kept(flux(model).t5)) >= 2
        assert not model.storage_errors
    widened = load(*parts, dtype=dtype, storage="none")
    assert np.array_equal(picture(widened), wanted)
    assert not kept(flux(widened).transformer)
    assert next(iter(flux(load(*parts)).transformer.parameters())).dtype == torch.bfloat16
    predicted = plan(*parts, width=32, height=32)
    assert (
        predicted.device_bytes["resident"]
        < plan(transformer, t5, *beside, width=32, height=32).device_bytes["resident"]
    )


def test_fused_rows_of_gguf_stay_in_the_file(tmp_path: Path) -> None:
    """Under diffusers' names, each piece in a format of its own."""
    files = tiny.originals(tmp_path)
    state = tiny.tensors(tiny.TRANSFORMER, "diffusers", tiny.FLUX)
    held = tiny_gguf.write(tmp_path / "x.gguf", as_gguf(state, ("Q8_0", "Q4_K", "F16")))
    parts = files["clip"], files["t5"], files["vae"]
    model = load(tmp_path / "x.gguf", *parts, dtype="float32", memory="stream")
    qkv = flux(model).transformer.get_submodule("joint.1.text.qkv")
    assert isinstance(qkv, PackedLinear)
    assert len({name for _, name in qkv.pieces}) > 1
    names = [f"transformer_blocks.1.attn.add_{x}_proj.weight" for x in "qkv"]
    assert torch.equal(qkv.widen(0, 768), torch.cat([held[name] for name in names]))
    wanted = picture(load(tiny.save(tmp_path / "wide.safetensors", held), *parts, dtype="float32"))
    assert np.array_equal(picture(model), wanted)


def test_gguf_files_are_described(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    tiny_gguf.write(tmp_path / "x.gguf", as_gguf(load_file(files["transformer"]), ("Q4_K", "Q8_0")))
    seen = describe(tmp_path / "x.gguf")
    assert (seen.family, seen.supported, seen.parts[0].layout) == ("flux", True, "original")
    assert {"Q4_K", "Q8_0", "F32"} == set(seen.parts[0].dtypes)
    assert seen.parts[0].parameters == sum(tensor.numel() for tensor in load_file(files["transformer"]).values())
    assert seen.parts[0].bytes < seen.parts[0].parameters * 4
    encoder = llama_names(tiny.tensors(tiny.T5, "transformers", T5_256))
    tiny_gguf.write(tmp_path / "t5.gguf", as_gguf(encoder, ("Q8_0",)), "t5encoder")
    seen = describe(tmp_path / "t5.gguf")
    assert (seen.kind, seen.layout, seen.parts[0].name) == ("part", "llama.cpp", "t5")


def test_a_folder_may_hold_gguf_files(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    tiny_gguf.write(tmp_path / "flux1-dev-Q8_0.gguf", as_gguf(load_file(files["transformer"]), ("Q8_0",)))
    files["transformer"].unlink()
    assert kept(flux(load(tmp_path)).transformer)


def test_another_kind_of_model_is_not_taken_for_one(tmp_path: Path) -> None:
    tiny_gguf.write(tmp_path / "x.gguf", {"blk.0.attn_q.weight": ("Q8_0", torch.randn(32, 32))}, "llama")
    assert describe(tmp_path / "x.gguf").kind == "unknown"


def test_a_gguf_file_cut_short_is_damaged(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    path = tmp_path / "x.gguf"
    tiny_gguf.write(path, as_gguf(load_file(files["transformer"]), ("Q8_0",)))
    path.write_bytes(path.read_bytes()[:-40_000])
    with pytest.raises(DamagedFile, match="cut short"):
        load(path, files["clip"], files["t5"], files["vae"])


# Fewer bits than the file has


@pytest.fixture
def small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "LEAST", 2**12)


@pytest.mark.usefixtures("small_layers")
@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [("int8", 0.003, 0.01), ("int4", 0.05, 0.1), ("fp8_e4m3", 0.02, 0.03), ("fp8_e5m2", 0.04, 0.06)],
)
def test_fewer_bits_say_what_they_lose(kind: str, least: float, most: float, tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    parts = [files["transformer"], files["clip"], files["t5"], files["vae"]]
    exact = load(*parts)
    model = load(*parts, storage={"transformer": kind})
    assert model.storage_errors.keys() == {"transformer"}
    assert least < model.storage_errors["transformer"] < most
    network = flux(model).transformer
    narrow = [layer for layer in network.modules() if isinstance(layer, Stored)]
    assert len(narrow) > 20
    answers: list[Tensor] = []
    for each in (exact, model):
        inner = flux(each).transformer
        drawn = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            text, pooled = torch.randn(1, 12, 48, generator=drawn), torch.randn(1, 64, generator=drawn)
            given = inner.prepare(text, pooled, 3.5, torch.tensor([0.7]), 4, 4)
            answers.append(inner(torch.randn(1, 16, 64, generator=drawn), given, 0))
    error = float((answers[1] - answers[0]).norm() / answers[0].norm())
    assert 0 < error < 8 * most  # five blocks on
    assert picture(model).shape == (32, 32, 3)
    for memory in ("resident", "components", "stream"):
        again = load(*parts, storage={"transformer": kind}, memory=memory)
        assert np.array_equal(picture(again), picture(model))


@pytest.mark.usefixtures("small_layers")
def test_one_word_is_for_the_backbone_and_the_largest_encoder(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    parts = [files["transformer"], files["clip"], files["t5"], files["vae"]]
    sizes = {name: sum(t.numel() for t in load_file(files[name]).values()) for name in ("clip", "t5")}
    largest = max(sizes, key=lambda name: sizes[name])
    assert load(*parts, storage="int8").storage_errors.keys() == {"transformer", largest}
    mixed = load(*parts, storage={"*": "int8", "transformer": "fp8_e4m3"})
    assert 0.02 < mixed.storage_errors["transformer"] < 0.03
    assert mixed.storage_errors[largest] < 0.01
    assert not load(*parts, storage="none").storage_errors


def test_wishes_that_cannot_be_met_are_refused(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    parts = [files["transformer"], files["clip"], files["t5"], files["vae"]]
    for storage, said in (
        ("int3", "int8, int4, fp8_e4m3, fp8_e5m2, none"),
        ({"transformer": "q4_k"}, "transformer=q4_k"),
        ({"vae": "int8"}, "transformer, clip, t5"),
        ({"unet": "int8"}, "transformer, clip, t5"),
    ):
        with pytest.raises(RequestError, match=said):
            load(*parts, storage=storage)


@pytest.mark.usefixtures("small_layers")
def test_files_in_fewer_bits_may_be_stored_anew(tmp_path: Path) -> None:
    """What is asked for stands before what the file has; the error is against the file."""
    files = tiny.originals(tmp_path)
    path = tmp_path / "x.gguf"
    tiny_gguf.write(path, as_gguf(load_file(files["transformer"]), ("Q8_0",)))
    model = load(path, files["clip"], files["t5"], files["vae"], storage={"transformer": "int4"})
    assert 0.05 < model.storage_errors["transformer"] < 0.1
    assert not kept(flux(model).transformer)
