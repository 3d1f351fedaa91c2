"""Layouts of the text encoders, which families share."""

from __future__ import annotations

from typing import Any

from calotype.checkpoint.keys import Alias, Extra, Rule, Same, Sliced, Table, Transposed
from calotype.checkpoint.layouts import Evidence, Layout, Part, Signature
from calotype.text.clip import VIT_L, ClipConfig, ClipEncoder
from calotype.text.t5 import T5Config, T5Encoder

CLIP_RULES = {
    "embeddings.token_embedding.*": "tokens.*",
    "embeddings.position_embedding.*": "positions.*",
    "encoder.layers.{i}.layer_norm1.*": "layers.{i}.attention_norm.*",
    "encoder.layers.{i}.self_attn.q_proj.*": "layers.{i}.q.*",
    "encoder.layers.{i}.self_attn.k_proj.*": "layers.{i}.k.*",
    "encoder.layers.{i}.self_attn.v_proj.*": "layers.{i}.v.*",
    "encoder.layers.{i}.self_attn.out_proj.*": "layers.{i}.attention_out.*",
    "encoder.layers.{i}.layer_norm2.*": "layers.{i}.mlp_norm.*",
    "encoder.layers.{i}.mlp.fc1.*": "layers.{i}.mlp_in.*",
    "encoder.layers.{i}.mlp.fc2.*": "layers.{i}.mlp_out.*",
    "final_layer_norm.*": "norm_out.*",
}


