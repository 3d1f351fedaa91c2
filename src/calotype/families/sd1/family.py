"""Stable Diffusion 1.x as the loader sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from calotype.checkpoint.autoencoders import AUTOENCODER, OLD_ATTENTION, TINY_AUTOENCODER
from calotype.checkpoint.controlnets import CONTROLNET, HINT_WIDTHS
from calotype.checkpoint.image_prompts import IMAGE_ADAPTER, POSITIONS, VISION
from calotype.checkpoint.keys import Extra
from calotype.checkpoint.text_encoders import CLIP
from calotype.families.diffusion import (
    AVERAGING,
    MARKERS,
    REFUSED_MARKERS,
    TABLES,
    TRAINING,
    diffusion_of,
    scheduler_config,
    suffix,
)
from calotype.families.family import Assembly, Clues, Controls, Family, Manifest, ManifestPart, Role, whole, with_card
from calotype.families.sd1 import DEFAULTS, Sd1Model
from calotype.families.sd1.config import DIFFUSION, EDITING, INPAINTING, TINY_VAE, VAE, ZERO_SNR
from calotype.families.sd1.config import UNET as UNET_CONFIG
from calotype.families.sd1.keys import UNET
from calotype.families.unets import beside_the_noise, control_misfit
from calotype.nn.autoencoder import Autoencoder
from calotype.nn.controlnet import ControlNetConfig
from calotype.nn.image_adapter import BASE, FullConfig, ImageAdapterConfig, Places, perceiver
from calotype.nn.tiny_autoencoder import TinyAutoencoder
from calotype.nn.unet import UNet, UNetConfig
from calotype.nn.vision import VIT_H
from calotype.text.clip import VIT_L, ClipEncoder


def variant(config: UNetConfig, clues: Clues) -> str:
    extra = config.channels_in - config.channels_out
    if extra == INPAINTING.channels_in - INPAINTING.channels_out:
        return "inpainting"
    if extra == EDITING.channels_in - EDITING.channels_out:
        return "instruct-pix2pix"
    return "1.x" + suffix(diffusion_of(DIFFUSION, ZERO_SNR, clues))


def refusal(config: UNetConfig, clues: Clues) -> str | None:
    why = beside_the_noise(f"Stable Diffusion {variant(config, clues)}", config)
    if why is not None:
        return why
    known = next((name for marker, name in REFUSED_MARKERS.items() if marker in clues.markers), None)
    return None if known is None else f"{known} is not supported"


def misfit(configs: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first role whose configuration does not go with the UNet's, and why."""
    unet: UNetConfig = configs["unet"]
    for role, what, has, wants in (
        ("clip", "a CLIP encoder of width", configs["clip"].width, unet.text_width),
        ("vae", "an autoencoder with latent channels:", configs["vae"].latent_channels, unet.channels_out),
    ):
        if has != wants:
            return role, f"{what} {has}, but this Stable Diffusion 1.x UNet takes {wants}"
    return None


def assemble(given: Assembly) -> Sd1Model:
    """The model of these networks; a folder's own scheduler and card stand before the family's numbers."""
    unet, clip, vae = (given.networks[name] for name in ("unet", "clip", "vae"))
    assert isinstance(unet, UNet)
    assert isinstance(clip, ClipEncoder)
    assert isinstance(vae, (Autoencoder, TinyAutoencoder))
    diffusion = diffusion_of(DIFFUSION, ZERO_SNR, given.clues)
    size = given.clues.settings.get("sample_size")
    defaults = DEFAULTS
    if isinstance(size, int):
        defaults = replace(defaults, width=size * vae.config.factor, height=size * vae.config.factor)
    return Sd1Model(
        unet=unet,
        clip=clip,
        vae=vae,
        tokenizer=given.tokenizers["clip"],
        embeddings=given.embeddings_of(clip.config.width),
        diffusion=diffusion,
        defaults=with_card(defaults, given.card.get("defaults", {})),
        variant=str(given.card.get("variant", variant(unet.config, given.clues))),
        source=given.source,
        device=given.device,
    )


