"""Kolors' UNet in the layouts it is published in."""

from __future__ import annotations

from calotype.checkpoint.layouts import Signature
from calotype.checkpoint.unets import unet_part

UNET = unet_part(
    original=Signature(
        has=(
            "encoder_hid_proj.weight",
            "label_emb.0.0.weight",
            "middle_block.1.transformer_blocks.0.attn2.to_k.weight",
            "out.2.weight",
        ),
        lacks=("input_hint_block.0.weight",),
    ),
    diffusers=Signature(
        has=(
            "encoder_hid_proj.weight",
            "add_embedding.linear_1.weight",
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
            "conv_norm_out.weight",
        ),
    ),
)
