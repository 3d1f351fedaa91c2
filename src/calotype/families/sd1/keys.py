"""Stable Diffusion 1.x's UNet in the layouts it is published in."""

from __future__ import annotations

from calotype.checkpoint.layouts import Signature
from calotype.checkpoint.unets import unet_part

UNET = unet_part(
    original=Signature(
        has=(
            "middle_block.1.transformer_blocks.0.attn2.to_k.weight",
            "input_blocks.0.0.weight",
            "time_embed.0.weight",
            "out.2.weight",
        ),
        lacks=("label_emb.0.0.weight", "input_hint_block.0.weight"),
    ),
    diffusers=Signature(
        has=(
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
            "conv_in.weight",
            "time_embedding.linear_1.weight",
            "conv_norm_out.weight",
        ),
        lacks=("add_embedding.linear_1.weight", "encoder_hid_proj.weight", "class_embedding.linear_1.weight"),
    ),
)
