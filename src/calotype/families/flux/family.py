"""FLUX.1 as the loader sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from calotype.checkpoint.autoencoders import AUTOENCODER, TINY_AUTOENCODER
from calotype.checkpoint.text_encoders import CLIP, T5
from calotype.families.family import Assembly, Clues, Controls, Family, Manifest, ManifestPart, Role, whole, with_card
from calotype.families.flow import flow_settings
from calotype.families.flux import DEV_DEFAULTS, FILL_DEFAULTS, SCHNELL_DEFAULTS, FluxModel, fills
from calotype.families.flux.config import (
    DEV,
    DEV_SAMPLING,
    FILL,
    SCHNELL,
    SCHNELL_SAMPLING,
    FluxConfig,
)
from calotype.families.flux.controlnet import CONTROL, FluxControlConfig, control_misfit
from calotype.families.flux.keys import TRANSFORMER
from calotype.families.flux.network import FluxNetwork
from calotype.nn.autoencoder import Autoencoder, AutoencoderConfig
from calotype.nn.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from calotype.text.clip import VIT_L, ClipEncoder
from calotype.text.t5 import XXL, T5Encoder

VAE = AutoencoderConfig(
    latent_channels=16, widths=(128, 256, 512, 512), blocks=2, quant_convs=False, scale=0.3611, shift=0.1159
)
TINY_VAE = TinyAutoencoderConfig(
    latent_channels=16,
    width=64,
    encoder_blocks=(1, 3, 3, 3),
    decoder_blocks=(3, 3, 3, 1),
    scale=1.0,
    shift=0.0,
)
VARIANTS = {"dev": DEV_DEFAULTS, "schnell": SCHNELL_DEFAULTS, "fill-dev": FILL_DEFAULTS}
FLEX_2 = replace(DEV, image_width=196, joint_blocks=8)


def variant(config: FluxConfig, clues: Clues) -> str:
    """dev and schnell differ by the guidance input alone; wider image tokens carry a condition beside the picture."""
    extra = config.image_width - config.image_width_out
    if fills(config):
        return "fill-dev"
    if extra == FLEX_2.image_width - FLEX_2.image_width_out:
        return "flex-2"
    if extra == config.image_width_out:
        return "canny-depth-dev"
    return "dev" if config.guidance_input else "schnell"


def refusal(config: FluxConfig, clues: Clues) -> str | None:
    if config.image_width != config.image_width_out and not fills(config):
        return f"FLUX.1 {variant(config, clues)} takes a condition beside the picture, which is not supported yet"
    return None


def misfit(configs: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first role whose configuration does not go with the transformer's, and why."""
    transformer: FluxConfig = configs["transformer"]
    latents = transformer.image_width_out // transformer.patch**2
    for role, what, has, wants in (
        ("clip", "a CLIP encoder of width", configs["clip"].width, transformer.pooled_width),
        ("t5", "a T5 encoder of width", configs["t5"].width, transformer.text_width),
        ("vae", "an autoencoder with latent channels:", configs["vae"].latent_channels, latents),
    ):
        if has != wants:
            return role, f"{what} {has}, but this FLUX transformer takes {wants}"
    return None


def scheduler(variant: str) -> dict[str, Any]:
    """scheduler_config.json of a variant, for conversion."""
    settings = SCHNELL_SAMPLING if variant == "schnell" else DEV_SAMPLING
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        # diffusers ignores a fixed shift where shifting is dynamic; published files say 3.
        "shift": 3.0 if settings.dynamic else settings.shift,
        "use_dynamic_shifting": settings.dynamic,
        "base_shift": settings.base_shift,
        "max_shift": settings.max_shift,
        "base_image_seq_len": settings.base_tokens,
        "max_image_seq_len": settings.max_tokens,
    }


def assemble(given: Assembly) -> FluxModel:
    """The model of these networks; a folder's own scheduler and card stand before the family's numbers."""
    transformer, clip, t5, vae = (given.networks[name] for name in ("transformer", "clip", "t5", "vae"))
    assert isinstance(transformer, FluxNetwork)
    assert isinstance(clip, ClipEncoder)
    assert isinstance(t5, T5Encoder)
    assert isinstance(vae, (Autoencoder, TinyAutoencoder))
    name = variant(transformer.config, given.clues)
    if given.clues.scheduler is not None:
        sampling = flow_settings(given.clues.scheduler, "FLUX.1")
    else:
        sampling = DEV_SAMPLING if transformer.config.guidance_input else SCHNELL_SAMPLING
    return FluxModel(
        transformer=transformer,
        clip=clip,
        t5=t5,
        vae=vae,
        clip_tokenizer=given.tokenizers["clip"],
        t5_tokenizer=given.tokenizers["t5"],
        sampling=sampling,
        defaults=with_card(VARIANTS[name if name in VARIANTS else "dev"], given.card.get("defaults", {})),
        variant=str(given.card.get("variant", name)),
        source=given.source,
        device=given.device,
    )


