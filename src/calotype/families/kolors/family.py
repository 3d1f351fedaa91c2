"""Kolors as the loader sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from calotype.checkpoint.autoencoders import AUTOENCODER, TINY_AUTOENCODER
from calotype.checkpoint.chatglm import CHATGLM
from calotype.checkpoint.controlnets import CONTROLNET, HINT_WIDTHS
from calotype.families.diffusion import diffusion_of, scheduler_config, suffix
from calotype.families.family import Assembly, Clues, Controls, Family, Role, whole, with_card
from calotype.families.kolors import DEFAULTS, KolorsModel
from calotype.families.kolors.config import DIFFUSION, INPAINTING, LAST_BETA, TRAIN_STEPS, VAE, ZERO_SNR
from calotype.families.kolors.config import UNET as UNET_CONFIG
from calotype.families.kolors.keys import UNET
from calotype.families.unets import beside_the_noise, control_misfit
from calotype.nn.autoencoder import Autoencoder
from calotype.nn.controlnet import ControlNetConfig
from calotype.nn.tiny_autoencoder import TinyAutoencoder
from calotype.nn.unet import UNet, UNetConfig
from calotype.text.chatglm import CHATGLM3_6B, ChatGlmEncoder


def variant(config: UNetConfig, clues: Clues) -> str:
    if config.channels_in == INPAINTING.channels_in:
        return "inpainting"
    return "base" + suffix(diffusion_of(DIFFUSION, ZERO_SNR, clues))


def refusal(config: UNetConfig, clues: Clues) -> str | None:
    return beside_the_noise(f"Kolors {variant(config, clues)}", config)


def misfit(configs: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first role whose configuration does not go with the UNet's, and why."""
    unet: UNetConfig = configs["unet"]
    width = configs["chatglm"].width
    for role, what, has, wants in (
        ("chatglm", "a ChatGLM encoder of width", width, unet.text_width_in),
        ("chatglm", "pooled text and sizes of width", width + 6 * unet.size_width, unet.vector_width),
        ("vae", "an autoencoder with latent channels:", configs["vae"].latent_channels, unet.channels_out),
    ):
        if has != wants:
            return role, f"{what} {has}, but this Kolors UNet takes {wants}"
    return None


def assemble(given: Assembly) -> KolorsModel:
    """The model of these networks; a folder's own scheduler and card stand before the family's numbers."""
    unet, chatglm, vae = (given.networks[name] for name in ("unet", "chatglm", "vae"))
    assert isinstance(unet, UNet)
    assert isinstance(chatglm, ChatGlmEncoder)
    assert isinstance(vae, (Autoencoder, TinyAutoencoder))
    defaults = DEFAULTS
    size = given.clues.settings.get("sample_size")
    if isinstance(size, int):
        defaults = replace(defaults, width=size * vae.config.factor, height=size * vae.config.factor)
    return KolorsModel(
        unet=unet,
        chatglm=chatglm,
        vae=vae,
        tokenizer=given.tokenizers["chatglm"],
        diffusion=diffusion_of(DIFFUSION, ZERO_SNR, given.clues),
        defaults=with_card(defaults, given.card.get("defaults", {})),
        variant=str(given.card.get("variant", variant(unet.config, given.clues))),
        source=given.source,
        device=given.device,
    )


# What the files hold beside the states that Kolors takes.
LANGUAGE_MODEL = ("encoder.final_layernorm.weight", "output_layer.weight", "rotary_pos_emb.inv_freq")
CONTROL = ControlNetConfig(unet=UNET_CONFIG, hint_widths=HINT_WIDTHS, union=None, pooled=False)
MANIFESTS = (
    whole("kolors-controlnet", CONTROLNET, "diffusers", CONTROL),
    whole("kolors-unet", UNET, "diffusers", UNET_CONFIG),
    whole("kolors-unet-inpainting", UNET, "diffusers", INPAINTING),
    whole(
        "kolors-text-encoder",
        CHATGLM,
        "transformers",
        CHATGLM3_6B,
        extras=tuple(f"transformer.{name}" for name in LANGUAGE_MODEL),
    ),
    whole("kolors-text-encoder-diffusers", CHATGLM, "diffusers", CHATGLM3_6B, extras=LANGUAGE_MODEL),
    whole("kolors-vae", AUTOENCODER, "diffusers", VAE),
)

FAMILY = Family(
    name="kolors",
    title="Kolors",
    pipeline="KolorsPipeline",
    roles=(
        Role(
            name="unet",
            parts=(UNET,),
            quantisable=True,
            folder="unet",
            file="unet.safetensors",
            where="the folder unet/ of Kwai-Kolors/Kolors",
        ),
        Role(
            name="chatglm",
            parts=(CHATGLM,),
            quantisable=True,
            folder="text_encoder",
            tokenizer="tokenizer",
            where="the folder text_encoder/ of Kwai-Kolors/Kolors",
        ),
        Role(
            name="vae",
            parts=(AUTOENCODER, TINY_AUTOENCODER),
            folder="vae",
            file="vae.safetensors",
            settings=((AUTOENCODER, {"scaling_factor": VAE.scale}),),
            upcast=True,
            fits=lambda config: config.latent_channels == VAE.latent_channels,
            where="the folder vae/ of Kwai-Kolors/Kolors, or an SDXL autoencoder",
        ),
    ),
    variants={"base": DEFAULTS},
    variant=variant,
    refusal=refusal,
    misfit=misfit,
    scheduler=partial(scheduler_config, last=LAST_BETA, steps=TRAIN_STEPS),
    assemble=assemble,
    manifests=MANIFESTS,
    controls=Controls(part=CONTROLNET, misfit=control_misfit),
)
