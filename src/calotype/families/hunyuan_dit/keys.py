"""Hunyuan-DiT's transformer in the layouts it is published in."""

from __future__ import annotations

from typing import Any

from calotype.checkpoint.keys import Rule, Same, Stacked, Swapped, Table
from calotype.checkpoint.layouts import Evidence, Layout, Part, Signature
from calotype.errors import DamagedFile
from calotype.families.hunyuan_dit.config import HunyuanConfig
from calotype.families.hunyuan_dit.network import SINUSOID, SIZES, HunyuanNetwork


def original_table(config: HunyuanConfig) -> Table:
    """Tencent's own names. There norm2 comes before the MLP and norm3 before cross-attention."""
    ends = [Same("final_layer.adaLN_modulation.1.*", "conditioner.out.*"), Same("final_layer.linear.*", "out.*")]
    return Table("transformer/original", (*original_rules(config), *ends))


def original_rules(config: HunyuanConfig) -> list[Rule]:
    """What ControlNets have too."""
    block = "blocks.{i}"
    rules: list[Rule] = [
        Same("x_embedder.proj.*", "image_in.*"),
        Same("text_embedding_padding", "conditioner.padding.weight"),
        *_projection("t_embedder.mlp.{}", "time_in", 0, 2),
        *_projection("extra_embedder.{}", "extra_in", 0, 2),
        *_projection("mlp_t5.{}", "t5_in", 0, 2),
        *_pool("pooler"),
        Same(f"{block}.default_modulation.1.*", "conditioner.shifts.{i}.*"),
        Same(f"{block}.attn2.kv_proj.*", "conditioner.text.{i}.kv.*"),
        Same(f"{block}.attn2.k_norm.*", "conditioner.text.{i}.k_norm.*"),
        Same(f"{block}.skip_norm.*", f"{block}.skip_norm.*"),
        Same(f"{block}.skip_linear.*", f"{block}.skip_in.*"),
        Same(f"{block}.norm1.*", f"{block}.self_norm.*"),
        Same(f"{block}.attn1.Wqkv.*", f"{block}.self_attention.qkv.*"),
        *(Same(f"{block}.attn1.{x}_norm.*", f"{block}.self_attention.{x}_norm.*") for x in "qk"),
        Same(f"{block}.attn1.out_proj.*", f"{block}.self_attention.out.*"),
        Same(f"{block}.norm3.*", f"{block}.cross_norm.*"),
        Same(f"{block}.attn2.q_proj.*", f"{block}.cross_attention.q.*"),
        Same(f"{block}.attn2.q_norm.*", f"{block}.cross_attention.q_norm.*"),
        Same(f"{block}.attn2.out_proj.*", f"{block}.cross_attention.out.*"),
        Same(f"{block}.norm2.*", f"{block}.mlp_norm.*"),
        Same(f"{block}.mlp.fc1.*", f"{block}.mlp_in.*"),
        Same(f"{block}.mlp.fc2.*", f"{block}.mlp_out.*"),
    ]
    if config.styled:
        rules.append(Same("style_embedder.weight", "conditioner.style.weight"))
    return rules


def diffusers_table(config: HunyuanConfig) -> Table:
    """diffusers' names, where the last shift and scale change places."""
    ends = [Swapped("norm_out.linear.*", "conditioner.out.*"), Same("proj_out.*", "out.*")]
    return Table("transformer/diffusers", (*diffusers_rules(config), *ends))


def diffusers_rules(config: HunyuanConfig) -> list[Rule]:
    """What ControlNets have too."""
    d = config.width
    block, inputs = "blocks.{i}", "time_extra_emb"
    rules: list[Rule] = [
        Same("pos_embed.proj.*", "image_in.*"),
        Same("text_embedding_padding", "conditioner.padding.weight"),
        *_projection(f"{inputs}.timestep_embedder.linear_{{}}", "time_in", 1, 2),
        *_projection(f"{inputs}.extra_embedder.linear_{{}}", "extra_in", 1, 2),
        *_projection("text_embedder.linear_{}", "t5_in", 1, 2),
        *_pool(f"{inputs}.pooler"),
        Same(f"{block}.norm1.linear.*", "conditioner.shifts.{i}.*"),
        Stacked(tuple(f"{block}.attn2.to_{x}.*" for x in "kv"), "conditioner.text.{i}.kv.*", rows=(d, d)),
        Same(f"{block}.attn2.norm_k.*", "conditioner.text.{i}.k_norm.*"),
        Same(f"{block}.skip_norm.*", f"{block}.skip_norm.*"),
        Same(f"{block}.skip_linear.*", f"{block}.skip_in.*"),
        Same(f"{block}.norm1.norm.*", f"{block}.self_norm.*"),
        Stacked(tuple(f"{block}.attn1.to_{x}.*" for x in "qkv"), f"{block}.self_attention.qkv.*", rows=(d, d, d)),
        *(Same(f"{block}.attn1.norm_{x}.*", f"{block}.self_attention.{x}_norm.*") for x in "qk"),
        Same(f"{block}.attn1.to_out.0.*", f"{block}.self_attention.out.*"),
        Same(f"{block}.norm2.*", f"{block}.cross_norm.*"),
        Same(f"{block}.attn2.to_q.*", f"{block}.cross_attention.q.*"),
        Same(f"{block}.attn2.norm_q.*", f"{block}.cross_attention.q_norm.*"),
        Same(f"{block}.attn2.to_out.0.*", f"{block}.cross_attention.out.*"),
        Same(f"{block}.norm3.*", f"{block}.mlp_norm.*"),
        Same(f"{block}.ff.net.0.proj.*", f"{block}.mlp_in.*"),
        Same(f"{block}.ff.net.2.*", f"{block}.mlp_out.*"),
    ]
    if config.styled:
        rules.append(Same(f"{inputs}.style_embedder.weight", "conditioner.style.weight"))
    return rules


