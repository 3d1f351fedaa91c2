"""Stable Diffusion 3's transformer in the layouts it is published in."""

from __future__ import annotations

from math import isqrt
from typing import Any

from calotype.checkpoint.keys import Rule, Same, Stacked, Swapped, Table
from calotype.checkpoint.layouts import Evidence, Layout, Part, Signature
from calotype.errors import DamagedFile
from calotype.families.sd3.config import Sd3Config
from calotype.families.sd3.network import Sd3Network

HEAD = 64  # channels of a head, where neither norms nor a config.json tell


def original_table(config: Sd3Config) -> Table:
    """Stability AI's own names. The last block's text gives keys and values only."""
    rules: list[Rule] = [
        Same("x_embedder.proj.*", "image_in.*"),
        Same("pos_embed", "positions.table"),
        Same("context_embedder.*", "text_in.*"),
        Same("final_layer.linear.*", "out.*"),
        Same("final_layer.adaLN_modulation.1.*", "modulation.out.*"),
        Same("joint_blocks.{last}.context_block.adaLN_modulation.1.*", "modulation.last_text.*"),
        Same("joint_blocks.{i}.x_block.attn2.proj.*", "blocks.{i}.own_out.*"),
    ]
    for theirs, ours in (("t_embedder", "time_in"), ("y_embedder", "pooled_in")):
        rules += [Same(f"{theirs}.mlp.0.*", f"{ours}.inner.*"), Same(f"{theirs}.mlp.2.*", f"{ours}.outer.*")]
    for theirs, ours in (("x_block", "image"), ("context_block", "text")):
        block = f"joint_blocks.{{i}}.{theirs}"
        rules += [
            Same(f"{block}.adaLN_modulation.1.*", f"modulation.{ours}.{{i}}.*"),
            Same(f"{block}.attn.proj.*", f"blocks.{{i}}.{ours}.attention_out.*"),
            Same(f"{block}.mlp.fc1.*", f"blocks.{{i}}.{ours}.mlp_in.*"),
            Same(f"{block}.mlp.fc2.*", f"blocks.{{i}}.{ours}.mlp_out.*"),
        ]
    for theirs, ours in (("x_block.attn", "image"), ("x_block.attn2", "own"), ("context_block.attn", "text")):
        heads = f"joint_blocks.{{i}}.{theirs}"
        rules += [
            Same(f"{heads}.qkv.*", f"blocks.{{i}}.{ours}_heads.qkv.*"),
            Same(f"{heads}.ln_q.*", f"blocks.{{i}}.{ours}_heads.q_norm.*"),
            Same(f"{heads}.ln_k.*", f"blocks.{{i}}.{ours}_heads.k_norm.*"),
        ]
    return Table("sd3/original", tuple(rules), numbers={"last": config.blocks - 1})


def diffusers_table(config: Sd3Config) -> Table:
    """SD3Transformer2DModel: queries, keys and values apart; where only shift and scale are made, the scale first."""
    ends: list[Rule] = [
        Same("proj_out.*", "out.*"),
        Swapped("norm_out.linear.*", "modulation.out.*"),
        Swapped("transformer_blocks.{last}.norm1_context.linear.*", "modulation.last_text.*"),
    ]
    return Table("sd3/diffusers", (*diffusers_rules(config), *ends), numbers={"last": config.blocks - 1})


def diffusers_rules(config: Sd3Config, modulation: str = "modulation.image") -> list[Rule]:
    """What ControlNets have too; `modulation` is what their layers for the picture's are called here."""
    d = config.width
    block = "transformer_blocks.{i}"
    rules: list[Rule] = [
        Same("pos_embed.proj.*", "image_in.*"),
        Same("pos_embed.pos_embed", "positions.table"),
        Same("context_embedder.*", "text_in.*"),
        Same(f"{block}.attn2.to_out.0.*", "blocks.{i}.own_out.*"),
    ]
    for theirs, ours in (("timestep_embedder", "time_in"), ("text_embedder", "pooled_in")):
        rules += [
            Same(f"time_text_embed.{theirs}.linear_1.*", f"{ours}.inner.*"),
            Same(f"time_text_embed.{theirs}.linear_2.*", f"{ours}.outer.*"),
        ]
    for ours, norm, out, mlp in (
        ("image", "norm1", "to_out.0", "ff"),
        ("text", "norm1_context", "to_add_out", "ff_context"),
    ):
        rules += [
            Same(f"{block}.{norm}.linear.*", f"{modulation if ours == 'image' else 'modulation.text'}.{{i}}.*"),
            Same(f"{block}.attn.{out}.*", f"blocks.{{i}}.{ours}.attention_out.*"),
            Same(f"{block}.{mlp}.net.0.proj.*", f"blocks.{{i}}.{ours}.mlp_in.*"),
            Same(f"{block}.{mlp}.net.2.*", f"blocks.{{i}}.{ours}.mlp_out.*"),
        ]
    for ours, heads, norms in (
        ("image", "attn.to_{}", "attn.norm_{}"),
        ("own", "attn2.to_{}", "attn2.norm_{}"),
        ("text", "attn.add_{}_proj", "attn.norm_added_{}"),
    ):
        stream = f"blocks.{{i}}.{ours}_heads"
        rules += [
            Stacked(tuple(f"{block}.{heads.format(x)}.*" for x in "qkv"), f"{stream}.qkv.*", rows=(d, d, d)),
            Same(f"{block}.{norms.format('q')}.*", f"{stream}.q_norm.*"),
            Same(f"{block}.{norms.format('k')}.*", f"{stream}.k_norm.*"),
        ]
    return rules


