"""Families that Calotype names in a file, but does not run yet."""

from __future__ import annotations

from calotype.checkpoint.known import Known
from calotype.checkpoint.layouts import Signature


def _unet(family: str, variant: str, layout: str, *shapes: tuple[str, tuple[int | None, ...]]) -> Known:
    return Known(
        family=family,
        variant=variant,
        part="unet",
        layout=layout,
        signature=Signature(has=tuple(key for key, _ in shapes), shapes=shapes),
    )


_ATTENTION = "{}attentions.{}.transformer_blocks.0.attn2.to_k.weight"
_TEXT_1 = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_TEXT_2 = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
_DIFFUSERS_TEXT_1 = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
_DIFFUSERS_TEXT_2 = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"

COMING: tuple[Known, ...] = (
    _unet("sdxl", "refiner", "original", ("label_emb.0.0.weight", (1536, 2560)), (_TEXT_2, (None, 1280))),
    _unet("sd2", "2.x", "original", (_TEXT_1, (320, 1024)), ("out.2.weight", (4, 320, 3, 3))),
    _unet("sdxl", "refiner", "diffusers", ("add_embedding.linear_1.weight", (1536, 2560))),
    _unet("sd2", "2.x", "diffusers", (_DIFFUSERS_TEXT_1, (320, 1024)), ("conv_out.weight", (4, 320, 3, 3))),
    Known(
        family="sd3",
        variant="3.5-medium",
        part="transformer",
        layout="original",
        signature=Signature(has=("joint_blocks.0.x_block.attn2.qkv.weight", "x_embedder.proj.weight")),
    ),
    Known(
        family="sd3",
        variant="3.5-large",
        part="transformer",
        layout="original",
        signature=Signature(has=("joint_blocks.37.x_block.attn.qkv.weight", "x_embedder.proj.weight")),
    ),
    Known(
        family="sd3",
        variant="medium",
        part="transformer",
        layout="original",
        signature=Signature(has=("joint_blocks.0.x_block.attn.qkv.weight", "x_embedder.proj.weight")),
    ),
    Known(
        family="sd3",
        variant="3.5-medium",
        part="transformer",
        layout="diffusers",
        signature=Signature(
            has=(
                "transformer_blocks.0.attn2.to_q.weight",
                "transformer_blocks.0.attn.add_q_proj.weight",
                "pos_embed.proj.weight",
            )
        ),
    ),
    Known(
        family="sd3",
        variant="3.5-large",
        part="transformer",
        layout="diffusers",
        signature=Signature(
            has=(
                "transformer_blocks.37.attn.to_q.weight",
                "transformer_blocks.0.attn.add_q_proj.weight",
                "pos_embed.proj.weight",
            )
        ),
    ),
    Known(
        family="sd3",
        variant="medium",
        part="transformer",
        layout="diffusers",
        signature=Signature(has=("transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight")),
    ),
    Known(
        family="hunyuan_dit",
        variant="1.x",
        part="transformer",
        layout="original",
        signature=Signature(has=("text_embedding_padding", "blocks.0.attn1.Wqkv.weight")),
    ),
    Known(
        family="hunyuan_dit",
        variant="1.x",
        part="transformer",
        layout="diffusers",
        signature=Signature(has=("text_embedding_padding", "time_extra_emb.timestep_embedder.linear_1.weight")),
    ),
    Known(
        family="hunyuan_dit",
        variant="1.x",
        part="bert",
        layout="transformers",
        signature=Signature(
            has=(
                "bert.embeddings.word_embeddings.weight",
                "bert.encoder.layer.0.attention.self.query.weight",
            ),
            shapes=(("bert.embeddings.word_embeddings.weight", (47020, None)),),
        ),
    ),
    *(
        Known(
            family=None,
            variant=f"the {side} of a tiny autoencoder",
            part="vae",
            layout="taesd",
            signature=Signature(has=(f"{side}.{first}.weight", f"{side}.{block}.conv.0.weight")),
            incomplete=f"its {other} is in another file: give that too",
        )
        for side, other, first, block in (("encoder", "decoder", 0, 1), ("decoder", "encoder", 1, 3))
    ),
)