UNET_PREFIX, VAE_PREFIX, CLIP_PREFIX = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
POSITION_IDS = "text_model.embeddings.position_ids"
ORIGINAL_UNET = ManifestPart(part=UNET, layout="original", config=UNET_CONFIG, prefix=UNET_PREFIX)
ORIGINAL_VAE = ManifestPart(part=AUTOENCODER, layout="original", config=VAE, prefix=VAE_PREFIX)
ORIGINAL_CLIP = ManifestPart(part=CLIP, layout="transformers", config=VIT_L, prefix=CLIP_PREFIX, extras=(POSITION_IDS,))
CONTROL = ControlNetConfig(unet=UNET_CONFIG, hint_widths=HINT_WIDTHS, union=None, pooled=False)
ADAPTER = ImageAdapterConfig(
    seen_width=VIT_H.projection,
    text_width=UNET_CONFIG.text_width,
    widths=Places.of(UNET_CONFIG).widths,
    form=BASE,
)
ADAPTER_PLUS = replace(ADAPTER, seen_width=VIT_H.width, form=perceiver(768))
ADAPTER_FULL = replace(ADAPTER, seen_width=VIT_H.width, form=FullConfig(mlp_width=VIT_H.width))
ORIGINAL = (ORIGINAL_UNET, ORIGINAL_VAE, ORIGINAL_CLIP)
BARE_CLIP = replace(ORIGINAL_CLIP, extras=())
AVERAGES = replace(ORIGINAL_UNET, prefix="model_ema.diffusion_model", undotted=True)
BUFFERS = tuple(Extra(name, (1000,)) for name in TABLES)
COUNTS = tuple(Extra(name, ()) for name in AVERAGING)
MANIFESTS = (
    Manifest(name="sd1", parts=ORIGINAL),
    Manifest(name="sd1-without-position-ids", parts=(ORIGINAL_UNET, ORIGINAL_VAE, BARE_CLIP)),
    # As the training script saves, v1-5-pruned; and with the averages in the weights' place, v1-5-pruned-emaonly.
    Manifest(name="sd1-training", parts=(*ORIGINAL, AVERAGES), more=(*BUFFERS, *COUNTS)),
    Manifest(name="sd1-emaonly", parts=ORIGINAL, more=(*BUFFERS, *COUNTS)),
    Manifest(name="sd1-buffers", parts=ORIGINAL, more=BUFFERS),
    Manifest(name="sd1-zero-snr", parts=ORIGINAL, more=tuple(Extra(name, (0,)) for name in MARKERS)),
    Manifest(name="sd1-inpainting", parts=(replace(ORIGINAL_UNET, config=INPAINTING), ORIGINAL_VAE, ORIGINAL_CLIP)),
    Manifest(
        name="sd1-inpainting-training",
        parts=(replace(ORIGINAL_UNET, config=INPAINTING), ORIGINAL_VAE, ORIGINAL_CLIP),
        more=(*BUFFERS, *COUNTS),
    ),
    Manifest(
        name="sd1-instruct-pix2pix",
        parts=(replace(ORIGINAL_UNET, config=EDITING), ORIGINAL_VAE, ORIGINAL_CLIP),
        more=(*BUFFERS, *COUNTS),
    ),
    Manifest(name="sd1-original-unet", parts=(ORIGINAL_UNET,)),
    Manifest(name="sd1-original-vae", parts=(ORIGINAL_VAE,)),
    Manifest(name="sd1-original-text-encoder", parts=(ORIGINAL_CLIP,)),
    whole("sd1-vae-bare", AUTOENCODER, "original", VAE),
    whole("sd1-unet-diffusers", UNET, "diffusers", UNET_CONFIG),
    whole("sd1-unet-diffusers-inpainting", UNET, "diffusers", INPAINTING),
    whole("sd1-unet-diffusers-instruct-pix2pix", UNET, "diffusers", EDITING),
    whole("sd1-text-encoder", CLIP, "transformers", VIT_L, extras=(POSITION_IDS,)),
    whole("sd1-text-encoder-without-position-ids", CLIP, "transformers", VIT_L),
    whole("sd1-vae-diffusers", AUTOENCODER, "diffusers", VAE),
    # The published folder is of 2022.
    whole("sd1-vae-diffusers-old", AUTOENCODER, "diffusers", VAE, spelt=OLD_ATTENTION),
    whole("sd1-controlnet", CONTROLNET, "original", CONTROL, prefix="control_model."),
    whole("sd1-controlnet-diffusers", CONTROLNET, "diffusers", CONTROL),
    whole("sd1-ip-adapter", IMAGE_ADAPTER, "base", ADAPTER),
    whole("sd1-ip-adapter-plus", IMAGE_ADAPTER, "plus", ADAPTER_PLUS),
    whole("sd1-ip-adapter-full-face", IMAGE_ADAPTER, "full", ADAPTER_FULL),
    whole("clip-vit-h-image-encoder", VISION, "transformers", VIT_H, extras=(POSITIONS,)),
    whole("taesd-encoder", TINY_AUTOENCODER, "taesd", TINY_VAE, only="encoder."),
    whole("taesd-decoder", TINY_AUTOENCODER, "taesd", TINY_VAE, only="decoder."),
    whole("taesd-diffusers", TINY_AUTOENCODER, "diffusers-tiny", TINY_VAE),
)

FAMILY = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    pipeline="StableDiffusionPipeline",
    roles=(
        Role(
            name="unet",
            parts=(UNET,),
            quantisable=True,
            folder="unet",
            file="unet.safetensors",
            where="a checkpoint such as v1-5-pruned-emaonly.safetensors, or the folder unet/ of a diffusers model",
        ),
        Role(
            name="clip",
            parts=(CLIP,),
            folder="text_encoder",
            tokenizer="tokenizer",
            inverted=True,
            fits=lambda config: config.width <= VIT_L.width,
            where="the folder text_encoder/ of a diffusers model, or clip_l.safetensors",
        ),
        Role(
            name="vae",
            parts=(AUTOENCODER, TINY_AUTOENCODER),
            folder="vae",
            file="vae.safetensors",
            settings=((AUTOENCODER, {"scaling_factor": VAE.scale}),),
            fits=lambda config: config.latent_channels == VAE.latent_channels,
            where="the folder vae/ of a diffusers model, or vae-ft-mse-840000-ema-pruned.safetensors",
        ),
    ),
    variants={"1.x": DEFAULTS},
    variant=variant,
    refusal=refusal,
    misfit=misfit,
    scheduler=scheduler_config,
    assemble=assemble,
    manifests=MANIFESTS,
    controls=Controls(part=CONTROLNET, misfit=control_misfit),
    harmless=(
        *TRAINING,
        *MARKERS,
        "embedding_manager.*",
        "cond_stage_model.logit_scale",
        "cond_stage_model.text_projection*",
        "cond_stage_model.transformer.logit_scale",
        "cond_stage_model.transformer.text_projection*",
    ),
)
