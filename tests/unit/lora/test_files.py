"""Every spelling of a LoRA, by documented key names, against the merged weight computed here by its definition."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny as tiny_networks
import tiny_checkpoints as tiny
import tiny_glm
import tiny_stable
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from calotype.checkpoint.chatglm import CHATGLM
from calotype.checkpoint.files import Weights
from calotype.checkpoint.layouts import Part
from calotype.checkpoint.text_encoders import CLIP, T5
from calotype.errors import CalotypeError, DamagedFile, LoadError, SourceNotFound, UnexpectedKeys, WrongShape
from calotype.families.adapters import fitting
from calotype.families.flux.keys import TRANSFORMER as FLUX
from calotype.families.hunyuan_dit.config import V1_2 as HUNYUAN_CONFIG
from calotype.families.hunyuan_dit.keys import TRANSFORMER as HUNYUAN
from calotype.families.kolors.keys import UNET as KOLORS
from calotype.families.sd1.keys import UNET as SD1
from calotype.families.sd3.config import Sd3Config
from calotype.families.sd3.keys import TRANSFORMER as SD3
from calotype.families.sdxl.keys import UNET as SDXL
from calotype.loading import describe
from calotype.lora import layers
from calotype.lora.attach import Adapter, read
from calotype.lora.files import find, groups, summary
from calotype.lora.layers import merged
from calotype.lora.targets import Adaptable

State = dict[str, Tensor]
Expected = dict[str, tuple[int, Tensor]]  # our weight -> the row that a change begins at, and the change

SD3_TINY = Sd3Config(
    channels_in=4,
    channels_out=4,
    patch=2,
    text_width=48,
    pooled_width=40,
    width=32,
    heads=2,
    mlp_width=64,
    blocks=3,
    positions=8,
    dual=(0,),
    norms=True,
)
HUNYUAN_TINY = replace(
    HUNYUAN_CONFIG,
    width=32,
    heads=2,
    mlp_width=48,
    blocks=4,
    text_width=24,
    t5_width=40,
    text_tokens=7,
    t5_tokens=9,
    pooled_width=20,
)


def network(part: Part[Any], config: object, role: str, folder: str, *, seed: int = 0) -> Adaptable:
    with torch.device("cpu"):
        made = part.network(config)
    return Adaptable(role, folder, tiny_networks.scattered(made, seed), part, config, folder in ("unet", "transformer"))


@cache
def model(family: str) -> tuple[Adaptable, ...]:
    clip = network(CLIP, tiny.CLIP_TEXT, "clip_l", "text_encoder", seed=1)
    if family in ("sd1", "sdxl", "kolors"):
        part, config = {
            "sd1": (SD1, tiny_stable.SD1),
            "sdxl": (SDXL, tiny_stable.SDXL),
            "kolors": (KOLORS, replace(tiny_stable.SDXL, text_width_in=24, vector_width=24 + 6 * 256)),
        }[family]
        unet = network(part, config, "unet", "unet")
        if family == "kolors":
            return (unet, network(CHATGLM, tiny_glm.CHATGLM, "chatglm", "text_encoder"))
        return (
            (unet, clip) if family == "sd1" else (unet, clip, network(CLIP, tiny.CLIP_TEXT, "clip_g", "text_encoder_2"))
        )
    t5 = network(T5, tiny.T5_TEXT, "t5", "text_encoder_3" if family == "sd3" else "text_encoder_2", seed=2)
    if family == "flux":
        return network(FLUX, tiny.FLUX, "transformer", "transformer"), clip, t5
    if family == "hunyuan_dit":
        return (network(HUNYUAN, HUNYUAN_TINY, "transformer", "transformer"),)
    return network(SD3, SD3_TINY, "transformer", "transformer"), clip, t5


class Draw:
    """Random matrices, by name."""

    def __init__(self, seed: int = 7) -> None:
        self._rng = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._rng)

    def pair(self, out: int, inner: int, rank: int = 3) -> tuple[Tensor, Tensor]:
        """up, down"""
        return self(out, rank), self(rank, inner)


def kohya(name: str, up: Tensor, down: Tensor, alpha: float | None = None) -> State:
    state = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    return state if alpha is None else {**state, f"{name}.alpha": torch.tensor(alpha)}


def peft(name: str, up: Tensor, down: Tensor) -> State:
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


def opened(folder: Path, state: State, metadata: dict[str, str] | None = None, name: str = "ink") -> Weights:
    kept = {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
    path = tiny.save(folder / f"{name}.safetensors", kept, metadata)
    return Weights.of(str(path), [path])


def changed(adapter: Adapter, networks: tuple[Adaptable, ...]) -> dict[str, Tensor]:
    """All of our weights that an adapter changes, by role and name, less what they were."""
    roles = {one.network: one.role for one in networks}
    found: dict[str, Tensor] = {}
    for site, placed in adapter.changes.items():
        weight = site.module.weight
        assert isinstance(weight, nn.Parameter)
        parts = [(each, 1.0) for each in placed]
        made = merged(weight, parts)
        with mock.patch.object(layers, "BLOCK", 3 * weight[0].numel()):  # three rows at a time
            assert torch.allclose(merged(weight, parts), made, atol=1e-6)
        found[f"{roles[site.network]}.{site.path}"] = made - weight
    return found


def agree(found: dict[str, Tensor], wanted: Expected) -> None:
    assert set(found) == set(wanted)
    for name, (start, change) in wanted.items():
        rows = torch.zeros_like(found[name])
        rows[start : start + len(change)] = change.reshape(-1, *rows.shape[1:])
        assert torch.allclose(found[name], rows, atol=2e-5), name


def sd1_kohya(draw: Draw) -> tuple[State, Expected]:
    (a, b), (c, d), (e, f) = draw.pair(32, 32), draw.pair(32, 64), draw.pair(96, 64)
    block = "lora_unet_down_blocks_0_attentions_0"
    state = {
        **kohya(f"{block}_transformer_blocks_0_attn1_to_q", a, b, alpha=1.5),
        **kohya(f"{block}_transformer_blocks_0_attn2_to_v", c, d),  # without alpha: as strong as it is
        **kohya(f"{block}_proj_in", a[:, :, None, None], b[:, :, None, None], alpha=6.0),  # a linear layer here
        **kohya("lora_te_text_model_encoder_layers_1_mlp_fc1", e, f, alpha=3.0),
    }
    ours = "unet.down.0.transformers.0"
    return state, {
        f"{ours}.blocks.0.self_attention.q": (0, 0.5 * a @ b),
        f"{ours}.blocks.0.cross_attention.v": (0, c @ d),
        f"{ours}.inward": (0, 2 * a @ b),
        "clip_l.layers.1.mlp_in": (0, e @ f),
    }


def sdxl_kohya(draw: Draw) -> tuple[State, Expected]:
    a, b = draw.pair(128, 896)
    c, d = draw.pair(64, 64)
    text = "text_model_encoder_layers_0_self_attn"
    state = {
        **kohya("lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k", a, b, alpha=3.0),
        **kohya(f"lora_te1_{text}_q_proj", c, d, alpha=3.0),
        **kohya(f"lora_te2_{text}_out_proj", d.T, c.T, alpha=3.0),
    }
    return state, {
        "unet.down.1.transformers.0.blocks.1.cross_attention.k": (0, a @ b),
        "clip_l.layers.0.q": (0, c @ d),
        "clip_g.layers.0.attention_out": (0, (c @ d).T),
    }


def locon(draw: Draw) -> tuple[State, Expected]:
    up, down, mid = draw(64, 3, 1, 1), draw(3, 64, 3, 3), draw(3, 3, 3, 3)
    low = draw(3, 64, 1, 1)
    name = "lora_unet_mid_block_resnets_{}_conv1"
    state = {
        **kohya(name.format(0), up, down, alpha=3.0),
        **kohya(name.format(1), up, low, alpha=1.5),
        f"{name.format(1)}.lora_mid.weight": mid,
    }
    core = torch.einsum("or,rskl,si->oikl", up[..., 0, 0], mid, low[..., 0, 0])
    return state, {
        "unet.middle.first.conv1": (0, torch.einsum("or,rikl->oikl", up[..., 0, 0], down)),
        "unet.middle.second.conv1": (0, 0.5 * core),
    }


def old_diffusers(draw: Draw) -> tuple[State, Expected]:
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    a, b = draw.pair(32, 32)
    e, f = draw.pair(64, 64)
    text = "text_encoder.text_model.encoder.layers.0.self_attn"
    state = {
        f"unet.{block}.attn1.processor.to_out_lora.up.weight": a,
        f"unet.{block}.attn1.processor.to_out_lora.down.weight": b,
        f"unet.{block}.attn1.processor.to_out_lora.alpha": torch.tensor(1.5),
        f"unet.{block}.attn2.to_q.lora.alpha": torch.tensor(6.0),
        f"unet.{block}.attn2.to_q.lora.up.weight": 2 * a,
        f"unet.{block}.attn2.to_q.lora.down.weight": b,
        f"{text}.v_proj.lora_linear_layer.up.weight": e,
        f"{text}.v_proj.lora_linear_layer.down.weight": f,
        f"{text}.to_out_lora.up.weight": e,
        f"{text}.to_out_lora.down.weight": -f,
    }
    ours = "unet.down.0.transformers.0.blocks.0"
    return state, {
        f"{ours}.self_attention.out": (0, 0.5 * a @ b),
        f"{ours}.cross_attention.q": (0, 4 * a @ b),
        "clip_l.layers.0.v": (0, e @ f),
        "clip_l.layers.0.attention_out": (0, -e @ f),
    }


def flux_diffusers(draw: Draw) -> tuple[State, Expected]:
    """Parts of what is fused here, as AI-toolkit and PEFT write them; the last shift and scale change places."""
    a, b = draw.pair(256, 256)
    c, d = draw.pair(512, 256)
    state = {
        **peft("transformer.transformer_blocks.0.attn.to_k", a, b),
        **peft("transformer.transformer_blocks.1.attn.add_q_proj", 3 * a, b),
        **peft("transformer.single_transformer_blocks.1.proj_mlp", c, d),
        **peft("transformer.norm_out.linear", c, -d),
        **peft("text_encoder.text_model.encoder.layers.0.mlp.fc2", a[:64], b[:, :96]),
    }
    swapped = torch.cat([(-c @ d)[256:], (-c @ d)[:256]])
    return state, {
        "transformer.joint.0.image.qkv": (256, a @ b),
        "transformer.joint.1.text.qkv": (0, 3 * a @ b),
        "transformer.single.1.inward": (768, c @ d),
        "transformer.modulation.out": (0, swapped),
        "clip_l.layers.0.mlp_out": (0, a[:64] @ b[:, :96]),
    }


def flux_kohya(draw: Draw) -> tuple[State, Expected]:
    a, b = draw.pair(768, 256)
    c, d = draw.pair(48, 48)
    state = {
        **kohya("lora_unet_double_blocks_0_img_attn_qkv", a, b, alpha=6.0),
        **kohya("lora_unet_single_blocks_2_modulation_lin", a, -b, alpha=3.0),
        **kohya("lora_te3_encoder_block_0_layer_0_SelfAttention_q", c, d),
    }
    return state, {
        "transformer.joint.0.image.qkv": (0, 2 * a @ b),
        "transformer.modulation.single.2": (0, -a @ b),
        "t5.layers.0.q": (0, c @ d),
    }


def flux_bfl(draw: Draw) -> tuple[State, Expected]:
    a, b = draw.pair(768, 256)
    state = {**peft("double_blocks.1.txt_attn.qkv", a, b), **peft("diffusion_model.single_blocks.0.linear2", b.T, a.T)}
    return state, {
        "transformer.joint.1.text.qkv": (0, a @ b),
        "transformer.single.0.outward": (0, (a @ b).T),
    }


def flux_xlabs(draw: Draw) -> tuple[State, Expected]:
    a, b = draw.pair(768, 256)
    c, d = draw.pair(256, 256)
    e, f = draw.pair(256, 768)
    layers = {
        "double_blocks.0.processor.qkv_lora1": (a, b),
        "double_blocks.0.processor.qkv_lora2": (-a, b),
        "double_blocks.0.processor.proj_lora1": (c, d),
        "double_blocks.0.processor.proj_lora2": (-c, d),
        "single_blocks.0.processor.qkv_lora": (2 * a, b),
        "single_blocks.0.processor.proj_lora": (e, f),
    }
    state = {
        key: tensor
        for name, (up, down) in layers.items()
        for key, tensor in ((f"{name}.up.weight", up), (f"{name}.down.weight", down))
    }
    return state, {
        "transformer.joint.0.image.qkv": (0, a @ b),
        "transformer.joint.0.text.qkv": (0, -a @ b),
        "transformer.joint.0.image.attention_out": (0, c @ d),
        "transformer.joint.0.text.attention_out": (0, -c @ d),
        "transformer.single.0.inward": (0, 2 * a @ b),
        "transformer.single.0.outward": (0, e @ f),
    }


def flux_xlabs_prefixed(draw: Draw) -> tuple[State, Expected]:
    state, wanted = flux_xlabs(draw)
    return {f"diffusion_model.{key}": tensor for key, tensor in state.items()}, wanted


def one_trainer_pieces(draw: Draw) -> tuple[State, Expected]:
    """Layers that are fused in the original layout, each as its pieces."""
    (a, b), (c, d), (e, f) = draw.pair(256, 256), draw.pair(512, 256), draw.pair(512, 256)
    state = {
        **kohya("transformer.double_blocks.0.img_attn.qkv.0", a, b, alpha=3.0),
        **kohya("transformer.double_blocks.1.txt_attn.qkv.2", a, -b, alpha=3.0),
        **kohya("transformer.single_blocks.0.linear1.1", 2 * a, b, alpha=3.0),
        **kohya("transformer.single_blocks.1.linear1.3", c, d, alpha=3.0),
        **kohya("transformer.double_blocks.0.img_mlp.0", e, f, alpha=3.0),  # a layer of a sequence, and no piece
    }
    return state, {
        "transformer.joint.0.image.qkv": (0, a @ b),
        "transformer.joint.1.text.qkv": (512, -a @ b),
        "transformer.single.0.inward": (256, 2 * a @ b),
        "transformer.single.1.inward": (768, c @ d),
        "transformer.joint.0.image.mlp_in": (0, e @ f),
    }


def comfyui_encoders(draw: Draw) -> tuple[State, Expected]:
    a, b = draw.pair(64, 64)
    c, d = draw.pair(48, 48)
    state = {
        **peft("clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj", a, b),
        **peft("t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.v", c, d),
    }
    return state, {"clip_l.layers.0.q": (0, a @ b), "t5.layers.0.v": (0, c @ d)}


def peft_named(draw: Draw) -> tuple[State, Expected]:
    """An encoder alone in PEFT's folder, with an adapter's name between."""
    a, b = draw.pair(64, 64)
    clip = model("sd1")[1].network.get_parameter("layers.0.q.weight")
    lengths = draw(64).abs()
    layer = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj"
    state = {
        f"{layer}.lora_A.my-style.weight": b,
        f"{layer}.lora_B.my-style.weight": a,
        f"{layer}.lora_magnitude_vector.my-style.weight": lengths,
    }
    whole = clip + a @ b
    return state, {"clip_l.layers.0.q": (0, lengths[:, None] * whole / whole.norm(dim=1, keepdim=True) - clip)}


def one_trainer(draw: Draw) -> tuple[State, Expected]:
    a, b = draw.pair(256, 256)
    c, d = draw.pair(48, 48)
    state = {
        **kohya("lora_transformer_transformer_blocks_1_attn_to_v", a, b, alpha=1.5),
        **kohya("lora_te2_encoder_block_1_layer_0_SelfAttention_k", c, d, alpha=3.0),
    }
    return state, {"transformer.joint.1.image.qkv": (512, 0.5 * a @ b), "t5.layers.1.k": (0, c @ d)}


def sd3(draw: Draw) -> tuple[State, Expected]:
    a, b = draw.pair(32, 32)
    c, d = draw.pair(96, 32)
    state = {
        **peft("transformer.transformer_blocks.0.attn.add_k_proj", a, b),
        **peft("transformer.transformer_blocks.0.attn2.to_q", 2 * a, b),
        **kohya("lora_unet_joint_blocks_1_x_block_attn_qkv", c, d, alpha=3.0),
        **kohya("lora_te3_encoder_block_0_layer_0_SelfAttention_o", *draw.pair(48, 48)),
    }
    text = state["lora_te3_encoder_block_0_layer_0_SelfAttention_o.lora_up.weight"]
    text = text @ state["lora_te3_encoder_block_0_layer_0_SelfAttention_o.lora_down.weight"]
    return state, {
        "transformer.blocks.0.text_heads.qkv": (32, a @ b),
        "transformer.blocks.0.own_heads.qkv": (0, 2 * a @ b),
        "transformer.blocks.1.image_heads.qkv": (0, c @ d),
        "t5.layers.0.attention_out": (0, text),
    }


def hunyuan(draw: Draw) -> tuple[State, Expected]:
    a, b = draw.pair(96, 32)
    c, d = draw.pair(32, 32)
    state = {
        "base_model.model.blocks.0.attn1.Wqkv.lora_A.default.weight": b,
        "base_model.model.blocks.0.attn1.Wqkv.lora_B.default.weight": a,
        **peft("blocks.1.attn1.to_k", c, d),
    }
    return state, {
        "transformer.blocks.0.self_attention.qkv": (0, a @ b),
        "transformer.blocks.1.self_attention.qkv": (32, c @ d),
    }


def loha(draw: Draw) -> tuple[State, Expected]:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
    conv = "lora_unet_mid_block_resnets_0_conv2"
    a, b, c, d = draw(32, 3), draw(3, 32), draw(32, 3), draw(3, 32)
    p, q, r, s, t, u = draw(3, 64), draw(3, 64), draw(3, 64), draw(3, 64), draw(3, 3, 3, 3), draw(3, 3, 3, 3)
    state = {f"{name}.hada_w{n}_{x}": w for (n, x), w in zip(("1a", "1b", "2a", "2b"), (a, b, c, d), strict=True)}
    state |= {f"{conv}.hada_w{n}_{x}": w for (n, x), w in zip(("1a", "1b", "2a", "2b"), (p, q, r, s), strict=True)}
    state |= {f"{conv}.hada_t1": t, f"{conv}.hada_t2": u, f"{name}.alpha": torch.tensor(1.5)}
    one, two = (torch.einsum("ijkl,jr,ip->prkl", core, y, x) for core, x, y in ((t, p, q), (u, r, s)))
    return state, {
        "unet.down.0.transformers.0.blocks.0.self_attention.k": (0, 0.5 * (a @ b) * (c @ d)),
        "unet.middle.first.conv2": (0, one * two),
    }


def lokr(draw: Draw) -> tuple[State, Expected]:
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
    conv, cored = "lora_unet_mid_block_resnets_0_conv2", "lora_unet_mid_block_resnets_1_conv2"
    whole, inner = draw(4, 4), draw(8, 8)
    a, b, c, d = draw(4, 2), draw(2, 8), draw(8, 3), draw(3, 8)
    w2_a, w2_b, t2, kernel = draw(3, 16), draw(3, 16), draw(3, 3, 3, 3), draw(16, 16, 3, 3)
    state = {
        # alpha means nothing where no matrix was cut in two
        **{f"{block}_attn1_to_q.lokr_w1": whole, f"{block}_attn1_to_q.lokr_w2": inner},
        f"{block}_attn1_to_q.alpha": torch.tensor(9.0),
        **{f"{block}_attn1_to_v.lokr_w1_a": a, f"{block}_attn1_to_v.lokr_w1_b": b},
        **{f"{block}_attn1_to_v.lokr_w2_a": c[:, :3], f"{block}_attn1_to_v.lokr_w2_b": d[:, :4]},
        f"{block}_attn1_to_v.alpha": torch.tensor(1.5),
        **{f"{conv}.lokr_w1": whole, f"{conv}.lokr_w2": kernel},
        **{f"{cored}.lokr_w1": whole, f"{cored}.lokr_w2_a": w2_a, f"{cored}.lokr_w2_b": w2_b, f"{cored}.lokr_t2": t2},
    }
    core = torch.einsum("ijkl,jr,ip->prkl", t2, w2_b, w2_a)
    ours = "unet.down.0.transformers.0.blocks.0.self_attention"
    return state, {
        f"{ours}.q": (0, torch.kron(whole, inner)),
        f"{ours}.v": (0, 0.5 * torch.kron(a @ b, (c @ d)[:, :4].contiguous())),
        "unet.middle.first.conv2": (0, torch.kron(whole[:, :, None, None], kernel)),
        "unet.middle.second.conv2": (0, torch.kron(whole[:, :, None, None], core.contiguous())),
    }


def differences(draw: Draw) -> tuple[State, Expected]:
    conv, linear = draw(64, 64, 3, 3), draw(32, 32)
    state = {
        "lora_unet_mid_block_resnets_0_conv1.diff": conv,
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.diff": linear,
    }
    return state, {
        "unet.middle.first.conv1": (0, conv),
        "unet.down.0.transformers.0.blocks.0.self_attention.q": (0, linear),
    }


def dora(draw: Draw) -> tuple[State, Expected]:
    """Lengths of rows (PEFT, LyCORIS) and of columns (LyCORIS before)."""
    unet = model("sd1")[0].network
    a, b = draw.pair(32, 32)
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    ours = "down.0.transformers.0.blocks.0.self_attention"
    weights = {x: unet.get_parameter(f"{ours}.{x}.weight") for x in "qkv"}
    rows, columns = draw(32).abs(), draw(1, 32).abs()
    conv = unet.get_parameter("middle.first.conv1.weight")
    up, down, inputs = draw(64, 3, 1, 1), draw(3, 64, 3, 3), draw(1, 64, 1, 1).abs()
    name = f"lora_unet_{block.replace('.', '_')}_attn1_to"
    state = {
        **peft(f"unet.{block}.attn1.to_q", a, b),
        f"unet.{block}.attn1.to_q.lora_magnitude_vector": rows,
        **kohya(f"{name}_k", a, b, alpha=1.5),
        f"{name}_k.dora_scale": columns,
        **kohya(f"{name}_v", a, b, alpha=3.0),
        f"{name}_v.dora_scale": rows[:, None],
        **kohya("lora_unet_mid_block_resnets_0_conv1", up, down, alpha=3.0),
        "lora_unet_mid_block_resnets_0_conv1.dora_scale": inputs,
    }

    def by_row(weight: Tensor, change: Tensor) -> Tensor:
        whole = weight + change
        return rows[:, None] * whole / whole.norm(dim=1, keepdim=True) - weight

    k = weights["k"] + 0.5 * a @ b
    c = conv + torch.einsum("or,rikl->oikl", up[..., 0, 0], down)
    return state, {
        f"unet.{ours}.q": (0, by_row(weights["q"], a @ b)),
        f"unet.{ours}.k": (0, columns * k / k.norm(dim=0, keepdim=True) - weights["k"]),
        f"unet.{ours}.v": (0, by_row(weights["v"], a @ b)),
        "unet.middle.first.conv1": (0, inputs * c / c.square().sum(dim=(0, 2, 3), keepdim=True).sqrt() - conv),
    }


SPELLINGS: dict[str, tuple[str, Callable[[Draw], tuple[State, Expected]]]] = {
    "kohya, diffusers' names": ("sd1", sd1_kohya),
    "kohya, original names": ("sdxl", sdxl_kohya),
    "LoCon": ("sd1", locon),
    "diffusers before PEFT": ("sd1", old_diffusers),
    "diffusers and AI-toolkit, FLUX.1": ("flux", flux_diffusers),
    "kohya, FLUX.1": ("flux", flux_kohya),
    "Black Forest Labs": ("flux", flux_bfl),
    "XLabs": ("flux", flux_xlabs),
    "XLabs, prefixed": ("flux", flux_xlabs_prefixed),
    "OneTrainer": ("flux", one_trainer),
    "OneTrainer, pieces": ("flux", one_trainer_pieces),
    "ComfyUI's encoders": ("flux", comfyui_encoders),
    "PEFT, an encoder alone": ("sd1", peft_named),
    "Stable Diffusion 3": ("sd3", sd3),
    "Hunyuan-DiT": ("hunyuan_dit", hunyuan),
    "LoHa": ("sd1", loha),
    "LoKr": ("sd1", lokr),
    "differences": ("sd1", differences),
    "DoRA": ("sd1", dora),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_is_the_change_that_it_is_defined_as(spelling: str, tmp_path: Path) -> None:
    family, build = SPELLINGS[spelling]
    state, wanted = build(Draw())
    adapter = read(opened(tmp_path, state), model(family), name="ink")
    agree(changed(adapter, model(family)), wanted)


def test_an_sdxl_file_on_kolors_leaves_its_text_encoders_out(tmp_path: Path) -> None:
    state, wanted = sdxl_kohya(Draw())
    adapter = read(opened(tmp_path, state), model("kolors"), name="ink")
    agree(changed(adapter, model("kolors")), {key: value for key, value in wanted.items() if key.startswith("unet.")})
    assert all(layer.startswith("lora_te") for layer in adapter.left_out)
    assert len(adapter.left_out) == 2


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"lora_alpha": 6, "r": 3}, 2.0),
        ({"lora_alpha": 6, "r": 3, "use_rslora": True}, 6 / math.sqrt(3)),
        ({"lora_alpha": 6, "r": 3, "alpha_pattern": {"attn.to_k": 1.5}}, 0.5),
        ({"lora_alpha": 6, "alpha_pattern": {"^transformer_blocks.0.attn.to_k": 1.5, "to_k": 3}}, 0.5),  # the first
        ({"lora_alpha": 6, "alpha_pattern": {"^attn.to_k": 1.5}}, 2.0),  # of the whole network: not this one
        ({"lora_alpha": 6, "r": 3, "alpha_pattern": {r"transformer_blocks\.0\.attn\.to_k$": 1.5}}, 0.5),
        ({"alpha": 6, "r": 100, "peft_type": "LOHA"}, 2.0),  # the matrices' own rank
        ({"lora_alpha": None, "alpha_pattern": None}, 1.0),
    ],
)
def test_alphas_that_peft_keeps_beside_are_honoured(config: dict[str, Any], factor: float, tmp_path: Path) -> None:
    a, b = Draw().pair(256, 256)
    state = peft("transformer.transformer_blocks.0.attn.to_k", a, b)
    told = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    wanted = {"transformer.joint.0.image.qkv": (256, factor * a @ b)}
    agree(changed(read(opened(tmp_path, state, told), model("flux"), name="ink"), model("flux")), wanted)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    bare = {key.removeprefix("transformer."): tensor for key, tensor in state.items()}
    weights = opened(tmp_path, bare, name="adapter_model")
    agree(changed(read(weights, model("flux"), name="ink"), model("flux")), wanted)


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        (
            {"lora_alpha": 6, "alpha_pattern": {".*blocks.*to_k": 2}},
            LoadError,
            "'.*blocks.*to_k' is a regular expression",
        ),
        ({"lora_alpha": 6, "rank_pattern": {"to_[kq]": 2}}, LoadError, "is a regular expression"),
        ({"lora_alpha": "six"}, DamagedFile, "lora_alpha = 'six'"),
        ({"lora_alpha": 6, "alpha_pattern": {"to_k": [1]}}, DamagedFile, "is not a number"),
        ({"peft_type": "VERA"}, LoadError, "kind VERA, which is not read"),
        ({"lora_alpha": 6, "init_lora_weights": "pissa_niter_16"}, LoadError, "begun by pissa"),
        ({"lora_alpha": 6, "fan_in_fan_out": True}, LoadError, "fan_in_fan_out"),
    ],
)
def test_what_peft_keeps_beside_is_honoured_or_refused(
    config: dict[str, Any], error: type[LoadError], text: str, tmp_path: Path
) -> None:
    state = peft("transformer.transformer_blocks.0.attn.to_k", *Draw().pair(256, 256))
    told = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    with pytest.raises(error, match=re.escape(text)):
        read(opened(tmp_path, state, told), model("flux"), name="ink")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=re.escape(text)):
        read(opened(tmp_path, state, name="adapter_model"), model("flux"), name="ink")


BAD: dict[str, tuple[State, type[LoadError], str]] = {
    "another family's": (
        kohya("lora_unet_double_blocks_0_img_attn_qkv", torch.ones(9, 2), torch.ones(2, 3)),
        UnexpectedKeys,
        "2 tensors do not belong",
    ),
    "one layer more": (
        {
            **kohya("lora_unet_down_blocks_0_attentions_0_proj_in", torch.ones(32, 2), torch.ones(2, 32)),
            **kohya("lora_unet_down_blocks_9_attentions_0_proj_in", torch.ones(32, 2), torch.ones(2, 32)),
        },
        UnexpectedKeys,
        "down_blocks_9",
    ),
    "a tensor of nothing": (
        {**kohya("lora_unet_conv_in", torch.ones(32, 2), torch.ones(2, 4, 3, 3)), "other.weight": torch.ones(2)},
        UnexpectedKeys,
        "other.weight",
    ),
    "no adapter": ({"conv_in.weight": torch.ones(3, 3)}, LoadError, "no LoRA"),
    "half": ({"lora_unet_conv_in.lora_up.weight": torch.ones(32, 2)}, DamagedFile, "incomplete"),
    "of two ranks": (kohya("lora_unet_conv_in", torch.ones(32, 2), torch.ones(3, 4, 3, 3)), WrongShape, "no change"),
    "too wide": (kohya("lora_unet_conv_in", torch.ones(32, 2), torch.ones(2, 9, 3, 3)), WrongShape, "(32, 4, 3, 3)"),
    "too high": (kohya("lora_unet_conv_in", torch.ones(64, 2), torch.ones(2, 4, 3, 3)), WrongShape, "(32, 4, 3, 3)"),
    "of rank 0": (kohya("lora_unet_conv_in", torch.ones(32, 0), torch.ones(0, 4, 3, 3)), WrongShape, "no change"),
    "not finite": (
        kohya("lora_unet_conv_in", torch.full((32, 2), math.nan), torch.ones(2, 4, 3, 3)),
        DamagedFile,
        "finite",
    ),
    "an alpha that is none": (
        kohya("lora_unet_conv_in", torch.ones(32, 2), torch.ones(2, 4, 3, 3), alpha=math.inf),
        DamagedFile,
        "finite",
    ),
    "whole numbers": (
        kohya("lora_unet_conv_in", torch.ones(32, 2, dtype=torch.int64), torch.ones(2, 4, 3, 3)),
        DamagedFile,
        "I64",
    ),
    "said twice": (
        {
            **kohya("unet.conv_in", torch.ones(32, 2), torch.ones(2, 4, 3, 3)),
            **peft("unet.conv_in", torch.ones(32, 2), torch.ones(2, 4, 3, 3)),
        },
        DamagedFile,
        "the same",
    ),
    "LoKr that does not fill": (
        {"lora_unet_conv_in.lokr_w1": torch.ones(5, 2), "lora_unet_conv_in.lokr_w2": torch.ones(8, 2, 3, 3)},
        WrongShape,
        "no change",
    ),
    "half a LoKr": ({"lora_unet_conv_in.lokr_w1": torch.ones(5, 2)}, DamagedFile, "no LoKr"),
    "one layer in two spellings": (
        {
            **kohya("lora_unet_conv_in", torch.ones(32, 2), torch.ones(2, 4, 3, 3)),
            **peft("unet.conv_in", torch.ones(32, 2), torch.ones(2, 4, 3, 3)),
        },
        DamagedFile,
        "one layer in two spellings",
    ),
    "lengths said twice": (
        {
            **kohya("lora_unet_conv_in", torch.ones(32, 2), torch.ones(2, 4, 3, 3)),
            "lora_unet_conv_in.dora_scale": torch.ones(32, 1),
            "lora_unet_conv_in.lora_magnitude_vector": torch.ones(32),
        },
        DamagedFile,
        "both say the lengths",
    ),
    "no tensors": ({}, LoadError, "no LoRA: none of its 0 tensors is of an adapter; run"),
    "an encoder's unknown layer": (
        {
            **kohya("lora_unet_conv_in", torch.ones(32, 2), torch.ones(2, 4, 3, 3)),
            **kohya("lora_te_text_model_encoder_layers_77_mlp_fc1", torch.ones(96, 2), torch.ones(2, 64)),
        },
        UnexpectedKeys,
        "layers_77",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_refused(what: str, tmp_path: Path) -> None:
    state, error, text = BAD[what]
    with pytest.raises(error, match=re.escape(text)):
        read(opened(tmp_path, state), model("sd1"), name="ink")


@pytest.mark.parametrize(
    "layer",
    [
        "te1.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder.foo.bar",
        "lora_te_foo",
        "text_encoder.base_model.model.text_model.encoder.layers.0.mlp.fc1",
        "lora_te1_text_model_encoder_layers_40_mlp_fc1",
    ],
)
@pytest.mark.parametrize("family", ["sd1", "kolors"])
def test_an_encoder_s_layer_that_nobody_knows_is_refused(family: str, layer: str, tmp_path: Path) -> None:
    """Whether the model has such an encoder or not: only what is known to be of another one is left out."""
    state = {**kohya("lora_unet_conv_in", *Draw().pair(32, 36)), **kohya(layer, *Draw().pair(96, 64))}
    state["lora_unet_conv_in.lora_down.weight"] = state["lora_unet_conv_in.lora_down.weight"].reshape(3, 4, 3, 3)
    with pytest.raises(UnexpectedKeys, match=re.escape(layer)):
        read(opened(tmp_path, state), model(family), name="ink")


def test_an_encoder_that_the_model_was_loaded_without_is_left_out(tmp_path: Path) -> None:
    state, wanted = sd3(Draw())
    without = tuple(one for one in model("sd3") if one.role != "t5")
    adapter = read(opened(tmp_path, state), without, name="ink")
    agree(changed(adapter, without), {key: value for key, value in wanted.items() if not key.startswith("t5")})
    assert adapter.left_out == ("lora_te3_encoder_block_0_layer_0_SelfAttention_o",)


@pytest.mark.parametrize("rows", [256, 700, 1280])
def test_xlabs_single_blocks_have_q_k_and_v(rows: int, tmp_path: Path) -> None:
    name = "single_blocks.0.processor.qkv_lora"
    state = {f"{name}.up.weight": torch.ones(rows, 2), f"{name}.down.weight": torch.ones(2, 256)}
    with pytest.raises(WrongShape, match=re.escape("(768, 256)")):
        read(opened(tmp_path, state), model("flux"), name="ink")


TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ([f"{TO_Q}.oft_blocks", f"{TO_Q}.alpha"], "OFT or BOFT"),
        (["base_model.model.blocks.0.attn1.to_q.oft_R.weight"], "OFT or BOFT"),
        ([f"{TO_Q}.a1.weight", f"{TO_Q}.a2.weight", f"{TO_Q}.b1.weight", f"{TO_Q}.alpha"], "GLoRA"),
        ([f"{TO_Q}.weight", f"{TO_Q}.on_input"], "(IA)3"),
        (["unet.conv_in.vera_lambda_b", "unet.conv_in.vera_lambda_d"], "VeRA"),
        ([f"{TO_Q}.set_weight"], "an adapter with whole weights"),
        (["bundle_emb.ink.string_to_param.*", "bundle_emb.line.clip_l"], "a LoRA with embeddings bundled"),
        ([f"{TO_Q}.diff", f"{TO_Q}.diff_b"], "a change of biases"),
        (
            ["unet.conv_in.lora_A.weight", "unet.conv_in.lora_B.weight", "unet.conv_in.lora_B.bias"],
            "a change of biases",
        ),
        ([f"{TO_Q}.diff", "lora_unet_down_blocks_0_resnets_0_norm1.diff"], "a change of norms"),
        (["img_in.lora_A.weight", "double_blocks.0.img_attn.norm.query_norm.scale"], "a control LoRA"),
    ],
)
def test_other_kinds_of_adapters_are_named(keys: list[str], kind: str, tmp_path: Path) -> None:
    weights = opened(tmp_path, {key: torch.ones(4, 4) for key in keys})
    with pytest.raises(UnexpectedKeys, match=re.escape(kind)):
        read(weights, model("sd1"), name="ink")
    assert fitting(weights) == ()  # what else it holds says nothing
    told = describe(weights.files[0])
    assert (told.kind, told.note.startswith(kind)) == ("lora", True)


@pytest.mark.parametrize(
    "state",
    [
        flux_xlabs(Draw())[0],
        flux_xlabs_prefixed(Draw())[0],
        {"lora_unet_mid_block_resnets_0_conv1.diff": torch.ones(4, 4, 3, 3)},
    ],
)
def test_a_file_is_known_for_what_it_is(state: State, tmp_path: Path) -> None:
    assert describe(opened(tmp_path, state).files[0]).kind == "lora"


FIELDS = ["lora_up.weight", "lora_down.weight", "lora_A.weight", "alpha", "dora_scale", "hada_w1_a", "lokr_w1", "diff"]
LAYERS = [
    "lora_unet_conv_in",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "lora_te_text_model_encoder_layers_0_mlp_fc1",
    "double_blocks.0.processor.qkv_lora1",
    "",
]


def flux_like(rows: int, columns: int) -> State:
    """LoKr of a layer that FLUX.1 has, for a weight of such a size."""
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    return {f"{name}.lokr_w1": torch.ones(4, 4), f"{name}.lokr_w2": torch.ones(rows // 4, columns // 4)}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keys=st.dictionaries(
        st.tuples(st.sampled_from(LAYERS), st.sampled_from(FIELDS)),
        st.lists(st.sampled_from([0, 1, 2, 4, 32, 64]), max_size=4),
        min_size=1,
        max_size=6,
    )
)
def test_random_files_are_refused_or_are_exact_shapes(keys: dict[tuple[str, str], list[int]], tmp_path: Path) -> None:
    """Whatever is accepted uses each of its tensors, and changes weights of their own shapes."""
    state = {f"{layer}.{field}": torch.ones(shape) for (layer, field), shape in keys.items()}
    try:
        adapter = read(opened(tmp_path, state), model("sd1"), name="ink")
    except CalotypeError:
        return
    names, rest = groups(opened(tmp_path, state))
    assert not rest
    assert sum(len(group.keys) for group in names.values()) == len(state)
    assert len(adapter.changes) == len({name.replace(".", "_").removeprefix("lora_") for name in names})
    for change in changed(adapter, model("sd1")).values():
        assert change.isfinite().all()


@pytest.mark.parametrize(
    ("state", "family"),
    [
        (flux_like(9216, 3072), "flux"),
        (
            {
                f"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.{name}": torch.ones(shape)
                for name, shape in {
                    "hada_w1_a": (640, 2),
                    "hada_w1_b": (2, 2048),
                    "hada_w2_a": (640, 2),
                    "hada_w2_b": (2, 2048),
                }.items()
            },
            "sdxl",
        ),
        (kohya("lora_unet_double_blocks_0_img_attn_qkv", torch.ones(9216, 2), torch.ones(2, 3072)), "flux"),
        (peft("transformer.transformer_blocks.0.attn.add_q_proj", torch.ones(1536, 2), torch.ones(2, 1536)), "sd3"),
        (peft("blocks.0.attn1.Wqkv", torch.ones(4224, 2), torch.ones(2, 1408)), "hunyuan_dit"),
        (
            kohya(
                "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", torch.ones(640, 2), torch.ones(2, 2048)
            ),
            "sdxl",
        ),
        (
            kohya(
                "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
                torch.ones(320, 2),
                torch.ones(2, 768),
            ),
            "sd1",
        ),
    ],
)
def test_the_family_that_a_file_fits_is_named(state: State, family: str, tmp_path: Path) -> None:
    assert family in fitting(opened(tmp_path, state))


def test_a_file_of_other_widths_fits_no_family(tmp_path: Path) -> None:
    assert fitting(opened(tmp_path, flux_like(9216, 1536))) == ()


def test_a_file_tells_of_itself(tmp_path: Path) -> None:
    state, _ = sd1_kohya(Draw())
    told = summary(opened(tmp_path, state, {"ss_tag_frequency": json.dumps({"x": {"ink": 9, "line": 2}})}))
    assert str(told) == "lora on 4 layers, 1 of them in text encoders, rank 3; trained words: ink, line"
    state, _ = loha(Draw())
    assert str(summary(opened(tmp_path, state, {"modelspec.trigger_phrase": "in ink"}))) == (
        "loha on 2 layers, rank 3; trained words: in ink"
    )


def test_files_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALOTYPE_HOME", str(tmp_path))
    state = {"x.diff": torch.ones(1)}
    shelf = tiny.save(tmp_path / "loras" / "ink.safetensors", state)
    inside = tiny.save(tmp_path / "trained" / "pytorch_lora_weights.safetensors", state)
    assert find("ink") == find("ink.safetensors") == shelf
    assert find(shelf) == shelf
    assert find(tmp_path / "trained") == inside
    below = tiny.save(tmp_path / "loras" / "style" / "line.safetensors", state)
    assert find("style/line") == find("style/line.safetensors") == below
    for wrong in ("../loras/ink", "style/../ink", "line", "", tmp_path / "loras", "/loras/ink"):
        with pytest.raises(SourceNotFound):
            find(wrong)
    # A folder where one works says nothing of the shelf's file.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ink").mkdir()
    assert find("ink") == shelf
