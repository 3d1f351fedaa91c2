"""Hunyuan-DiT as the loader sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from calotype.checkpoint.autoencoders import AUTOENCODER, TINY_AUTOENCODER
from calotype.checkpoint.bert import BERT
from calotype.checkpoint.keys import Extra
from calotype.checkpoint.text_encoders import T5
from calotype.families.diffusion import from_scheduler
from calotype.families.family import Assembly, Clues, Controls, Family, Manifest, ManifestPart, Role, whole, with_card
from calotype.families.hunyuan_dit import DEFAULTS, HunyuanModel
from calotype.families.hunyuan_dit.config import DIFFUSION, LAST_BETA, V1_1, V1_2, VAE, HunyuanConfig
from calotype.families.hunyuan_dit.controlnet import CONTROL, control_misfit
from calotype.families.hunyuan_dit.keys import TRANSFORMER
from calotype.families.hunyuan_dit.network import POOL_HEADS, HunyuanNetwork
from calotype.nn.autoencoder import Autoencoder
from calotype.nn.tiny_autoencoder import TinyAutoencoder
from calotype.text.bert import HUNYUAN_CLIP, BertEncoder
from calotype.text.t5 import MT5_XL, T5Encoder


def variant(config: HunyuanConfig, clues: Clues) -> str:
    """1.0 has 1.1's layout and process, so that it is called by that name; so have distilled ones those of theirs."""
    return "1.1" if config.styled else "1.2"


def refusal(config: HunyuanConfig, clues: Clues) -> str | None:
    if config.channels_out not in (config.channels_in, 2 * config.channels_in):
        return f"a Hunyuan-DiT of {config.channels_in} channels that predicts {config.channels_out} is not supported"
    if config.t5_width % POOL_HEADS:
        return f"a Hunyuan-DiT that pools T5's {config.t5_width} channels, which is no multiple of {POOL_HEADS}"
    return None


def misfit(configs: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first role whose configuration does not go with the transformer's, and why."""
    transformer: HunyuanConfig = configs["transformer"]
    for role, what, has, wants in (
        ("bert", "a BERT of width", configs["bert"].width, transformer.text_width),
        ("t5", "a T5 of width", configs["t5"].width, transformer.t5_width),
        ("vae", "an autoencoder with latent channels:", configs["vae"].latent_channels, transformer.channels_in),
    ):
        if has != wants:
            return role, f"{what} {has}, but this Hunyuan-DiT takes {wants}"
    if configs["bert"].positions < transformer.text_tokens:
        positions = configs["bert"].positions
        return "bert", f"a BERT of {positions} positions, but this Hunyuan-DiT takes {transformer.text_tokens}"
    return None


def assemble(given: Assembly) -> HunyuanModel:
    """The model of these networks; a folder's own scheduler and card stand before the family's numbers."""
    transformer, bert, t5, vae = (given.networks[name] for name in ("transformer", "bert", "t5", "vae"))
    assert isinstance(transformer, HunyuanNetwork)
    assert isinstance(bert, BertEncoder)
    assert isinstance(t5, T5Encoder)
    assert isinstance(vae, (Autoencoder, TinyAutoencoder))
    name = variant(transformer.config, given.clues)
    defaults = DEFAULTS
    size = given.clues.settings.get("sample_size")
    if isinstance(size, int):
        defaults = replace(defaults, width=size * vae.config.factor, height=size * vae.config.factor)
    scheduler = given.clues.scheduler
    return HunyuanModel(
        transformer=transformer,
        bert=bert,
        t5=t5,
        vae=vae,
        bert_tokenizer=given.tokenizers["bert"],
        t5_tokenizer=given.tokenizers["t5"],
        diffusion=DIFFUSION[name] if scheduler is None else from_scheduler(scheduler),
        defaults=with_card(defaults, given.card.get("defaults", {})),
        variant=str(given.card.get("variant", name)),
        source=given.source,
        device=given.device,
    )


def scheduler_config(variant: str) -> dict[str, Any]:
    """scheduler_config.json of a variant, for conversion, as the published folders have it."""
    return {
        "_class_name": "DDPMScheduler",
        "beta_end": LAST_BETA[variant],
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "variance_type": "fixed_small",
    }


def _images() -> tuple[Extra, ...]:
    """The side of Tencent's CLIP that looks at pictures, a ViT-H of 14 pixels a patch, in open_clip's names."""
    width, out = 1280, 1024
    found = {
        "class_embedding": (width,),
        "positional_embedding": (16 * 16 + 1, width),
        "proj": (width, out),
        "conv1.weight": (width, 3, 14, 14),
    }
    norms = ["ln_pre", "ln_post"]
    for number in range(32):
        block = f"transformer.resblocks.{number}"
        norms += [f"{block}.ln_1", f"{block}.ln_2"]
        for name, rows, columns in (
            ("attn.in_proj_", 3 * width, width),
            ("attn.out_proj.", width, width),
            ("mlp.c_fc.", 4 * width, width),
            ("mlp.c_proj.", width, 4 * width),
        ):
            found |= {f"{block}.{name}weight": (rows, columns), f"{block}.{name}bias": (rows,)}
    found |= {f"{norm}.{leaf}": (width,) for norm in norms for leaf in ("weight", "bias")}
    return tuple(Extra(f"visual.{name}", shape) for name, shape in found.items())


def _decoder() -> tuple[Extra, ...]:
    """mT5's other half, which draws no pictures."""
    width, inner, mlp = MT5_XL.width, MT5_XL.heads * MT5_XL.head_width, MT5_XL.mlp_width
    found: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (MT5_XL.vocabulary, width),
        "decoder.embed_tokens.weight": (MT5_XL.vocabulary, width),
        "decoder.final_layer_norm.weight": (width,),
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (MT5_XL.buckets, MT5_XL.heads),
    }
    for number in range(MT5_XL.layers):
        block = f"decoder.block.{number}.layer"
        found |= {f"{block}.{layer}.layer_norm.weight": (width,) for layer in range(3)}
        for attention in ("0.SelfAttention", "1.EncDecAttention"):
            found |= {f"{block}.{attention}.{x}.weight": (inner, width) for x in "qkv"}
            found[f"{block}.{attention}.o.weight"] = (width, inner)
        found |= {f"{block}.2.DenseReluDense.wi_{x}.weight": (mlp, width) for x in "01"}
        found[f"{block}.2.DenseReluDense.wo.weight"] = (width, mlp)
    return tuple(Extra(name, shape) for name, shape in found.items())


