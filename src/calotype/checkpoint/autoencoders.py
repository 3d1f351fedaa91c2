"""Layouts of the autoencoders, which families share."""

from __future__ import annotations

import re
from typing import Any

from calotype.checkpoint.keys import Alias, Extra, Pointwise, Rule, Same, Table
from calotype.checkpoint.layouts import Evidence, Layout, Part, Signature
from calotype.nn.autoencoder import Autoencoder, AutoencoderConfig
from calotype.nn.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig

# ---- AutoencoderKL


def _residual(theirs: str, ours: str, shortcut: str) -> list[Rule]:
    names = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", shortcut: "shortcut"}
    return [Same(f"{theirs}.{a}.*", f"{ours}.{b}.*") for a, b in names.items()]


QUANT: list[Rule] = [Same("quant_conv.*", "quant.*"), Same("post_quant_conv.*", "post_quant.*")]


def original_table(config: AutoencoderConfig) -> Table:
    """The latent diffusion repository's own names (Rombach et al. 2022), which FLUX.1's ae.safetensors keeps."""
    rules = list(QUANT)
    for side in ("encoder", "decoder"):
        rules += [
            Same(f"{side}.conv_in.*", f"{side}.conv_in.*"),
            Same(f"{side}.norm_out.*", f"{side}.norm_out.*"),
            Same(f"{side}.conv_out.*", f"{side}.conv_out.*"),
            Same(f"{side}.mid.attn_1.norm.*", f"{side}.middle.attention.norm.*"),
            *(Pointwise(f"{side}.mid.attn_1.{x}.*", f"{side}.middle.attention.{x}.*") for x in "qkv"),
            Pointwise(f"{side}.mid.attn_1.proj_out.*", f"{side}.middle.attention.out.*"),
            *_residual(f"{side}.mid.block_1", f"{side}.middle.first", "nin_shortcut"),
            *_residual(f"{side}.mid.block_2", f"{side}.middle.second", "nin_shortcut"),
        ]
    rules += [
        *_residual("encoder.down.{i}.block.{j}", "encoder.levels.{i}.blocks.{j}", "nin_shortcut"),
        Same("encoder.down.{i}.downsample.conv.*", "encoder.levels.{i}.down.*"),
        # Theirs number the decoder's levels from full resolution, ours in the order they run.
        *_residual("decoder.up.{last-i}.block.{j}", "decoder.levels.{i}.blocks.{j}", "nin_shortcut"),
        Same("decoder.up.{last-i}.upsample.conv.*", "decoder.levels.{i}.up.*"),
    ]
    return Table(
        "vae/original", tuple(rules), (Extra("loss.*"), Extra("model_ema.*")), numbers={"last": len(config.widths) - 1}
    )


# How diffusers called the middle's attention before 0.15.
OLD_ATTENTION = ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn."))


def diffusers_table(config: AutoencoderConfig) -> Table:
    rules = list(QUANT)
    aliases: list[Alias] = []
    for side in ("encoder", "decoder"):
        middle, attention = f"{side}.mid_block", f"{side}.mid_block.attentions.0"
        rules += [
            Same(f"{side}.conv_in.*", f"{side}.conv_in.*"),
            Same(f"{side}.conv_norm_out.*", f"{side}.norm_out.*"),
            Same(f"{side}.conv_out.*", f"{side}.conv_out.*"),
            Same(f"{attention}.group_norm.*", f"{side}.middle.attention.norm.*"),
            *(Same(f"{attention}.to_{x}.*", f"{side}.middle.attention.{x}.*") for x in "qkv"),
            Same(f"{attention}.to_out.0.*", f"{side}.middle.attention.out.*"),
            *_residual(f"{middle}.resnets.0", f"{side}.middle.first", "conv_shortcut"),
            *_residual(f"{middle}.resnets.1", f"{side}.middle.second", "conv_shortcut"),
        ]
        aliases += [Alias(f"{attention}{old}*", f"{attention}{new}*") for new, old in OLD_ATTENTION]
    rules += [
        *_residual("encoder.down_blocks.{i}.resnets.{j}", "encoder.levels.{i}.blocks.{j}", "conv_shortcut"),
        Same("encoder.down_blocks.{i}.downsamplers.0.conv.*", "encoder.levels.{i}.down.*"),
        *_residual("decoder.up_blocks.{i}.resnets.{j}", "decoder.levels.{i}.blocks.{j}", "conv_shortcut"),
        Same("decoder.up_blocks.{i}.upsamplers.0.conv.*", "decoder.levels.{i}.up.*"),
    ]
    return Table("vae/diffusers", tuple(rules), aliases=tuple(aliases))


def _config(evidence: Evidence, level: str, block: str) -> AutoencoderConfig:
    evidence.require(
        norm_num_groups=32, act_fn="silu", mid_block_add_attention=True, latents_mean=None, latents_std=None
    )
    levels = evidence.count(level + ".")
    return AutoencoderConfig(
        latent_channels=evidence.size("decoder.conv_in.weight", 1),
        widths=tuple(evidence.size(f"{level}.{block}.0.conv1.weight".replace("{i}", str(i))) for i in range(levels)),
        blocks=evidence.count(f"{level}.{block}.{{i}}.".replace("{i}", "0", 1)),
        quant_convs="quant_conv.weight" in evidence.weights,
        scale=float(evidence.settings.get("scaling_factor", 1.0)),
        shift=float(evidence.settings.get("shift_factor") or 0.0),
    )


