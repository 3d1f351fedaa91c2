from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch
from torch import Tensor

from calotype.checkpoint.autoencoders import AUTOENCODER, TINY_AUTOENCODER
from calotype.checkpoint.files import Weights
from calotype.checkpoint.keys import Alias, Extra, Pointwise, Rule, Same, Stacked, Swapped, Table
from calotype.checkpoint.layouts import Part
from calotype.checkpoint.text_encoders import CLIP, T5
from calotype.errors import MissingKeys, UnexpectedKeys, UnsupportedModel, WrongShape
from calotype.families.flux.keys import TRANSFORMER

OURS = {
    "embed.weight": (6, 4),
    "blocks.0.qkv.weight": (9, 4),
    "blocks.0.qkv.bias": (9,),
    "blocks.1.qkv.weight": (9, 4),
    "blocks.1.qkv.bias": (9,),
    "project.weight": (4, 4),
    "project.bias": (4,),
    "norm.weight": (4,),
}
TABLE = Table(
    "toy/other",
    (
        Same("tokens.table", "embed.weight"),
        Stacked(("up.{last-i}.q.*", "up.{last-i}.k.*", "up.{last-i}.v.*"), "blocks.{i}.qkv.*", rows=(4, 2, 3)),
        Pointwise("conv.{i}.*".replace("{i}", "0"), "project.*"),
        Swapped("norm.scale", "norm.weight"),
    ),
    extras=(Extra("positions", (1, 6)), Extra("junk.*")),
    aliases=(Alias("embedding.table", "tokens.table"),),
    numbers={"last": 1},
)
BINDING = TABLE.bind(OURS)


def theirs(path: Path, **changes: Tensor | None) -> Weights:
    """A file of the toy layout, with some tensors added, replaced or (None) taken out."""
    rng = torch.Generator().manual_seed(0)
    state: dict[str, Tensor | None] = {key: torch.randn(shape, generator=rng) for key, shape in BINDING.manifest()}
    state.update(changes)
    tiny.save(path / "toy.safetensors", {key: tensor for key, tensor in state.items() if tensor is not None})
    return Weights.of("toy", [path / "toy.safetensors"])


def test_the_manifest_is_theirs() -> None:
    assert dict(BINDING.manifest(("positions", "embedding.table"))) == {
        "tokens.table": (6, 4),
        **{f"up.{i}.{x}.weight": (rows, 4) for i in (0, 1) for x, rows in (("q", 4), ("k", 2), ("v", 3))},
        **{f"up.{i}.{x}.bias": (rows,) for i in (0, 1) for x, rows in (("q", 4), ("k", 2), ("v", 3))},
        "conv.0.weight": (4, 4, 1, 1),
        "conv.0.bias": (4,),
        "norm.scale": (4,),
        "positions": (1, 6),
        "embedding.table": (6, 4),
    }


def test_each_rule_puts_rows_where_it_says(tmp_path: Path) -> None:
    weights = theirs(tmp_path)
    state = BINDING.load(weights)
    get = weights.mapped
    assert torch.equal(state["embed.weight"], get("tokens.table"))
    # The last of theirs is the first of ours.
    stacked = torch.cat([get("up.1.q.weight"), get("up.1.k.weight"), get("up.1.v.weight")])
    assert torch.equal(state["blocks.0.qkv.weight"], stacked)
    assert torch.equal(state["project.weight"], get("conv.0.weight")[:, :, 0, 0])
    assert torch.equal(state["norm.weight"], get("norm.scale")[[2, 3, 0, 1]])


def test_only_pieces_are_copied(tmp_path: Path) -> None:
    weights = theirs(tmp_path)
    state = BINDING.load(weights)
    assert state["embed.weight"].data_ptr() == weights.mapped("tokens.table").data_ptr()
    assert state["project.weight"].data_ptr() == weights.mapped("conv.0.weight").data_ptr()
    read = BINDING.load(weights, mapped=False)
    assert read["embed.weight"].data_ptr() != weights.mapped("tokens.table").data_ptr()
    assert all(torch.equal(read[key], state[key]) for key in OURS)


def test_a_second_name_is_used_or_dropped(tmp_path: Path) -> None:
    table = torch.ones(6, 4)
    other = theirs(tmp_path / "a", **{"tokens.table": None, "embedding.table": table})
    assert torch.equal(BINDING.load(other)["embed.weight"], table)
    both = theirs(tmp_path / "b", **{"embedding.table": table})
    assert not torch.equal(BINDING.load(both)["embed.weight"], table)


