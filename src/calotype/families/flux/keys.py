"""FLUX.1's transformer in the layouts it is published in."""

from __future__ import annotations

from typing import Any

from calotype.checkpoint.keys import Rule, Same, Stacked, Swapped, Table
from calotype.checkpoint.layouts import Evidence, Layout, Part, Signature
from calotype.errors import DamagedFile
from calotype.families.flux.config import DEV, FluxConfig
from calotype.families.flux.network import FluxNetwork

AXES = {128: DEV.axes}  # channels of a head -> how many of them turn with text, row and column position


def original_table(config: FluxConfig) -> Table:
    """Black Forest Labs' own names."""
    rules: list[Rule] = [
        Same("img_in.*", "image_in.*"),
        Same("txt_in.*", "text_in.*"),
        Same("final_layer.linear.*", "out.*"),
        Same("final_layer.adaLN_modulation.1.*", "modulation.out.*"),
        Same("single_blocks.{i}.modulation.lin.*", "modulation.single.{i}.*"),
        Same("single_blocks.{i}.linear1.*", "single.{i}.inward.*"),
        Same("single_blocks.{i}.linear2.*", "single.{i}.outward.*"),
        Same("single_blocks.{i}.norm.query_norm.scale", "single.{i}.q_norm.weight"),
        Same("single_blocks.{i}.norm.key_norm.scale", "single.{i}.k_norm.weight"),
    ]
    for theirs, ours in (("time_in", "time_in"), ("vector_in", "pooled_in"), ("guidance_in", "guidance_in")):
        rules += [
            Same(f"{theirs}.in_layer.*", f"{ours}.inner.*"),
            Same(f"{theirs}.out_layer.*", f"{ours}.outer.*"),
        ]
    for theirs, ours in (("img", "image"), ("txt", "text")):
        block = f"double_blocks.{{i}}.{theirs}"
        stream = f"joint.{{i}}.{ours}"
        rules += [
            Same(f"{block}_mod.lin.*", f"modulation.joint_{ours}.{{i}}.*"),
            Same(f"{block}_attn.qkv.*", f"{stream}.qkv.*"),
            Same(f"{block}_attn.norm.query_norm.scale", f"{stream}.q_norm.weight"),
            Same(f"{block}_attn.norm.key_norm.scale", f"{stream}.k_norm.weight"),
            Same(f"{block}_attn.proj.*", f"{stream}.attention_out.*"),
            Same(f"{block}_mlp.0.*", f"{stream}.mlp_in.*"),
            Same(f"{block}_mlp.2.*", f"{stream}.mlp_out.*"),
        ]
    return Table("flux/original", tuple(rules))


def diffusers_table(config: FluxConfig) -> Table:
    """FluxTransformer2DModel: queries, keys, values and the single blocks' MLP apart, the last scale first."""
    ends = [Same("proj_out.*", "out.*"), Swapped("norm_out.linear.*", "modulation.out.*")]
    return Table("flux/diffusers", (*diffusers_rules(config), *ends))


def diffusers_rules(config: FluxConfig) -> list[Rule]:
    """What ControlNets have too."""
    d = config.width
    joint, single = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
    rules: list[Rule] = [
        Same("x_embedder.*", "image_in.*"),
        Same("context_embedder.*", "text_in.*"),
        Same(f"{single}.norm.linear.*", "modulation.single.{i}.*"),
        Stacked(
            (*(f"{single}.attn.to_{x}.*" for x in "qkv"), f"{single}.proj_mlp.*"),
            "single.{i}.inward.*",
            rows=(d, d, d, config.mlp_ratio * d),
        ),
        Same(f"{single}.proj_out.*", "single.{i}.outward.*"),
        Same(f"{single}.attn.norm_q.*", "single.{i}.q_norm.*"),
        Same(f"{single}.attn.norm_k.*", "single.{i}.k_norm.*"),
    ]
    embedders = {
        "timestep_embedder": "time_in",
        "text_embedder": "pooled_in",
        "guidance_embedder": "guidance_in",
    }
    for theirs, ours in embedders.items():
        rules += [
            Same(f"time_text_embed.{theirs}.linear_1.*", f"{ours}.inner.*"),
            Same(f"time_text_embed.{theirs}.linear_2.*", f"{ours}.outer.*"),
        ]
    for ours, norm, heads, norms, out, mlp in (
        ("image", "norm1", "to_{}", "norm_{}", "to_out.0", "ff"),
        ("text", "norm1_context", "add_{}_proj", "norm_added_{}", "to_add_out", "ff_context"),
    ):
        stream = f"joint.{{i}}.{ours}"
        rules += [
            Same(f"{joint}.{norm}.linear.*", f"modulation.joint_{ours}.{{i}}.*"),
            Stacked(tuple(f"{joint}.attn.{heads.format(x)}.*" for x in "qkv"), f"{stream}.qkv.*", rows=(d, d, d)),
            Same(f"{joint}.attn.{norms.format('q')}.*", f"{stream}.q_norm.*"),
            Same(f"{joint}.attn.{norms.format('k')}.*", f"{stream}.k_norm.*"),
            Same(f"{joint}.attn.{out}.*", f"{stream}.attention_out.*"),
            Same(f"{joint}.{mlp}.net.0.proj.*", f"{stream}.mlp_in.*"),
            Same(f"{joint}.{mlp}.net.2.*", f"{stream}.mlp_out.*"),
        ]
    return rules