def original_config(evidence: Evidence) -> AutoencoderConfig:
    return _config(evidence, "encoder.down.{i}", "block")


def diffusers_config(evidence: Evidence) -> AutoencoderConfig:
    return _config(evidence, "encoder.down_blocks.{i}", "resnets")


def settings(config: AutoencoderConfig) -> dict[str, Any]:
    levels = len(config.widths)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": config.latent_channels,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.blocks,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "mid_block_add_attention": True,
        "use_quant_conv": config.quant_convs,
        "use_post_quant_conv": config.quant_convs,
        "scaling_factor": config.scale,
        "shift_factor": config.shift,
    }


PICTURES = ("encoder.conv_in.weight", (None, 3, 3, 3))  # a video autoencoder has five axes

AUTOENCODER = Part(
    name="vae",
    network=Autoencoder,
    layouts=(
        Layout(
            name="original",
            style="original",
            signature=Signature(
                has=("decoder.mid.attn_1.q.weight", "encoder.down.0.block.0.conv1.weight"), shapes=(PICTURES,)
            ),
            config=original_config,
            table=original_table,
        ),
        Layout(
            name="diffusers",
            style="diffusers",
            signature=Signature(
                has=(
                    "decoder.mid_block.attentions.0.group_norm.weight",
                    "encoder.down_blocks.0.resnets.0.conv1.weight",
                ),
                shapes=(PICTURES,),
            ),
            config=diffusers_config,
            table=diffusers_table,
            settings=settings,
        ),
    ),
)


# ---- the tiny autoencoder


def tiny_table(name: str, layers: str, decoder_offset: str) -> Table:
    """`layers` is what stands between side and number; the original's decoder begins with a layer without weights."""
    rules: list[Rule] = []
    for side, number in (("encoder", "{i}"), ("decoder", f"{{i{decoder_offset}}}")):
        rules.append(Same(f"{side}.{layers}{number}.*", f"{side}.layers.{{i}}.*"))
        for ours, theirs in (("conv1", "conv.0"), ("conv2", "conv.2"), ("conv3", "conv.4")):
            rules.append(Same(f"{side}.{layers}{number}.{theirs}.*", f"{side}.layers.{{i}}.{ours}.*"))
    return Table(name, tuple(rules))


def tiny_config(evidence: Evidence, layers: str, decoder_first: int) -> TinyAutoencoderConfig:
    evidence.require(act_fn="relu", latent_magnitude=3, upsample_fn="nearest", upsampling_scaling_factor=2)

    def blocks(side: str) -> tuple[int, ...]:
        """How many residual blocks lie between each two plain convolutions."""
        pattern = re.compile(rf"{side}\.{re.escape(layers)}(\d{{1,6}})\.(conv\.0\.)?weight")
        found = sorted((int(m[1]), bool(m[2])) for key in evidence.weights if (m := pattern.fullmatch(key)))
        runs: list[int] = []
        for _, block in found:
            if block and runs:
                runs[-1] += 1
            elif not block:
                runs.append(0)
        return tuple(runs[:-1])

    first = f"decoder.{layers}{decoder_first}.weight"
    return TinyAutoencoderConfig(
        latent_channels=evidence.size(first, 1),
        width=evidence.size(first),
        encoder_blocks=blocks("encoder"),
        decoder_blocks=blocks("decoder"),
        scale=float(evidence.settings.get("scaling_factor", 1.0)),
        shift=float(evidence.settings.get("shift_factor") or 0.0),
    )


def tiny_settings(config: TinyAutoencoderConfig) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderTiny",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": config.latent_channels,
        "encoder_block_out_channels": [config.width] * len(config.encoder_blocks),
        "decoder_block_out_channels": [config.width] * len(config.decoder_blocks),
        "num_encoder_blocks": list(config.encoder_blocks),
        "num_decoder_blocks": list(config.decoder_blocks),
        "act_fn": "relu",
        "upsample_fn": "nearest",
        "upsampling_scaling_factor": 2,
        "latent_magnitude": 3,
        "scaling_factor": config.scale,
        "shift_factor": config.shift,
    }


TINY_AUTOENCODER = Part(
    name="vae",
    network=TinyAutoencoder,
    layouts=(
        Layout(
            # Two files, taesd_encoder and taesd_decoder: their keys are given these prefixes when opened.
            name="taesd",
            style="original",
            signature=Signature(
                has=("decoder.1.weight", "encoder.0.weight"), shapes=(("encoder.0.weight", (None, 3, 3, 3)),)
            ),
            config=lambda evidence: tiny_config(evidence, "", 1),
            table=lambda config: tiny_table("vae/taesd", "", "+1"),
        ),
        Layout(
            name="diffusers-tiny",
            style="diffusers",
            signature=Signature(
                has=("decoder.layers.0.weight", "encoder.layers.0.weight"),
                shapes=(("encoder.layers.0.weight", (None, 3, 3, 3)),),
            ),
            config=lambda evidence: tiny_config(evidence, "layers.", 0),
            table=lambda config: tiny_table("vae/diffusers-tiny", "layers.", ""),
            settings=tiny_settings,
        ),
    ),
)
