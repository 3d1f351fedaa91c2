"""SDXL as the loader sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from calotype.checkpoint.autoencoders import AUTOENCODER, TINY_AUTOENCODER
from calotype.checkpoint.controlnets import CONTROLNET, HINT_WIDTHS, PROMAX
from calotype.checkpoint.image_prompts import IMAGE_ADAPTER, POSITIONS, VISION
from calotype.checkpoint.keys import Extra
from calotype.checkpoint.text_encoders import CLIP
from calotype.families.diffusion import MARKERS, REFUSED_MARKERS, TRAINING, diffusion_of, scheduler_config, suffix
from calotype.families.family import Assembly, Clues, Controls, Family, Manifest, ManifestPart, Role, whole, with_card
from calotype.families.sdxl import DEFAULTS, TURBO_DEFAULTS, SdxlModel
from calotype.families.sdxl.config import DIFFUSION, INPAINTING, TURBO_DIFFUSION, VAE, ZERO_SNR
from calotype.families.sdxl.config import UNET as UNET_CONFIG
from calotype.families.sdxl.keys import UNET
from calotype.families.unets import beside_the_noise, control_misfit
from calotype.nn.autoencoder import Autoencoder
from calotype.nn.controlnet import ControlNetConfig
from calotype.nn.image_adapter import BASE, ImageAdapterConfig, Places, perceiver
from calotype.nn.tiny_autoencoder import TinyAutoencoder
from calotype.nn.unet import UNet, UNetConfig
from calotype.nn.vision import BIG_G as IMAGE_BIG_G
from calotype.nn.vision import VIT_H
from calotype.text.clip import BIG_G, VIT_L, ClipConfig, ClipEncoder

TURBO_MARKER = "denoiser.sigmas"  # in Stability AI's file of SDXL Turbo
TURBO_SAMPLE = 64  # latents a side in its diffusers folder


def turbo(clues: Clues) -> bool:
    """Whether a model says of itself that it is distilled to single steps."""
    return TURBO_MARKER in clues.markers or clues.settings.get("sample_size") == TURBO_SAMPLE


def variant(config: UNetConfig, clues: Clues) -> str:
    if config.channels_in == INPAINTING.channels_in:
        return "inpainting"
    if turbo(clues):
        return "turbo"
    return "base" + suffix(diffusion_of(DIFFUSION, ZERO_SNR, clues))


def refusal(config: UNetConfig, clues: Clues) -> str | None:
    why = beside_the_noise(f"SDXL {variant(config, clues)}", config)
    if why is not None:
        return why
    known = next((name for marker, name in REFUSED_MARKERS.items() if marker in clues.markers), None)
    return None if known is None else f"{known} is not supported"


def misfit(configs: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first role whose configuration does not go with the UNet's, and why."""
    unet: UNetConfig = configs["unet"]
    clip_l, clip_g = configs["clip_l"], configs["clip_g"]
    vector = (clip_g.projection or clip_g.width) + 6 * unet.size_width
    for role, what, has, wants in (
        ("clip_g", "two CLIP encoders of joint width", clip_l.width + clip_g.width, unet.text_width),
        ("clip_g", "pooled text and sizes of width", vector, unet.vector_width),
        ("vae", "an autoencoder with latent channels:", configs["vae"].latent_channels, unet.channels_out),
    ):
        if has != wants:
            return role, f"{what} {has}, but this SDXL UNet takes {wants}"
    return None