def test_harmless_extras_load(tmp_path: Path) -> None:
    extras: dict[str, Tensor | None] = {"positions": torch.arange(6)[None], "junk.x.y": torch.zeros(1)}
    assert BINDING.load(theirs(tmp_path, **extras)).keys() == OURS.keys()


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingKeys, match=r"toy.*'up\.0\.k\.bias'"):
        BINDING.load(theirs(tmp_path / "a", **{"up.0.k.bias": None}))
    with pytest.raises(UnexpectedKeys, match=r"'foo\.bar'") as unexpected:
        BINDING.load(theirs(tmp_path / "b", **{"foo.bar": torch.zeros(1)}))
    assert unexpected.value.keys == ("foo.bar",)
    with pytest.raises(WrongShape, match=r"'norm\.scale' is \(5,\).*\(4,\)"):
        BINDING.load(theirs(tmp_path / "c", **{"norm.scale": torch.zeros(5)}))


def test_pieces_of_different_types_need_a_dtype(tmp_path: Path) -> None:
    weights = theirs(tmp_path, **{"up.0.k.bias": torch.zeros(2, dtype=torch.float16)})
    with pytest.raises(UnsupportedModel, match="different types"):
        BINDING.load(weights)
    assert BINDING.load(weights, torch.float32)["blocks.1.qkv.bias"].dtype == torch.float32


def test_a_table_must_cover_each_of_ours_once() -> None:
    with pytest.raises(AssertionError, match=r"0 rules for new\.weight"):
        TABLE.bind({**OURS, "new.weight": (1,)})
    twice: tuple[Rule, ...] = (*TABLE.rules, Same("again", "norm.weight"))
    with pytest.raises(AssertionError, match=r"2 rules for norm\.weight"):
        replace(TABLE, rules=twice).bind(OURS)


LAYOUTS: dict[str, tuple[Part[Any], str, object]] = {
    "flux dev original": (TRANSFORMER, "original", tiny.FLUX),
    "flux dev diffusers": (TRANSFORMER, "diffusers", tiny.FLUX),
    "flux schnell original": (TRANSFORMER, "original", replace(tiny.FLUX, guidance_input=False)),
    "flux schnell diffusers": (TRANSFORMER, "diffusers", replace(tiny.FLUX, guidance_input=False)),
    "flux fill": (TRANSFORMER, "diffusers", replace(tiny.FLUX, image_width=384)),
    "clip": (CLIP, "transformers", tiny.CLIP_TEXT),
    "clip bare": (CLIP, "transformers-bare", tiny.CLIP_TEXT),
    "clip projected": (CLIP, "transformers", replace(tiny.CLIP_TEXT, projection=32)),
    "t5": (T5, "transformers", tiny.T5_TEXT),
    "vae original": (AUTOENCODER, "original", tiny.VAE),
    "vae diffusers": (AUTOENCODER, "diffusers", tiny.VAE),
    "vae of sd": (AUTOENCODER, "original", replace(tiny.VAE, quant_convs=True, latent_channels=4)),
    "tiny original": (TINY_AUTOENCODER, "taesd", tiny.TINY_VAE),
    "tiny diffusers": (TINY_AUTOENCODER, "diffusers-tiny", tiny.TINY_VAE),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_what_was_loaded_gives_the_same_file(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    part, layout_name, config = LAYOUTS[name]
    layout = part.layout(layout_name)
    assert layout is not None
    wanted = tiny.tensors(part, layout_name, config, dtype=dtype)
    weights = Weights.of(name, [tiny.save(tmp_path / "x.safetensors", wanted)])
    network, binding = part.bind(layout, config)
    state = binding.load(weights)
    network.load_state_dict(state, assign=True)  # strict: every tensor of the network, and no other
    back = dict(binding.save(network.state_dict()))
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[key], wanted[key]) and back[key].dtype == dtype for key in wanted)


def test_layouts_of_one_part_hold_the_same_network(tmp_path: Path) -> None:
    for part, config in ((TRANSFORMER, tiny.FLUX), (AUTOENCODER, tiny.VAE), (TINY_AUTOENCODER, tiny.TINY_VAE)):
        first, second = part.layouts
        weights = Weights.of("x", [tiny.save(tmp_path / "x.safetensors", tiny.tensors(part, first.name, config))])
        _, one = part.bind(first, config)
        _, other = part.bind(second, config)
        state = one.load(weights)
        path = tiny.save(tmp_path / "y.safetensors", {k: v.contiguous() for k, v in other.save(state)})
        back = other.load(Weights.of("y", [path]))
        assert all(torch.equal(back[key], state[key]) for key in state)
