"""Files that are no model which runs here, as keys and shapes: what near misses are made of.

Most are cut from the tables of the networks that they go with; test_near_misses compares them with published hashes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from calotype.checkpoint.files import Shape
from calotype.checkpoint.layouts import Part
from calotype.checkpoint.text_encoders import CLIP
from calotype.checkpoint.writing import Planned, header
from calotype.families.sd1.config import UNET as SD1
from calotype.families.sd1.keys import UNET
from calotype.families.sdxl.config import UNET as SDXL
from calotype.nn.unet import UNetConfig
from calotype.text.clip import BIG_G, VIT_L

Shapes = dict[str, Shape]

SD2 = replace(SD1, text_width=1024, heads=(5, 10, 20, 20), convolved=False)
REFINER = replace(
    SDXL,
    widths=(384, 768, 1536, 1536),
    depths=(0, 4, 4, 0),
    middle_depth=4,
    heads=(6, 12, 24, 24),
    text_width=1280,
    vector_width=2560,
)
UPSCALER = replace(
    SD2, channels_in=7, widths=(256, 512, 512, 1024), depths=(0, 1, 1, 1), heads=(8, 8, 8, 8), convolved=False
)


def header_only(path: Path, shapes: Mapping[str, Shape]) -> Path:
    """A sound file of these keys and shapes, sparse on disk: nothing reads its tensors."""
    plan = [Planned(key, torch.float16, shape) for key, shape in shapes.items()]
    head = header(plan, {})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(2 * math.prod(shape) for shape in shapes.values()))
    return path


def under(prefix: str, shapes: Mapping[str, Shape]) -> Shapes:
    return {prefix + key: shape for key, shape in shapes.items()}


def of(part: Part[Any], layout: str, config: object, extras: tuple[str, ...] = ()) -> Shapes:
    """The keys and shapes of one of our parts."""
    chosen = part.layout(layout)
    assert chosen is not None
    return dict(part.bind(chosen, config)[1].manifest(extras))


def unet(layout: str, config: UNetConfig) -> Shapes:
    """A UNet of any family: the families share its names."""
    return of(UNET, layout, config)


def linear(name: str, out: int, inner: int) -> Shapes:
    return {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}


def conv(name: str, out: int, inner: int, size: int = 3) -> Shapes:
    return {f"{name}.weight": (out, inner, size, size), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def merged(parts: Iterable[Mapping[str, Shape]]) -> Shapes:
    return {key: shape for part in parts for key, shape in part.items()}


# ---- ControlNets


def _way_down(shapes: Shapes, *beginnings: str) -> Shapes:
    return {key: shape for key, shape in shapes.items() if key.startswith(beginnings)}


def _outputs(config: UNetConfig) -> list[int]:
    """The width of each residual that a ControlNet adds on the way down."""
    found = [config.widths[0]]
    for level, width in enumerate(config.widths):
        found += [width] * (config.blocks + (level + 1 < len(config.widths)))
    return found


HINT = (16, 16, 32, 32, 96, 96, 256)


def controlnet() -> Shapes:
    """ControlNet 1.1 for Stable Diffusion 1.x, as its authors publish it."""
    sizes = zip((3, *HINT), (*HINT, SD1.widths[0]), strict=True)
    return under(
        "control_model.",
        {
            **_way_down(unet("original", SD1), "time_embed.", "input_blocks.", "middle_block."),
            **merged(conv(f"zero_convs.{i}.0", width, width, 1) for i, width in enumerate(_outputs(SD1))),
            **conv("middle_block_out.0", 1280, 1280, 1),
            **merged(conv(f"input_hint_block.{2 * i}", out, inner) for i, (inner, out) in enumerate(sizes)),
        },
    )


def controlnet_diffusers(config: UNetConfig = SD1) -> Shapes:
    """A ControlNet as diffusers saves it."""
    inner = zip(HINT[:-1], HINT[1:], strict=True)
    beginnings = ("conv_in.", "time_embedding.", "add_embedding.", "down_blocks.", "mid_block.")
    return {
        **_way_down(unet("diffusers", config), *beginnings),
        **conv("controlnet_cond_embedding.conv_in", 16, 3),
        **merged(conv(f"controlnet_cond_embedding.blocks.{i}", b, a) for i, (a, b) in enumerate(inner)),
        **conv("controlnet_cond_embedding.conv_out", config.widths[0], HINT[-1]),
        **merged(conv(f"controlnet_down_blocks.{i}", width, width, 1) for i, width in enumerate(_outputs(config))),
        **conv("controlnet_mid_block", config.widths[-1], config.widths[-1], 1),
    }


def controlnet_union(kinds: int = 8) -> Shapes:
    """The union ControlNet for SDXL, promax: `kinds` kinds of hint through one network."""
    layer = "transformer_layes.0"  # spelt so in the files
    return {
        **controlnet_diffusers(SDXL),
        "task_embedding": (kinds, 320),
        **linear("control_add_embedding.linear_1", 1280, kinds * 256),
        **linear("control_add_embedding.linear_2", 1280, 1280),
        f"{layer}.attn.in_proj_weight": (960, 320),
        f"{layer}.attn.in_proj_bias": (960,),
        **linear(f"{layer}.attn.out_proj", 320, 320),
        **norm(f"{layer}.ln_1", 320),
        **linear(f"{layer}.mlp.c_fc", 1280, 320),
        **linear(f"{layer}.mlp.c_proj", 320, 1280),
        **norm(f"{layer}.ln_2", 320),
        **linear("spatial_ch_projs", 320, 320),
    }


# ---- other attachments


def _attention_widths(config: UNetConfig) -> list[int]:
    """Cross-attention in the order in which adapters number it: down, up, middle."""
    down = [width for width, depth in zip(config.widths, config.depths, strict=True) for _ in range(2 * depth)]
    up = [
        width
        for width, depth in reversed(list(zip(config.widths, config.depths, strict=True)))
        for _ in range(3 * depth)
    ]
    return [*down, *up, *[config.widths[-1]] * config.middle_depth]


def ip_adapter(config: UNetConfig = SD1, image: int = 1024, tokens: int = 4) -> Shapes:
    """An IP-Adapter, its two parts' names in front as they stand in the safetensors files."""
    text = config.text_width
    layers = enumerate(_attention_widths(config))
    return {
        **linear("image_proj.proj", tokens * text, image),
        **norm("image_proj.norm", text),
        **merged({f"ip_adapter.{2 * i + 1}.to_{x}_ip.weight": (width, text) for x in "kv"} for i, width in layers),
    }