def _config(
    evidence: Evidence,
    *,
    image: str,
    table: str,
    text: str,
    out: str,
    pooled: str,
    mlp: str,
    norm: str,
    blocks: str,
    own: str,
    channels_out: int | None = None,
) -> Sd3Config:
    width, patch = evidence.size(image), evidence.size(image, 2)
    norms = norm in evidence.weights
    head = evidence.size(norm) if norms else evidence.number("attention_head_dim", HEAD)
    places = evidence.size(table, 1)
    if not head or width % head or isqrt(places) ** 2 != places:
        raise DamagedFile(
            f"{evidence.weights.source}: heads of {head} channels do not divide a width of {width}, or {places} "
            "positions are no square"
        )
    evidence.require(caption_projection_dim=width, qk_norm="rms_norm" if norms else None)
    count = evidence.count(blocks)
    return Sd3Config(
        channels_in=evidence.size(image, 1),
        channels_out=channels_out or evidence.size(out) // patch**2,
        patch=patch,
        text_width=evidence.size(text, 1),
        pooled_width=evidence.size(pooled, 1),
        width=width,
        heads=width // head,
        mlp_width=evidence.size(mlp),
        blocks=count,
        positions=isqrt(places),
        dual=tuple(i for i in range(count) if (blocks + own).replace("{i}", str(i)) in evidence.weights),
        norms=norms,
    )


def original_config(evidence: Evidence) -> Sd3Config:
    return _config(
        evidence,
        image="x_embedder.proj.weight",
        table="pos_embed",
        text="context_embedder.weight",
        out="final_layer.linear.weight",
        pooled="y_embedder.mlp.0.weight",
        mlp="joint_blocks.0.x_block.mlp.fc1.weight",
        norm="joint_blocks.0.x_block.attn.ln_q.weight",
        blocks="joint_blocks.{i}.",
        own="x_block.attn2.qkv.weight",
    )


def diffusers_config(evidence: Evidence) -> Sd3Config:
    return read_config(evidence)


def read_config(evidence: Evidence, channels_out: int | None = None) -> Sd3Config:
    """The numbers under diffusers' names; `channels_out` are given where no layer shows them."""
    return _config(
        evidence,
        image="pos_embed.proj.weight",
        table="pos_embed.pos_embed",
        text="context_embedder.weight",
        out="proj_out.weight",
        channels_out=channels_out,
        pooled="time_text_embed.text_embedder.linear_1.weight",
        mlp="transformer_blocks.0.ff.net.0.proj.weight",
        norm="transformer_blocks.0.attn.norm_q.weight",
        blocks="transformer_blocks.{i}.",
        own="attn2.to_q.weight",
    )


def diffusers_settings(config: Sd3Config) -> dict[str, Any]:
    return {
        "_class_name": "SD3Transformer2DModel",
        "attention_head_dim": config.width // config.heads,
        "caption_projection_dim": config.width,
        "dual_attention_layers": list(config.dual),
        "in_channels": config.channels_in,
        "joint_attention_dim": config.text_width,
        "num_attention_heads": config.heads,
        "num_layers": config.blocks,
        "out_channels": config.channels_out,
        "patch_size": config.patch,
        "pooled_projection_dim": config.pooled_width,
        "pos_embed_max_size": config.positions,
        "qk_norm": "rms_norm" if config.norms else None,
        "sample_size": 128,
    }


TRANSFORMER = Part(
    name="transformer",
    network=Sd3Network,
    layouts=(
        Layout(
            name="original",
            style="original",
            signature=Signature(
                has=(
                    "joint_blocks.0.x_block.attn.qkv.weight",
                    "joint_blocks.0.context_block.attn.qkv.weight",
                    "x_embedder.proj.weight",
                )
            ),
            config=original_config,
            table=original_table,
        ),
        Layout(
            name="diffusers",
            style="diffusers",
            signature=Signature(
                has=(
                    "transformer_blocks.0.attn.add_q_proj.weight",
                    "time_text_embed.text_embedder.linear_1.weight",
                    "pos_embed.proj.weight",
                ),
                lacks=("controlnet_blocks.0.weight",),
            ),
            config=diffusers_config,
            table=diffusers_table,
            settings=diffusers_settings,
        ),
    ),
)