def assemble(given: Assembly) -> SdxlModel:
    """The model of these networks; a folder's own scheduler and card stand before the family's numbers."""
    unet, clip_l, clip_g, vae = (given.networks[name] for name in ("unet", "clip_l", "clip_g", "vae"))
    assert isinstance(unet, UNet)
    assert isinstance(clip_l, ClipEncoder)
    assert isinstance(clip_g, ClipEncoder)
    assert isinstance(vae, (Autoencoder, TinyAutoencoder))
    is_turbo = turbo(given.clues)
    defaults = TURBO_DEFAULTS if is_turbo else DEFAULTS
    size = given.clues.settings.get("sample_size")
    if isinstance(size, int):
        defaults = replace(defaults, width=size * vae.config.factor, height=size * vae.config.factor)
    return SdxlModel(
        unet=unet,
        clip_l=clip_l,
        clip_g=clip_g,
        vae=vae,
        tokenizer_l=given.tokenizers["clip_l"],
        tokenizer_g=given.tokenizers["clip_g"],
        embeddings_l=given.embeddings_of(clip_l.config.width),
        embeddings_g=given.embeddings_of(clip_g.config.width),
        empty_is_zero=bool(given.index.get("force_zeros_for_empty_prompt", True)),
        diffusion=diffusion_of(TURBO_DIFFUSION if is_turbo else DIFFUSION, ZERO_SNR, given.clues),
        defaults=with_card(defaults, given.card.get("defaults", {})),
        variant=str(given.card.get("variant", variant(unet.config, given.clues))),
        source=given.source,
        device=given.device,
    )


def _large(config: ClipConfig) -> bool:
    """Of SDXL's two encoders the second is the wider one, and has a projection."""
    return config.width > VIT_L.width


POSITION_IDS = "text_model.embeddings.position_ids"
ORIGINAL_UNET = ManifestPart(part=UNET, layout="original", config=UNET_CONFIG, prefix="model.diffusion_model.")
ORIGINAL_VAE = ManifestPart(part=AUTOENCODER, layout="original", config=VAE, prefix="first_stage_model.")
ORIGINAL_CLIP_L = ManifestPart(
    part=CLIP,
    layout="transformers",
    config=VIT_L,
    prefix="conditioner.embedders.0.transformer.",
    extras=(POSITION_IDS,),
)
ORIGINAL_CLIP_G = ManifestPart(
    part=CLIP, layout="openclip", config=BIG_G, prefix="conditioner.embedders.1.model.", extras=("logit_scale",)
)
BARE_CLIP_L = replace(ORIGINAL_CLIP_L, extras=())
ORIGINAL = (ORIGINAL_UNET, ORIGINAL_VAE, ORIGINAL_CLIP_L, ORIGINAL_CLIP_G)
SECOND_POSITION_IDS = "transformer.text_model.embeddings.position_ids"
CONTROL = ControlNetConfig(unet=UNET_CONFIG, hint_widths=HINT_WIDTHS, union=None, pooled=False)
UNION = ControlNetConfig(unet=UNET_CONFIG, hint_widths=HINT_WIDTHS, union=PROMAX, pooled=False)
ADAPTER = ImageAdapterConfig(
    seen_width=IMAGE_BIG_G.projection,
    text_width=UNET_CONFIG.text_width,
    widths=Places.of(UNET_CONFIG).widths,
    form=BASE,
)
ADAPTER_VIT_H = replace(ADAPTER, seen_width=VIT_H.projection)
ADAPTER_PLUS = replace(ADAPTER, seen_width=VIT_H.width, form=perceiver(1280))
MANIFESTS = (
    Manifest(name="sdxl-base", parts=ORIGINAL),
    Manifest(
        name="sdxl-with-both-position-ids",
        parts=(*ORIGINAL[:3], replace(ORIGINAL_CLIP_G, extras=("logit_scale", SECOND_POSITION_IDS))),
    ),
    Manifest(name="sdxl-zero-snr", parts=ORIGINAL, more=tuple(Extra(name, (0,)) for name in MARKERS)),
    Manifest(name="sdxl-without-position-ids", parts=(ORIGINAL_UNET, ORIGINAL_VAE, BARE_CLIP_L, ORIGINAL_CLIP_G)),
    Manifest(
        name="sdxl-turbo",
        parts=(ORIGINAL_UNET, ORIGINAL_VAE, BARE_CLIP_L, ORIGINAL_CLIP_G),
        more=(Extra(TURBO_MARKER, (1000,)),),
    ),
    Manifest(name="sdxl-original-text-encoders", parts=(ORIGINAL_CLIP_L, ORIGINAL_CLIP_G)),
    Manifest(name="sdxl-original-unet", parts=(ORIGINAL_UNET,)),
    Manifest(name="sdxl-original-vae", parts=(ORIGINAL_VAE,)),
    Manifest(name="sdxl-inpainting", parts=(replace(ORIGINAL_UNET, config=INPAINTING), *ORIGINAL[1:])),
    whole("sdxl-controlnet-diffusers", CONTROLNET, "diffusers", CONTROL),
    whole("sdxl-controlnet-union", CONTROLNET, "diffusers", replace(UNION, union=replace(PROMAX, kinds=6))),
    whole("sdxl-controlnet-union-promax", CONTROLNET, "diffusers", UNION),
    whole("sdxl-ip-adapter", IMAGE_ADAPTER, "base", ADAPTER),
    whole("sdxl-ip-adapter-vit-h", IMAGE_ADAPTER, "base", ADAPTER_VIT_H),
    whole("sdxl-ip-adapter-plus-vit-h", IMAGE_ADAPTER, "plus", ADAPTER_PLUS),
    whole("clip-vit-bigg-image-encoder", VISION, "transformers", IMAGE_BIG_G, extras=(POSITIONS,)),
    whole("sdxl-unet-diffusers", UNET, "diffusers", UNET_CONFIG),
    whole("sdxl-unet-diffusers-inpainting", UNET, "diffusers", INPAINTING),
    whole("sdxl-text-encoder", CLIP, "transformers", VIT_L),
    whole("sdxl-text-encoder-2", CLIP, "transformers", BIG_G),
    whole("sdxl-vae-diffusers", AUTOENCODER, "diffusers", VAE),
    whole("sdxl-vae-bare", AUTOENCODER, "original", VAE),
)