def image_encoder(width: int = 1280, layers: int = 32, projection: int = 1024, mlp: int = 5120) -> Shapes:
    """CLIP's vision tower; IP-Adapters take ViT-H (these numbers) or ViT-bigG."""
    inner = "vision_model.embeddings."
    shapes: Shapes = {
        f"{inner}class_embedding": (width,),
        f"{inner}patch_embedding.weight": (width, 3, 14, 14),
        f"{inner}position_embedding.weight": (257, width),
        f"{inner}position_ids": (1, 257),
        **norm("vision_model.pre_layrnorm", width),  # spelt so in the files
        **norm("vision_model.post_layernorm", width),
        "visual_projection.weight": (projection, width),
    }
    for i in range(layers):
        layer = f"vision_model.encoder.layers.{i}"
        for x in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{x}", width, width)
        shapes |= {**norm(f"{layer}.layer_norm1", width), **norm(f"{layer}.layer_norm2", width)}
        shapes |= {**linear(f"{layer}.mlp.fc1", mlp, width), **linear(f"{layer}.mlp.fc2", width, mlp)}
    return shapes


def whole_clip() -> Shapes:
    """openai/clip-vit-large-patch14: the text encoder with the vision tower that nothing here needs."""
    text = of(CLIP, "transformers", VIT_L, ("text_model.embeddings.position_ids", "text_projection.weight"))
    return {**text, **image_encoder(1024, 24, 768, 4096), "logit_scale": ()}


def motion_module() -> Shapes:
    """AnimateDiff's second motion module for Stable Diffusion 1.5."""
    shapes: Shapes = {}
    places = [(f"down_blocks.{i}.motion_modules.{j}", width) for i, width in enumerate(SD1.widths) for j in range(2)]
    places += [
        (f"up_blocks.{i}.motion_modules.{j}", width) for i, width in enumerate(reversed(SD1.widths)) for j in range(3)
    ]
    for name, width in [*places, ("mid_block.motion_modules.0", 1280)]:
        name += ".temporal_transformer"
        block = f"{name}.transformer_blocks.0"
        shapes |= {**norm(f"{name}.norm", width), **linear(f"{name}.proj_in", width, width)}
        shapes |= linear(f"{name}.proj_out", width, width)
        for k in range(2):
            attention = f"{block}.attention_blocks.{k}"
            shapes |= {f"{attention}.to_{x}.weight": (width, width) for x in "qkv"}
            shapes |= linear(f"{attention}.to_out.0", width, width)
            shapes |= {f"{attention}.pos_encoder.pe": (1, 32, width), **norm(f"{block}.norms.{k}", width)}
        shapes |= linear(f"{block}.ff.net.0.proj", 8 * width, width)
        shapes |= {**linear(f"{block}.ff.net.2", width, 4 * width), **norm(f"{block}.ff_norm", width)}
    return shapes


