"""Layouts of BERT, Hunyuan-DiT's first text encoder."""

from __future__ import annotations

from typing import Any

from calotype.checkpoint.keys import Extra, Same, Table
from calotype.checkpoint.layouts import Evidence, Layout, Part, Signature
from calotype.text.bert import EPSILON, BertConfig, BertEncoder

RULES = {
    "embeddings.word_embeddings.*": "tokens.*",
    "embeddings.position_embeddings.*": "positions.*",
    "embeddings.token_type_embeddings.*": "kinds.*",
    "embeddings.LayerNorm.*": "norm_in.*",
    "encoder.layer.{i}.attention.self.query.*": "layers.{i}.q.*",
    "encoder.layer.{i}.attention.self.key.*": "layers.{i}.k.*",
    "encoder.layer.{i}.attention.self.value.*": "layers.{i}.v.*",
    "encoder.layer.{i}.attention.output.dense.*": "layers.{i}.attention_out.*",
    "encoder.layer.{i}.attention.output.LayerNorm.*": "layers.{i}.attention_norm.*",
    "encoder.layer.{i}.intermediate.dense.*": "layers.{i}.mlp_in.*",
    "encoder.layer.{i}.output.dense.*": "layers.{i}.mlp_out.*",
    "encoder.layer.{i}.output.LayerNorm.*": "layers.{i}.mlp_norm.*",
}


def layout(name: str, prefix: str, style: str) -> Layout[BertConfig]:
    """Tencent's file, which calls the network `bert` and holds the rest of its CLIP too, or transformers' bare one."""
    tokens = prefix + "embeddings.word_embeddings.weight"
    first = prefix + "encoder.layer.0."

    def config(evidence: Evidence) -> BertConfig:
        evidence.require(
            hidden_act="gelu", is_decoder=False, layer_norm_eps=EPSILON, position_embedding_type="absolute"
        )
        width = evidence.size(tokens, 1)
        return BertConfig(
            vocabulary=evidence.size(tokens),
            width=width,
            layers=evidence.count(prefix + "encoder.layer.{i}."),
            heads=evidence.number("num_attention_heads", max(width // 64, 1)),
            mlp_width=evidence.size(first + "intermediate.dense.weight"),
            positions=evidence.size(prefix + "embeddings.position_embeddings.weight"),
            kinds=evidence.size(prefix + "embeddings.token_type_embeddings.weight"),
        )

    def table(config: BertConfig) -> Table:
        square = (config.width, config.width)
        return Table(
            f"bert/{name}",
            tuple(Same(prefix + theirs, ours) for theirs, ours in RULES.items()),
            extras=(
                # What states for images have no use for.
                Extra(prefix + "embeddings.position_ids", (1, config.positions)),
                Extra(prefix + "pooler.dense.weight", square),
                Extra(prefix + "pooler.dense.bias", (config.width,)),
                Extra("cls.*"),
                Extra("logit_scale", ()),
                Extra("text_projection", square),
                Extra("visual.*"),
            ),
        )

    return Layout(
        name=name,
        style=style,
        signature=Signature(has=(tokens, first + "attention.self.query.weight")),
        config=config,
        table=table,
        settings=settings,
    )


def settings(config: BertConfig) -> dict[str, Any]:
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "layer_norm_eps": EPSILON,
        "max_position_embeddings": config.positions,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "type_vocab_size": config.kinds,
        "vocab_size": config.vocabulary,
    }


BERT = Part(
    name="bert",
    network=BertEncoder,
    # The longer names first: the shorter ones are found in them too.
    layouts=(layout("original", "bert.", "original"), layout("transformers", "", "diffusers")),
)