MANIFESTS = (
    whole("hunyuan-dit-1.1", TRANSFORMER, "original", V1_1),
    whole("hunyuan-dit-1.2", TRANSFORMER, "original", V1_2),
    whole("hunyuan-dit-1.1-diffusers", TRANSFORMER, "diffusers", V1_1),
    whole("hunyuan-dit-1.2-diffusers", TRANSFORMER, "diffusers", V1_2),
    Manifest(
        name="hunyuan-dit-clip",
        parts=(
            ManifestPart(part=BERT, layout="original", config=HUNYUAN_CLIP, extras=("logit_scale", "text_projection")),
        ),
        more=_images(),
    ),
    Manifest(
        name="hunyuan-dit-mt5",
        parts=(ManifestPart(part=T5, layout="transformers", config=MT5_XL, extras=("encoder.embed_tokens.weight",)),),
        more=_decoder(),
    ),
    whole(
        "hunyuan-dit-text-encoder",
        BERT,
        "transformers",
        HUNYUAN_CLIP,
        extras=("pooler.dense.weight", "pooler.dense.bias"),
    ),
    whole("hunyuan-dit-text-encoder-2", T5, "transformers", MT5_XL),
    whole("hunyuan-dit-vae", AUTOENCODER, "diffusers", VAE),
)

FAMILY = Family(
    name="hunyuan_dit",
    title="Hunyuan-DiT",
    pipeline="HunyuanDiTPipeline",
    roles=(
        Role(
            name="transformer",
            parts=(TRANSFORMER,),
            quantisable=True,
            folder="transformer",
            file="pytorch_model_ema.safetensors",
            where="t2i/model/pytorch_model_ema.pt of Tencent-Hunyuan/HunyuanDiT-v1.2",
        ),
        Role(
            name="bert",
            parts=(BERT,),
            folder="text_encoder",
            tokenizer="tokenizer",
            file="clip_text_encoder.safetensors",
            where="the folder t2i/clip_text_encoder/ of Tencent-Hunyuan/HunyuanDiT",
        ),
        Role(
            name="t5",
            parts=(T5,),
            quantisable=True,
            folder="text_encoder_2",
            tokenizer="tokenizer_2",
            where="the folder t2i/mt5/ of Tencent-Hunyuan/HunyuanDiT",
        ),
        Role(
            name="vae",
            parts=(AUTOENCODER, TINY_AUTOENCODER),
            folder="vae",
            file="vae.safetensors",
            settings=((AUTOENCODER, {"scaling_factor": VAE.scale}),),
            upcast=True,
            fits=lambda config: config.latent_channels == VAE.latent_channels,
            where="the folder t2i/sdxl-vae-fp16-fix/ of Tencent-Hunyuan/HunyuanDiT, or an SDXL autoencoder",
        ),
    ),
    variants={name: replace(DEFAULTS, sizes=name == "1.1") for name in LAST_BETA},
    variant=variant,
    refusal=refusal,
    misfit=misfit,
    scheduler=scheduler_config,
    assemble=assemble,
    manifests=MANIFESTS,
    controls=Controls(part=CONTROL, misfit=control_misfit),
    # What ComfyUI keeps beside mT5 in a single file: its tokenizer.
    harmless=("*mt5xl.spiece_model", "*mt5xl.logit_scale"),
)