def t2i_adapter() -> Shapes:
    """T2I-Adapter for Stable Diffusion 1.4, as its authors publish it."""
    shapes = conv("conv_in", 320, 192)
    inner = 320
    for i, width in enumerate(width for width in SD1.widths for _ in range(2)):
        if width != inner:
            shapes |= conv(f"body.{i}.in_conv", width, inner, 1)
        shapes |= {**conv(f"body.{i}.block1", width, width), **conv(f"body.{i}.block2", width, width, 1)}
        inner = width
    return shapes


def t2i_adapter_diffusers() -> Shapes:
    shapes = conv("adapter.conv_in", 320, 192)
    inner = 320
    for i, width in enumerate(SD1.widths):
        if width != inner:
            shapes |= conv(f"adapter.body.{i}.in_conv", width, inner, 1)
        for j in range(2):
            block = f"adapter.body.{i}.resnets.{j}"
            shapes |= {**conv(f"{block}.block1", width, width), **conv(f"{block}.block2", width, width, 1)}
        inner = width
    return shapes


# ---- LoRA


def _adapted(config: UNetConfig) -> dict[str, Shape]:
    """The linear layers of a UNet's attention, under diffusers' names."""
    shapes = unet("diffusers", config)
    return {
        key.removesuffix(".weight"): shape
        for key, shape in shapes.items()
        if ".attn" in key and key.endswith(".weight") and len(shape) == 2
    }


def kohya_lora(config: UNetConfig, rank: int = 8) -> Shapes:
    """A LoRA of the UNet and of CLIP-L as kohya's scripts save it (and of bigG, for SDXL)."""
    encoders = {"lora_te1": VIT_L, "lora_te2": BIG_G} if config.vector_width else {"lora_te": VIT_L}
    layers = {"lora_unet_" + name.replace(".", "_"): shape for name, shape in _adapted(config).items()}
    for name, clip in encoders.items():
        for i in range(clip.layers):
            for x in "qkv":
                layers[f"{name}_text_model_encoder_layers_{i}_self_attn_{x}_proj"] = (clip.width, clip.width)
    return merged(
        {
            f"{name}.alpha": (),
            f"{name}.lora_down.weight": (rank, inner),
            f"{name}.lora_up.weight": (out, rank),
        }
        for name, (out, inner) in layers.items()
    )


def diffusers_lora(config: UNetConfig, rank: int = 8) -> Shapes:
    """A LoRA of the UNet as diffusers' training scripts save it."""
    return merged(
        {f"unet.{name}.lora_A.weight": (rank, inner), f"unet.{name}.lora_B.weight": (out, rank)}
        for name, (out, inner) in _adapted(config).items()
    )


# ---- other models


def pixart() -> Shapes:
    """The beginning and the first blocks of PixArt-alpha, in diffusers' layout."""
    shapes: Shapes = {
        **conv("pos_embed.proj", 1152, 4, 2),
        "scale_shift_table": (2, 1152),
        **linear("adaln_single.linear", 6912, 1152),
        **linear("caption_projection.linear_1", 1152, 4096),
        **linear("proj_out", 32, 1152),
    }
    for i in range(4):
        for k in (1, 2):
            for x in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes |= linear(f"transformer_blocks.{i}.attn{k}.{x}", 1152, 1152)
        shapes |= {f"transformer_blocks.{i}.scale_shift_table": (6, 1152)}
        shapes |= linear(f"transformer_blocks.{i}.ff.net.0.proj", 4608, 1152)
        shapes |= linear(f"transformer_blocks.{i}.ff.net.2", 1152, 4608)
    return shapes


def upscaler(layout: str) -> Shapes:
    """Stability AI's 4x upscaler: a small picture beside the noise, and its noise level as a class."""
    name = "label_emb.weight" if layout == "original" else "class_embedding.weight"
    return {**unet(layout, UPSCALER), name: (1000, 1024)}


def lcm(layout: str, config: UNetConfig = SD1) -> Shapes:
    """A latent consistency model's UNet, which is told the guidance."""
    name = "time_embed" if layout == "original" else "time_embedding"
    return {**unet(layout, config), f"{name}.cond_proj.weight": (config.widths[0], 256)}