FAMILY = Family(
    name="sdxl",
    title="SDXL",
    pipeline="StableDiffusionXLPipeline",
    roles=(
        Role(
            name="unet",
            parts=(UNET,),
            quantisable=True,
            folder="unet",
            file="unet.safetensors",
            where="a checkpoint such as sd_xl_base_1.0.safetensors, or the folder unet/ of a diffusers model",
        ),
        Role(
            name="clip_l",
            parts=(CLIP,),
            folder="text_encoder",
            tokenizer="tokenizer",
            inverted=True,
            fits=lambda config: not _large(config),
            where="the folder text_encoder/ of a diffusers model, or clip_l.safetensors",
        ),
        Role(
            name="clip_g",
            parts=(CLIP,),
            folder="text_encoder_2",
            tokenizer="tokenizer_2",
            inverted=True,
            settings=((CLIP, {"project": True}),),
            fits=_large,
            where="the folder text_encoder_2/ of a diffusers model, or clip_g.safetensors",
        ),
        Role(
            name="vae",
            parts=(AUTOENCODER, TINY_AUTOENCODER),
            folder="vae",
            file="vae.safetensors",
            settings=((AUTOENCODER, {"scaling_factor": VAE.scale}),),
            upcast=True,
            fits=lambda config: config.latent_channels == VAE.latent_channels,
            where="the folder vae/ of a diffusers model, or sdxl_vae.safetensors",
        ),
    ),
    variants={"base": DEFAULTS, "turbo": TURBO_DEFAULTS},
    variant=variant,
    refusal=refusal,
    misfit=misfit,
    scheduler=scheduler_config,
    assemble=assemble,
    manifests=MANIFESTS,
    controls=Controls(part=CONTROLNET, misfit=control_misfit),
    harmless=(
        TURBO_MARKER,
        *TRAINING,
        *MARKERS,
        "conditioner.embedders.*.logit_scale",
        "conditioner.embedders.*.text_projection*",
    ),
)
