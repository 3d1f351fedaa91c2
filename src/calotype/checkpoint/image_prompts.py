"""Layouts of IP-Adapters, as their authors write them, and of CLIP's image encoder, as transformers does.

The authors' `.bin` files are dicts within a dict, their `.safetensors` have the same names joined by dots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any

from calotype.checkpoint.files import Shape, Weights
from calotype.checkpoint.keys import Extra, Rule, Same, Table
from calotype.checkpoint.layouts import Evidence, Found, Layout, Part, Settings, Signature
from calotype.errors import DamagedFile
from calotype.nn.image_adapter import (
    FullConfig,
    ImageAdapter,
    ImageAdapterConfig,
    ProjectionConfig,
    ResamplerConfig,
)
from calotype.nn.vision import VisionConfig, VisionEncoder

HEAD_WIDTH = 64  # of every published resampler
FIRST = "ip_adapter.1.to_k_ip.weight"

PROJECTION_RULES = {
    "image_proj.proj.*": "tokens.tokens_in.*",
    "image_proj.norm.*": "tokens.norm.*",
}
RESAMPLER_RULES = {
    "image_proj.latents": "tokens.queries",
    "image_proj.proj_in.*": "tokens.seen_in.*",
    "image_proj.layers.{i}.0.norm1.*": "tokens.layers.{i}.seen_norm.*",
    "image_proj.layers.{i}.0.norm2.*": "tokens.layers.{i}.tokens_norm.*",
    "image_proj.layers.{i}.0.to_q.*": "tokens.layers.{i}.q.*",
    "image_proj.layers.{i}.0.to_kv.*": "tokens.layers.{i}.kv.*",
    "image_proj.layers.{i}.0.to_out.*": "tokens.layers.{i}.out.*",
    "image_proj.layers.{i}.1.0.*": "tokens.layers.{i}.mlp_norm.*",
    "image_proj.layers.{i}.1.1.*": "tokens.layers.{i}.mlp_in.*",
    "image_proj.layers.{i}.1.3.*": "tokens.layers.{i}.mlp_out.*",
    "image_proj.proj_out.*": "tokens.tokens_out.*",
    "image_proj.norm_out.*": "tokens.norm.*",
}
FULL_RULES = {
    "image_proj.proj.0.*": "tokens.mlp_in.*",
    "image_proj.proj.2.*": "tokens.mlp_out.*",
    "image_proj.proj.3.*": "tokens.norm.*",
}


def _projection(evidence: Evidence) -> ImageAdapterConfig:
    text = evidence.size("image_proj.norm.weight")
    form = ProjectionConfig(tokens=evidence.size("image_proj.proj.weight") // text)
    return _config(evidence, evidence.size("image_proj.proj.weight", 1), text, form)


def _resampler(evidence: Evidence) -> ImageAdapterConfig:
    form = ResamplerConfig(
        tokens=evidence.size("image_proj.latents", 1),
        width=evidence.size("image_proj.latents", 2),
        layers=evidence.count("image_proj.layers.{i}."),
        heads=evidence.size("image_proj.layers.0.0.to_q.weight") // HEAD_WIDTH,
        head_width=HEAD_WIDTH,
        mlp_width=evidence.size("image_proj.layers.0.1.1.weight"),
    )
    text = evidence.size("image_proj.norm_out.weight")
    return _config(evidence, evidence.size("image_proj.proj_in.weight", 1), text, form)


def _full(evidence: Evidence) -> ImageAdapterConfig:
    form = FullConfig(mlp_width=evidence.size("image_proj.proj.0.weight"))
    text = evidence.size("image_proj.proj.3.weight")
    return _config(evidence, evidence.size("image_proj.proj.0.weight", 1), text, form)


def _config(
    evidence: Evidence, seen: int, text: int, form: ProjectionConfig | ResamplerConfig | FullConfig
) -> ImageAdapterConfig:
    # Self-attention has the even numbers, and nothing there.
    count = evidence.count("ip_adapter.{i}.") // 2
    widths = tuple(evidence.size(f"ip_adapter.{2 * i + 1}.to_k_ip.weight") for i in range(count))
    return ImageAdapterConfig(seen_width=seen, text_width=text, widths=widths, form=form)


def _table(form: str, own: Mapping[str, str]) -> Callable[[ImageAdapterConfig], Table]:
    def table(config: ImageAdapterConfig) -> Table:
        rules: list[Rule] = [Same(theirs, ours) for theirs, ours in own.items()]
        for i in range(len(config.widths)):
            rules.append(Same(f"ip_adapter.{2 * i + 1}.to_k_ip.weight", f"keys.{i}.weight"))
            rules.append(Same(f"ip_adapter.{2 * i + 1}.to_v_ip.weight", f"values.{i}.weight"))
        return Table(f"ip_adapter/{form}", tuple(rules))

    return table


IMAGE_ADAPTER = Part(
    name="ip_adapter",
    network=ImageAdapter,
    layouts=(
        Layout(
            name="base",
            signature=Signature(has=("image_proj.proj.weight", "image_proj.norm.weight", FIRST)),
            config=_projection,
            table=_table("base", PROJECTION_RULES),
        ),
        Layout(
            name="plus",
            signature=Signature(has=("image_proj.latents", "image_proj.proj_in.weight", FIRST)),
            config=_resampler,
            table=_table("plus", RESAMPLER_RULES),
        ),
        Layout(
            name="full",
            signature=Signature(has=("image_proj.proj.0.weight", "image_proj.proj.3.weight", FIRST)),
            config=_full,
            table=_table("full", FULL_RULES),
        ),
    ),
)


VISION_RULES = {
    "vision_model.embeddings.class_embedding": "whole",
    "vision_model.embeddings.patch_embedding.*": "patches.*",
    "vision_model.embeddings.position_embedding.*": "positions.*",
    "vision_model.pre_layrnorm.*": "norm_in.*",  # as it is spelt there
    "vision_model.encoder.layers.{i}.layer_norm1.*": "layers.{i}.attention_norm.*",
    "vision_model.encoder.layers.{i}.self_attn.q_proj.*": "layers.{i}.q.*",
    "vision_model.encoder.layers.{i}.self_attn.k_proj.*": "layers.{i}.k.*",
    "vision_model.encoder.layers.{i}.self_attn.v_proj.*": "layers.{i}.v.*",
    "vision_model.encoder.layers.{i}.self_attn.out_proj.*": "layers.{i}.attention_out.*",
    "vision_model.encoder.layers.{i}.layer_norm2.*": "layers.{i}.mlp_norm.*",
    "vision_model.encoder.layers.{i}.mlp.fc1.*": "layers.{i}.mlp_in.*",
    "vision_model.encoder.layers.{i}.mlp.fc2.*": "layers.{i}.mlp_out.*",
    "vision_model.post_layernorm.*": "norm_out.*",
    "visual_projection.*": "projection.*",
}
POSITIONS = "vision_model.embeddings.position_ids"
HEADS = {768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}  # of the published encoders, by width
OPENAI = (768, 1024)  # widths of OpenAI's own, whose activation is another


def _vision_config(evidence: Evidence) -> VisionConfig:
    inner = evidence.settings.get("vision_config")
    if isinstance(inner, dict):  # of a whole CLIP
        settings: Settings = inner  # pyright: ignore[reportUnknownVariableType]
        evidence = Evidence(evidence.weights, settings, evidence.layout)
    width = evidence.size("vision_model.embeddings.class_embedding")
    patch = evidence.size("vision_model.embeddings.patch_embedding.weight", 2)
    positions = evidence.size("vision_model.embeddings.position_embedding.weight")
    across = isqrt(positions - 1)
    if across**2 != positions - 1:
        raise DamagedFile(f"{evidence.weights.source}: {positions} positions are no square of patches and one more")
    side = evidence.number("image_size", across * patch)
    if side // patch != across:
        raise DamagedFile(f"{evidence.weights.source}: image_size {side}, but positions for {across * patch}")
    evidence.require(layer_norm_eps=1e-5)
    activation = evidence.settings.get("hidden_act", "quick_gelu" if width in OPENAI else "gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise evidence.refuse(f"hidden_act = {activation!r}")
    return VisionConfig(
        width=width,
        layers=evidence.count("vision_model.encoder.layers.{i}."),
        heads=evidence.number("num_attention_heads", HEADS.get(width, max(width // 64, 1))),
        mlp_width=evidence.size("vision_model.encoder.layers.0.mlp.fc1.weight"),
        patch=patch,
        side=side,
        quick_gelu=activation == "quick_gelu",
        projection=evidence.size("visual_projection.weight"),
    )


def _vision_table(config: VisionConfig) -> Table:
    return Table(
        "image_encoder/transformers",
        tuple(Same(theirs, ours) for theirs, ours in VISION_RULES.items()),
        (
            Extra(POSITIONS, (1, config.tokens)),
            Extra("logit_scale"),
            Extra("text_model.*"),
            Extra("text_projection.weight"),
        ),
    )


VISION = Part(
    name="image_encoder",
    network=VisionEncoder,
    layouts=(
        Layout(
            name="transformers",
            signature=Signature(
                has=("vision_model.embeddings.patch_embedding.weight", "visual_projection.weight"),
            ),
            config=_vision_config,
            table=_vision_table,
        ),
    ),
)


def found_in(weights: Weights, settings: Settings, part: Part[Any]) -> Found[Any] | None:
    """A part in a file that may hold nothing else; None where it does not."""
    shapes: Mapping[str, Shape] = weights.shapes
    for layout in part.layouts:
        for prefix in layout.signature.prefixes(shapes):
            own = {key[len(prefix) :]: entry for key, entry in weights.items() if key.startswith(prefix)}
            return Found(part, layout, prefix, Weights(weights.source, own), settings)
    return None
