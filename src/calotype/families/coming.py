"""Families that Calotype names in a file, but does not run yet."""

from __future__ import annotations

from calotype.checkpoint.known import Known
from calotype.checkpoint.layouts import Signature


def _unet(
    family: str, variant: str, layout: str, *shapes: tuple[str, tuple[int | None, ...]], advice: str = ""
) -> Known:
    return Known(
        family=family,
        variant=variant,
        part="unet",
        layout=layout,
        signature=Signature(has=tuple(key for key, _ in shapes), shapes=shapes),
        advice=advice,
    )


def _lcm(family: str, layout: str, first: str, guidance: str, told_sizes: str) -> Known:
    """A UNet distilled to few steps which is told the guidance (Luo et al. 2023)."""
    lacks, has = ((), (told_sizes,)) if family == "sdxl" else ((told_sizes,), ())
    return Known(
        family=family,
        variant="lcm",
        part="unet",
        layout=layout,
        signature=Signature(has=(guidance, first, *has), lacks=lacks),
        advice="it takes the guidance by an embedding, which the UNet here does not have; give the model that it was "
        "distilled from (the LCM LoRA then gives few steps), or another one",
    )


def _stranger(title: str, part: str, layout: str, *has: str) -> Known:
    """A model of no family here."""
    return Known(family=None, variant=title, part=part, layout=layout, signature=Signature(has=has))


_ATTENTION = "{}attentions.{}.transformer_blocks.0.attn2.to_k.weight"
_TEXT_1 = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_TEXT_2 = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
_DIFFUSERS_TEXT_1 = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
_DIFFUSERS_TEXT_2 = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"

_REFINER = "it finishes what SDXL's base model begins, and that draws well without it: give the base model"
_SD2 = "give a Stable Diffusion 1.x or SDXL model"
_UPSCALER = "it enlarges pictures; give a Stable Diffusion 1.x or SDXL model, which draws them"

COMING: tuple[Known, ...] = (
    # Grown out of Stable Diffusion 2, whose evidence it has too.
    _stranger(
        "Stable Video Diffusion", "unet", "original", "input_blocks.1.0.time_stack.in_layers.0.weight", "out.2.weight"
    ),
    _stranger(
        "Stable Video Diffusion",
        "unet",
        "diffusers",
        "down_blocks.0.resnets.0.spatial_res_block.conv1.weight",
        "conv_in.weight",
    ),
    _unet(
        "sdxl",
        "refiner",
        "original",
        ("label_emb.0.0.weight", (1536, 2560)),
        (_TEXT_2, (None, 1280)),
        advice=_REFINER,
    ),
    _unet("sdxl", "refiner", "diffusers", ("add_embedding.linear_1.weight", (1536, 2560)), advice=_REFINER),
    _unet("sd2", "2.x", "original", (_TEXT_1, (320, 1024)), ("out.2.weight", (4, 320, 3, 3)), advice=_SD2),
    _unet(
        "sd2", "2.x", "diffusers", (_DIFFUSERS_TEXT_1, (320, 1024)), ("conv_out.weight", (4, 320, 3, 3)), advice=_SD2
    ),
    _unet(
        "sd2",
        "x4-upscaler",
        "original",
        ("label_emb.weight", (1000, None)),
        ("input_blocks.0.0.weight", (None, 7, 3, 3)),
        advice=_UPSCALER,
    ),
    _unet(
        "sd2",
        "x4-upscaler",
        "diffusers",
        ("class_embedding.weight", (1000, None)),
        ("conv_in.weight", (None, 7, 3, 3)),
        advice=_UPSCALER,
    ),
    *(
        _lcm(family, layout, first, f"{name}.cond_proj.weight", told_sizes)
        for family in ("sdxl", "sd1")
        for layout, first, name, told_sizes in (
            ("diffusers", "conv_in.weight", "time_embedding", "add_embedding.linear_1.weight"),
            # Converted files have either name for it.
            ("original", "input_blocks.0.0.weight", "time_embed", "label_emb.0.0.weight"),
            ("original", "input_blocks.0.0.weight", "time_embedding", "label_emb.0.0.weight"),
        )
    ),
    _stranger("Stable Cascade", "unet", "original", "clip_txt_pooled_mapper.weight"),
    _stranger("PixArt", "transformer", "diffusers", "adaln_single.linear.weight", "caption_projection.linear_1.weight"),
    _stranger("PixArt", "transformer", "original", "t_block.1.weight", "y_embedder.y_proj.fc1.weight"),
    _stranger("Qwen-Image", "transformer", "diffusers", "transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"),
    _stranger("Wan", "transformer", "original", "blocks.0.self_attn.norm_q.weight", "patch_embedding.weight"),
    _stranger(
        "AuraFlow", "transformer", "diffusers", "joint_transformer_blocks.0.attn.add_q_proj.weight", "register_tokens"
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