def _projection(theirs: str, ours: str, first: int, second: int) -> list[Rule]:
    return [
        Same(theirs.format(first) + ".*", f"conditioner.{ours}.inner.*"),
        Same(theirs.format(second) + ".*", f"conditioner.{ours}.outer.*"),
    ]


def _pool(theirs: str) -> list[Rule]:
    return [
        Same(f"{theirs}.positional_embedding", "conditioner.pool.positions.weight"),
        *(Same(f"{theirs}.{x}_proj.*", f"conditioner.pool.{x}.*") for x in "qkv"),
        Same(f"{theirs}.c_proj.*", "conditioner.pool.out.*"),
    ]


def _config(
    evidence: Evidence, *, image: str, out: str | None, pool: str, extra: str, heads: str, mlp: str, text: str
) -> HunyuanConfig:
    evidence.require(activation_fn="gelu-approximate", norm_type="layer_norm")
    width, channels, patch = (evidence.size(image, axis) for axis in (0, 1, 2))
    head, pooled, told = evidence.size(heads), evidence.size(pool + ".c_proj.weight"), evidence.size(extra, 1)
    if not head or width % head or head % 4:
        raise DamagedFile(f"{evidence.weights.source}: heads of {head} channels do not fit a width of {width}")
    t5_tokens = evidence.size(pool + ".positional_embedding") - 1
    styled = told != pooled
    if styled and told != pooled + SIZES * SINUSOID + width:
        raise evidence.refuse(f"a conditioning vector of {told} channels")
    return HunyuanConfig(
        channels_in=channels,
        channels_out=channels if out is None else evidence.size(out) // patch**2,
        patch=patch,
        width=width,
        heads=width // head,
        mlp_width=evidence.size(mlp),
        blocks=evidence.count("blocks.{i}."),
        text_width=evidence.size("text_embedding_padding", 1),
        text_tokens=evidence.size("text_embedding_padding") - t5_tokens,
        t5_width=evidence.size(text, 1),
        t5_tokens=t5_tokens,
        pooled_width=pooled,
        styled=styled,
    )


def original_config(evidence: Evidence, out: str | None = "final_layer.linear.weight") -> HunyuanConfig:
    """The numbers under Tencent's names; `out` is None for what ends in the middle."""
    return _config(
        evidence,
        image="x_embedder.proj.weight",
        out=out,
        pool="pooler",
        extra="extra_embedder.0.weight",
        heads="blocks.0.attn1.q_norm.weight",
        mlp="blocks.0.mlp.fc1.weight",
        text="mlp_t5.0.weight",
    )


def diffusers_config(evidence: Evidence, out: str | None = "proj_out.weight") -> HunyuanConfig:
    """The numbers under diffusers' names; `out` is None for what ends in the middle."""
    return _config(
        evidence,
        image="pos_embed.proj.weight",
        out=out,
        pool="time_extra_emb.pooler",
        extra="time_extra_emb.extra_embedder.linear_1.weight",
        heads="blocks.0.attn1.norm_q.weight",
        mlp="blocks.0.ff.net.0.proj.weight",
        text="text_embedder.linear_1.weight",
    )


def diffusers_settings(config: HunyuanConfig) -> dict[str, Any]:
    return {
        "_class_name": "HunyuanDiT2DModel",
        "activation_fn": "gelu-approximate",
        "attention_head_dim": config.width // config.heads,
        "cross_attention_dim": config.text_width,
        "cross_attention_dim_t5": config.t5_width,
        "hidden_size": config.width,
        "in_channels": config.channels_in,
        "learn_sigma": config.channels_out == 2 * config.channels_in,
        # They multiply by it and cut to a whole number.
        "mlp_ratio": round((config.mlp_width + 0.5) / config.width, 5),
        "norm_type": "layer_norm",
        "num_attention_heads": config.heads,
        "num_layers": config.blocks,
        "patch_size": config.patch,
        "pooled_projection_dim": config.pooled_width,
        "sample_size": 128,
        "text_len": config.text_tokens,
        "text_len_t5": config.t5_tokens,
        "use_style_cond_and_image_meta_size": config.styled,
    }


TRANSFORMER = Part(
    name="transformer",
    network=HunyuanNetwork,
    layouts=(
        Layout(
            name="original",
            style="original",
            signature=Signature(
                has=("text_embedding_padding", "blocks.0.attn1.Wqkv.weight", "final_layer.linear.weight")
            ),
            config=original_config,
            table=original_table,
        ),
        Layout(
            name="diffusers",
            style="diffusers",
            signature=Signature(
                has=(
                    "text_embedding_padding",
                    "time_extra_emb.timestep_embedder.linear_1.weight",
                    "proj_out.weight",
                ),
            ),
            config=diffusers_config,
            table=diffusers_table,
            settings=diffusers_settings,
        ),
    ),
)
