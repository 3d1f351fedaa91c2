"""Tiny models of the UNet families through files: converted there and back, told by markers, given new words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import tiny_stable as stable
import torch
from safetensors.torch import load_file
from torch import Tensor

from calotype.errors import UnsupportedModel
from calotype.families.unets import UNetModel
from calotype.generate import Model
from calotype.loading import convert, describe, load
from calotype.request import Request
from calotype.sampling.levels import Levels

DTYPES = [torch.float32, torch.bfloat16]
UNET, VAE = "model.diffusion_model.", "first_stage_model."


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Bit for bit, under the same keys, in the same types."""
    return found.keys() == wanted.keys() and all(
        found[key].dtype == wanted[key].dtype and torch.equal(found[key], wanted[key]) for key in wanted
    )


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def networks(model: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """Everything that a model of these families loaded, under our own names."""
    family = model.family
    assert isinstance(family, UNetModel)
    held = {"unet": family.backbone, "vae": family.vae, **{str(i): e for i, e in enumerate(family.encoders)}}
    return {f"{name}.{key}": tensor for name, net in held.items() for key, tensor in net.state_dict().items()}


# ---- conversion


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_single_file_converts_to_a_folder_and_back(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    state = getattr(stable, family)(dtype)
    single = tiny.save(tmp_path / "single.safetensors", state)
    tokenizers = stable.tokenizers(tmp_path)
    convert(single, tmp_path / "folder", "diffusers")
    convert(tmp_path / "folder", tmp_path / "back", "original")
    assert same(load_file(tmp_path / "back" / "unet.safetensors"), part(state, UNET))
    assert same(load_file(tmp_path / "back" / "vae.safetensors"), part(state, VAE))
    first = "cond_stage_model.transformer." if family == "sd1" else "conditioner.embedders.0.transformer."
    encoder = load_file(tmp_path / "folder" / "text_encoder" / "model.safetensors")
    assert same(encoder, part(state, first))
    # The folder, converted on, holds the same: whatever layout a part went through.
    wanted = networks(load(single, *tokenizers))
    for name in ("folder", "back"):
        assert same(networks(load(tmp_path / name, *tokenizers)), wanted)


def test_the_second_encoder_is_cut_and_turned_bit_for_bit(tmp_path: Path) -> None:
    """OpenCLIP stacks queries, keys and values, and has its projection the other way round."""
    state = stable.sdxl(torch.bfloat16)
    convert(tiny.save(tmp_path / "single.safetensors", state), tmp_path / "folder", "diffusers")
    written = load_file(tmp_path / "folder" / "text_encoder_2" / "model.safetensors")
    theirs = part(state, "conditioner.embedders.1.model.")
    attention = "text_model.encoder.layers.0.self_attn"
    stacked = torch.cat([written[f"{attention}.{x}_proj.weight"] for x in "qkv"])
    assert torch.equal(stacked, theirs["transformer.resblocks.0.attn.in_proj_weight"])
    assert torch.equal(written["text_projection.weight"].t(), theirs["text_projection"])
    assert torch.equal(written["text_model.embeddings.position_embedding.weight"], theirs["positional_embedding"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_kolors_parts_convert_there_and_back(tmp_path: Path, dtype: torch.dtype) -> None:
    parts = stable.kolors(tmp_path / "parts", dtype)
    for path in parts[:3]:
        folder, back = tmp_path / "folder" / path.stem, tmp_path / "back" / path.name
        convert(path, folder, "diffusers")
        convert(folder, back, "original")
        kept = {key: tensor for key, tensor in load_file(path).items() if not key.endswith("inv_freq")}
        assert same(load_file(back), kept)
    folders = [tmp_path / "folder" / path.stem for path in parts[:3]]
    wanted = networks(load(*parts))
    assert same(networks(load(*folders, parts[3])), wanted)
    # A whole model too.
    convert(tmp_path / "parts", tmp_path / "pipeline", "diffusers")
    assert same(networks(load(tmp_path / "pipeline")), wanted)


def test_an_autoencoder_alone_gets_no_scale_that_is_a_guess(tmp_path: Path) -> None:
    """SDXL's and Stable Diffusion 1's have the same tensors: what it is for is not in the file."""
    state = part(stable.sd1(), VAE)
    convert(tiny.save(tmp_path / "vae.safetensors", state), tmp_path / "alone", "diffusers")
    assert "scaling_factor" not in json.loads((tmp_path / "alone" / "config.json").read_text())
    for family, scale in (("sd1", 0.18215), ("sdxl", 0.13025)):
        whole = tiny.save(tmp_path / f"{family}.safetensors", getattr(stable, family)())
        convert(whole, tmp_path / family, "diffusers")
        assert json.loads((tmp_path / family / "vae" / "config.json").read_text())["scaling_factor"] == scale
        model = load(whole, tmp_path / "alone", *stable.tokenizers(tmp_path))
        assert model.family.vae.config.scale == scale


def test_diffusers_reads_a_converted_unet(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    convert(tiny.save(tmp_path / "single.safetensors", stable.sdxl()), tmp_path / "folder", "diffusers")
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "folder" / "unet")
    stored = load_file(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors")
    assert same(dict(theirs.state_dict()), stored)


# ---- markers


def levels_of(model: Any) -> tuple[str, Levels]:  # noqa: ANN401
    family = model.family
    assert isinstance(family, UNetModel)
    return family.prediction, family.diffusion.levels(family.diffusion.schedule, 4, 1.0)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_markers_of_a_single_file_say_what_it_predicts(tmp_path: Path, family: str) -> None:
    state = getattr(stable, family)()
    tokenizers = stable.tokenizers(tmp_path)
    plain = "1.x" if family == "sd1" else "base"
    for markers, variant, prediction, pure in (
        ((), plain, "noise", False),
        (("v_pred",), f"{plain}-v", "v", False),
        (("v_pred", "ztsnr"), f"{plain}-v-zsnr", "v", True),
    ):
        marked = {**state, **{name: torch.zeros(0) for name in markers}}
        path = tiny.save(tmp_path / "model.safetensors", marked)
        assert (describe(path).variant, describe(path).note) == (variant, "complete")
        model = load(path, *tokenizers)
        assert model.name == f"{family}/{variant}"
        predicted, levels = levels_of(model)
        assert predicted == prediction
        first = levels.path[0]
        assert (first.alpha == 0) == pure  # pure noise: nothing of the picture is left at the first level
        model.generate("a red fox", width=32, height=32, steps=2, seed=1)
    # A folder says the same in its scheduler's configuration.
    convert(path, tmp_path / "folder", "diffusers")
    predicted, levels = levels_of(load(tmp_path / "folder", *tokenizers))
    assert predicted == "v"
    assert levels.path[0].alpha < 1e-3
    assert describe(tmp_path / "folder").variant == f"{plain}-v-zsnr"


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_unet_told_the_guidance_is_refused_with_its_model(tmp_path: Path, layout: str) -> None:
    state = stable.sd1()
    name = "time_embed" if layout == "original" else "time_embedding"
    if layout == "original":
        state[f"{UNET}{name}.cond_proj.weight"] = torch.zeros(32, 256)
        source = tiny.save(tmp_path / "lcm.safetensors", state)
    else:
        convert(tiny.save(tmp_path / "single.safetensors", state), tmp_path / "folder", "diffusers")
        source = tmp_path / "folder"
        unet = source / "unet" / "diffusion_pytorch_model.safetensors"
        tiny.save(unet, {**load_file(unet), f"{name}.cond_proj.weight": torch.zeros(32, 256)})
    seen = describe(source)
    assert (seen.family, seen.variant, seen.supported) == ("sd1", "lcm", False)
    assert "guidance by an embedding" in seen.note
    with pytest.raises(UnsupportedModel, match="the unet of sd1 lcm: .*guidance by an embedding.*LCM LoRA"):
        load(source, *stable.tokenizers(tmp_path))


def test_a_unet_that_edits_is_refused_by_name(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "model.safetensors", stable.sd1(unet=replace(stable.SD1, channels_in=8)))
    assert (describe(path).variant, describe(path).supported) == ("instruct-pix2pix", False)
    with pytest.raises(UnsupportedModel, match="Stable Diffusion instruct-pix2pix: recognised, but .* 8 channels"):
        load(path, *stable.tokenizers(tmp_path))


def test_a_unet_that_inpaints_draws_without_a_mask_too(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "model.safetensors", stable.sd1(unet=replace(stable.SD1, channels_in=9)))
    assert (describe(path).variant, describe(path).supported) == ("inpainting", True)
    model = load(path, *stable.tokenizers(tmp_path))
    drawn = model.generate("a red fox", width=32, height=32, steps=2, seed=1, cfg_scale=2.0)
    assert drawn.size == (32, 32)


# ---- textual inversion


def read(model: Model[Any], prompt: str) -> Tensor:
    """What the UNet is told of a prompt."""
    family = model.family
    assert isinstance(family, UNetModel)
    return family.condition(prompt, Request(prompt=prompt).complete(family.defaults, seed=1), negative=False).texts[0]


def test_an_embedding_among_the_sources_is_a_word_of_prompts(tmp_path: Path) -> None:
    clip = replace(stable.CLIP_L, width=768, heads=12, layers=1, mlp_width=32)
    unet = replace(stable.SD1, text_width=768)
    path = tiny.save(tmp_path / "model.safetensors", stable.sd1(clip=clip, unet=unet))
    vectors = torch.randn(3, 768, generator=torch.Generator().manual_seed(5))
    word = tiny.save(tmp_path / "snow-style.safetensors", {"emb_params": vectors})
    tokenizers = stable.tokenizers(tmp_path)
    plain, taught = load(path, *tokenizers), load(word, path, *tokenizers)
    texts = [{prompt: read(model, prompt) for prompt in ("a fox", "a fox snow-style")} for model in (plain, taught)]
    assert torch.equal(texts[0]["a fox"], texts[1]["a fox"])
    assert not torch.allclose(texts[0]["a fox snow-style"], texts[1]["a fox snow-style"])
    assert describe(word).kind == "embedding"
    pictures = [model.generate("snow-style", width=32, height=32, steps=2, seed=1) for model in (plain, taught)]
    assert pictures[0].tobytes() != pictures[1].tobytes()  # pyright: ignore[reportAttributeAccessIssue]


def test_an_embedding_for_sdxl_reaches_both_encoders(tmp_path: Path) -> None:
    clip_l = replace(stable.CLIP_L, width=768, heads=12, mlp_width=32)
    clip_g = replace(stable.CLIP_G, width=1280, heads=20, projection=1280)
    path = tiny.save(tmp_path / "model.safetensors", stable.sdxl(clip_l=clip_l, clip_g=clip_g))
    rng = torch.Generator().manual_seed(5)
    both = {"clip_l": torch.randn(2, 768, generator=rng), "clip_g": torch.randn(2, 1280, generator=rng)}
    word = tiny.save(tmp_path / "ink.safetensors", both)
    assert describe(word).family == "sdxl"
    tokenizers = stable.tokenizers(tmp_path)
    plain, taught = (read(load(*sources, *tokenizers), "ink") for sources in ((path,), (path, word)))
    for encoder in (slice(0, 768), slice(768, None)):
        assert not torch.allclose(plain[..., encoder], taught[..., encoder])