def _config(
    evidence: Evidence,
    *,
    image: str,
    text: str,
    out: str,
    pooled: str,
    mlp: str,
    norm: str,
    guidance: str,
    blocks: tuple[str, str],
    out_axis: int = 0,
) -> FluxConfig:
    width = evidence.size(image)
    head = evidence.size(norm)
    axes = evidence.settings.get("axes_dims_rope", AXES.get(head))
    if axes is None:
        raise evidence.refuse(f"a head of {head} channels without a config.json that gives axes_dims_rope")
    if not head or width % head or sum(axes) != head:
        raise DamagedFile(
            f"{evidence.weights.source}: heads of {head} channels fit neither the width {width} nor the axes {axes}"
        )
    evidence.require(patch_size=1)
    return FluxConfig(
        image_width=evidence.size(image, 1),
        image_width_out=evidence.size(out, out_axis),
        text_width=evidence.size(text, 1),
        pooled_width=evidence.size(pooled, 1),
        width=width,
        heads=width // head,
        mlp_ratio=evidence.size(mlp) // width,
        joint_blocks=evidence.count(blocks[0]),
        single_blocks=evidence.count(blocks[1]),
        axes=tuple(axes),
        theta=10_000,
        guidance_input=guidance in evidence.weights,
        patch=evidence.number("latent_patch", DEV.patch),
    )


def original_config(evidence: Evidence) -> FluxConfig:
    return _config(
        evidence,
        image="img_in.weight",
        text="txt_in.weight",
        out="final_layer.linear.weight",
        pooled="vector_in.in_layer.weight",
        mlp="double_blocks.0.img_mlp.0.weight",
        norm="double_blocks.0.img_attn.norm.query_norm.scale",
        guidance="guidance_in.in_layer.weight",
        blocks=("double_blocks.{i}.", "single_blocks.{i}."),
    )


def diffusers_config(evidence: Evidence) -> FluxConfig:
    return read_config(evidence, out="proj_out.weight", out_axis=0)


def read_config(evidence: Evidence, *, out: str, out_axis: int) -> FluxConfig:
    """The numbers under diffusers' names; the tensor `out` shows how wide tokens leave."""
    return _config(
        evidence,
        image="x_embedder.weight",
        text="context_embedder.weight",
        out=out,
        out_axis=out_axis,
        pooled="time_text_embed.text_embedder.linear_1.weight",
        mlp="transformer_blocks.0.ff.net.0.proj.weight",
        norm="transformer_blocks.0.attn.norm_q.weight",
        guidance="time_text_embed.guidance_embedder.linear_1.weight",
        blocks=("transformer_blocks.{i}.", "single_transformer_blocks.{i}."),
    )


def diffusers_settings(config: FluxConfig) -> dict[str, Any]:
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": config.image_width,
        "out_channels": None if config.image_width_out == config.image_width else config.image_width_out,
        "num_layers": config.joint_blocks,
        "num_single_layers": config.single_blocks,
        "attention_head_dim": config.width // config.heads,
        "num_attention_heads": config.heads,
        "joint_attention_dim": config.text_width,
        "pooled_projection_dim": config.pooled_width,
        "guidance_embeds": config.guidance_input,
        "axes_dims_rope": list(config.axes),
        **({} if config.patch == DEV.patch else {"latent_patch": config.patch}),
    }


TRANSFORMER = Part(
    name="transformer",
    network=FluxNetwork,
    layouts=(
        Layout(
            name="original",
            style="original",
            signature=Signature(
                has=(
                    "double_blocks.0.img_attn.qkv.weight",
                    "double_blocks.0.img_mod.lin.weight",
                    "single_blocks.0.modulation.lin.weight",
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
                    "single_transformer_blocks.0.proj_mlp.weight",
                    "transformer_blocks.0.attn.add_q_proj.weight",
                    "time_text_embed.text_embedder.linear_1.weight",
                ),
            ),
            config=diffusers_config,
            table=diffusers_table,
            settings=diffusers_settings,
        ),
    ),
)