UNION = FluxControlConfig(flux=replace(DEV, joint_blocks=5, single_blocks=10), hint_width=64, kinds=10)
FIVE, SIX = (replace(UNION, kinds=0, flux=replace(DEV, joint_blocks=n, single_blocks=0)) for n in (5, 6))
DEPTH = replace(UNION, kinds=0, flux=replace(DEV, joint_blocks=4, single_blocks=1))
COMFYUI = "model.diffusion_model."
MANIFESTS = (
    whole("flux1-dev", TRANSFORMER, "original", DEV),
    whole("flux1-schnell", TRANSFORMER, "original", SCHNELL),
    whole("flux1-fill-dev", TRANSFORMER, "original", FILL),
    whole("flex2-preview", TRANSFORMER, "original", FLEX_2),
    whole("flux1-dev-comfyui", TRANSFORMER, "original", DEV, prefix=COMFYUI),
    whole("flux1-schnell-comfyui", TRANSFORMER, "original", SCHNELL, prefix=COMFYUI),
    Manifest(
        name="flux1-dev-comfyui-checkpoint",
        parts=(
            ManifestPart(part=TRANSFORMER, layout="original", config=DEV, prefix=COMFYUI),
            ManifestPart(part=AUTOENCODER, layout="original", config=VAE, prefix="vae."),
            ManifestPart(
                part=CLIP,
                layout="transformers",
                config=VIT_L,
                prefix="text_encoders.clip_l.transformer.",
                extras=("text_projection.weight",),
            ),
            ManifestPart(part=T5, layout="transformers", config=XXL, prefix="text_encoders.t5xxl.transformer."),
        ),
    ),
    whole("flux-transformer-diffusers-dev", TRANSFORMER, "diffusers", DEV),
    whole("flux-transformer-diffusers-schnell", TRANSFORMER, "diffusers", SCHNELL),
    whole("flux-transformer-diffusers-fill-dev", TRANSFORMER, "diffusers", FILL),
    whole("flux-text-encoder", CLIP, "transformers", VIT_L),
    whole("flux-text-encoder-bare", CLIP, "transformers-bare", VIT_L),
    whole("flux-text-encoder-2", T5, "transformers", XXL),
    whole("t5xxl-fp16", T5, "transformers", XXL, extras=("encoder.embed_tokens.weight",)),
    whole("flux-ae", AUTOENCODER, "original", VAE),
    whole("flux-vae-diffusers", AUTOENCODER, "diffusers", VAE),
    whole("flux-controlnet-union", CONTROL, "diffusers", UNION),
    whole("flux-controlnet-jasperai", CONTROL, "diffusers", FIVE),
    whole("flux-controlnet-liblib", CONTROL, "diffusers", SIX),
    whole("flux-controlnet-shakker-depth", CONTROL, "diffusers", DEPTH),
    whole("flux-controlnet-inpainting", CONTROL, "diffusers", replace(SIX, hint_width=68)),
    whole("taef1-encoder", TINY_AUTOENCODER, "taesd", TINY_VAE, only="encoder."),
    whole("taef1-decoder", TINY_AUTOENCODER, "taesd", TINY_VAE, only="decoder."),
    whole("taef1-diffusers", TINY_AUTOENCODER, "diffusers-tiny", TINY_VAE),
)

FAMILY = Family(
    name="flux",
    title="FLUX.1",
    pipeline="FluxPipeline",
    roles=(
        Role(
            name="transformer",
            parts=(TRANSFORMER,),
            folder="transformer",
            file="flux1-{}.safetensors",
            where="flux1-dev.safetensors or flux1-schnell.safetensors of black-forest-labs",
        ),
        Role(
            name="clip",
            parts=(CLIP,),
            folder="text_encoder",
            tokenizer="tokenizer",
            fits=lambda config: config.width <= VIT_L.width,
            where="the folder text_encoder/ of black-forest-labs/FLUX.1-dev, or clip_l.safetensors",
        ),
        Role(
            name="t5",
            parts=(T5,),
            folder="text_encoder_2",
            tokenizer="tokenizer_2",
            where="the folder text_encoder_2/ of black-forest-labs/FLUX.1-dev, or t5xxl_fp16.safetensors",
        ),
        Role(
            name="vae",
            parts=(AUTOENCODER, TINY_AUTOENCODER),
            folder="vae",
            file="ae.safetensors",
            settings=((AUTOENCODER, {"scaling_factor": VAE.scale, "shift_factor": VAE.shift}),),
            fits=lambda config: config.latent_channels == VAE.latent_channels,
            where="ae.safetensors or the folder vae/ of black-forest-labs/FLUX.1-dev",
        ),
    ),
    variants=VARIANTS,
    variant=variant,
    refusal=refusal,
    misfit=misfit,
    scheduler=scheduler,
    assemble=assemble,
    manifests=MANIFESTS,
    controls=Controls(part=CONTROL, misfit=control_misfit),
    harmless=("*.logit_scale", "logit_scale", "*.position_ids", "*.spiece_model"),
)