def clip_layout(name: str, prefix: str) -> Layout[ClipConfig]:
    """transformers' CLIPTextModel, with or without the inner model's name in front of its keys."""

    def config(evidence: Evidence) -> ClipConfig:
        settings = evidence.settings
        vocabulary = evidence.size(prefix + "embeddings.token_embedding.weight")
        width = evidence.size(prefix + "embeddings.token_embedding.weight", 1)
        activation = settings.get("hidden_act", "quick_gelu" if width == 768 else "gelu")
        if activation not in ("quick_gelu", "gelu"):
            raise evidence.refuse(f"hidden_act = {activation!r}")
        evidence.require(layer_norm_eps=1e-5)
        end = evidence.number("eos_token_id", 2)
        project = settings.get("project", False) and "text_projection.weight" in evidence.weights
        return ClipConfig(
            vocabulary=vocabulary,
            width=width,
            layers=evidence.count(prefix + "encoder.layers.{i}."),
            heads=evidence.number("num_attention_heads", max(width // 64, 1)),
            mlp_width=evidence.size(prefix + "encoder.layers.0.mlp.fc1.weight"),
            positions=evidence.size(prefix + "embeddings.position_embedding.weight"),
            quick_gelu=activation == "quick_gelu",
            projection=evidence.size("text_projection.weight") if project else None,
            # Configurations of 2022 say 2 and mean the last id of the published vocabulary; words learned since stand
            # behind it.
            end=min(vocabulary, VIT_L.vocabulary) - 1 if end == 2 else end,
        )

    def table(config: ClipConfig) -> Table:
        rules = [Same(prefix + theirs, ours) for theirs, ours in CLIP_RULES.items()]
        extras = [
            Extra(prefix + "embeddings.position_ids", (1, config.positions)),
            Extra("logit_scale", ()),
            Extra("vision_model.*"),
            Extra("visual_projection.weight"),
        ]
        if config.projection:
            rules.append(Same("text_projection.weight", "projection.weight"))
        else:
            extras.append(Extra("text_projection.weight", (config.width, config.width)))
        return Table(f"clip/{name}", tuple(rules), tuple(extras))

    return Layout(
        name=name,
        signature=Signature(
            has=(
                prefix + "embeddings.token_embedding.weight",
                prefix + "encoder.layers.0.self_attn.q_proj.weight",
            ),
            lacks=() if prefix else ("text_model.embeddings.token_embedding.weight",),
        ),
        config=config,
        table=table,
        settings=clip_settings,
    )


def clip_settings(config: ClipConfig) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModelWithProjection" if config.projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.positions,
        "hidden_act": "quick_gelu" if config.quick_gelu else "gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": config.projection or config.width,
        "eos_token_id": config.end,
    }


OPENCLIP_RULES = {
    "token_embedding.*": "tokens.*",
    "transformer.resblocks.{i}.ln_1.*": "layers.{i}.attention_norm.*",
    "transformer.resblocks.{i}.attn.out_proj.*": "layers.{i}.attention_out.*",
    "transformer.resblocks.{i}.ln_2.*": "layers.{i}.mlp_norm.*",
    "transformer.resblocks.{i}.mlp.c_fc.*": "layers.{i}.mlp_in.*",
    "transformer.resblocks.{i}.mlp.c_proj.*": "layers.{i}.mlp_out.*",
    "ln_final.*": "norm_out.*",
}


def openclip_config(evidence: Evidence) -> ClipConfig:
    vocabulary, width = evidence.size("token_embedding.weight"), evidence.size("token_embedding.weight", 1)
    return ClipConfig(
        vocabulary=vocabulary,
        width=width,
        layers=evidence.count("transformer.resblocks.{i}."),
        heads=evidence.number("num_attention_heads", max(width // 64, 1)),
        mlp_width=evidence.size("transformer.resblocks.0.mlp.c_fc.weight"),
        positions=evidence.size("positional_embedding"),
        quick_gelu=False,
        projection=evidence.size("text_projection", 1) if "text_projection" in evidence.weights else None,
        end=vocabulary - 1,
    )


def openclip_table(config: ClipConfig) -> Table:
    rules: list[Rule] = [Same(theirs, ours) for theirs, ours in OPENCLIP_RULES.items()]
    rules.append(Same("positional_embedding", "positions.weight"))
    for number, x in enumerate("qkv"):
        theirs = "transformer.resblocks.{i}.attn.in_proj_*"
        rules.append(Sliced(theirs, f"layers.{{i}}.{x}.*", part=number, parts=3))
    if config.projection:
        rules.append(Transposed("text_projection", "projection.weight"))
    extras = (
        Extra("logit_scale", ()),
        Extra("attn_mask"),
        # Left over where ComfyUI wrote transformers' encoder under these names.
        Extra("transformer.text_model.embeddings.position_ids", (1, config.positions)),
    )
    return Table("clip/openclip", tuple(rules), extras)


CLIP = Part(
    name="clip",
    network=ClipEncoder,
    layouts=(
        clip_layout("transformers", "text_model."),
        clip_layout("transformers-bare", ""),
        Layout(
            name="openclip",
            # No settings: only whole checkpoints hold it so, folders have it as transformers does.
            signature=Signature(
                has=("transformer.resblocks.0.attn.in_proj_weight", "token_embedding.weight", "positional_embedding")
            ),
            config=openclip_config,
            table=openclip_table,
        ),
    ),
)


T5_RULES = {
    "shared.*": "tokens.*",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.*": "position_bias.*",
    "encoder.block.{i}.layer.0.layer_norm.*": "layers.{i}.attention_norm.*",
    "encoder.block.{i}.layer.0.SelfAttention.q.*": "layers.{i}.q.*",
    "encoder.block.{i}.layer.0.SelfAttention.k.*": "layers.{i}.k.*",
    "encoder.block.{i}.layer.0.SelfAttention.v.*": "layers.{i}.v.*",
    "encoder.block.{i}.layer.0.SelfAttention.o.*": "layers.{i}.attention_out.*",
    "encoder.block.{i}.layer.1.layer_norm.*": "layers.{i}.mlp_norm.*",
    "encoder.block.{i}.layer.1.DenseReluDense.wi_0.*": "layers.{i}.mlp_gate.*",
    "encoder.block.{i}.layer.1.DenseReluDense.wi_1.*": "layers.{i}.mlp_in.*",
    "encoder.block.{i}.layer.1.DenseReluDense.wo.*": "layers.{i}.mlp_out.*",
    "encoder.final_layer_norm.*": "norm_out.*",
}


LLAMA_T5_RULES = {
    "token_embd.*": "tokens.*",
    "enc.blk.0.attn_rel_b.*": "position_bias.*",
    "enc.blk.{i}.attn_norm.*": "layers.{i}.attention_norm.*",
    "enc.blk.{i}.attn_q.*": "layers.{i}.q.*",
    "enc.blk.{i}.attn_k.*": "layers.{i}.k.*",
    "enc.blk.{i}.attn_v.*": "layers.{i}.v.*",
    "enc.blk.{i}.attn_o.*": "layers.{i}.attention_out.*",
    "enc.blk.{i}.ffn_norm.*": "layers.{i}.mlp_norm.*",
    "enc.blk.{i}.ffn_gate.*": "layers.{i}.mlp_gate.*",
    "enc.blk.{i}.ffn_up.*": "layers.{i}.mlp_in.*",
    "enc.blk.{i}.ffn_down.*": "layers.{i}.mlp_out.*",
    "enc.output_norm.*": "norm_out.*",
}


def llama_t5_config(evidence: Evidence) -> T5Config:
    heads = evidence.size("enc.blk.0.attn_rel_b.weight", 1)
    return T5Config(
        vocabulary=evidence.size("token_embd.weight"),
        width=evidence.size("token_embd.weight", 1),
        layers=evidence.count("enc.blk.{i}."),
        heads=heads,
        head_width=evidence.size("enc.blk.0.attn_q.weight") // max(heads, 1),
        mlp_width=evidence.size("enc.blk.0.ffn_gate.weight"),
        buckets=evidence.size("enc.blk.0.attn_rel_b.weight"),
        distance=128,
    )


def llama_t5_table(config: T5Config) -> Table:
    """llama.cpp's names, which GGUF files of T5 have."""
    return Table(
        "t5/llama.cpp",
        tuple(Same(theirs, ours) for theirs, ours in LLAMA_T5_RULES.items()),
        extras=(Extra("dec.*"), Extra("output.weight")),
    )


def t5_config(evidence: Evidence) -> T5Config:
    evidence.require(feed_forward_proj="gated-gelu", layer_norm_epsilon=1e-6)
    tokens = "shared.weight" if "shared.weight" in evidence.weights else "encoder.embed_tokens.weight"
    first = "encoder.block.0.layer.0.SelfAttention."
    heads = evidence.size(first + "relative_attention_bias.weight", 1)
    return T5Config(
        vocabulary=evidence.size(tokens),
        width=evidence.size(tokens, 1),
        layers=evidence.count("encoder.block.{i}."),
        heads=heads,
        head_width=evidence.size(first + "q.weight") // max(heads, 1),
        mlp_width=evidence.size("encoder.block.0.layer.1.DenseReluDense.wi_0.weight"),
        buckets=evidence.size(first + "relative_attention_bias.weight"),
        distance=evidence.number("relative_attention_max_distance", 128),
    )


def t5_table(config: T5Config) -> Table:
    return Table(
        "t5/transformers",
        tuple(Same(theirs, ours) for theirs, ours in T5_RULES.items()),
        extras=(Extra("logit_scale", ()), Extra("decoder.*"), Extra("lm_head.weight")),
        aliases=(Alias("encoder.embed_tokens.weight", "shared.weight"),),
    )


def t5_settings(config: T5Config) -> dict[str, Any]:
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": config.vocabulary,
        "d_model": config.width,
        "d_kv": config.head_width,
        "d_ff": config.mlp_width,
        "num_layers": config.layers,
        "num_heads": config.heads,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.distance,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "is_encoder_decoder": False,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


T5 = Part(
    name="t5",
    network=T5Encoder,
    layouts=(
        Layout(
            name="transformers",
            signature=Signature(
                has=(
                    "encoder.block.0.layer.0.SelfAttention.q.weight",
                    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
                )
            ),
            config=t5_config,
            table=t5_table,
            settings=t5_settings,
        ),
        Layout(
            name="llama.cpp",
            signature=Signature(
                has=("enc.blk.0.attn_q.weight", "enc.blk.0.ffn_gate.weight", "enc.blk.0.attn_rel_b.weight")
            ),
            config=llama_t5_config,
            table=llama_t5_table,
        ),
    ),
)
