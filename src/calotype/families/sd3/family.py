"""Stable Diffusion 3 as the loader sees it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from calotype.checkpoint.autoencoders import AUTOENCODER, TINY_AUTOENCODER
from calotype.checkpoint.keys import Extra
from calotype.checkpoint.text_encoders import CLIP, T5
from calotype.families.family import Assembly, Clues, Controls, Family, Manifest, ManifestPart, Role, whole, with_card
from calotype.families.flow import flow_settings
from calotype.families.sd3 import DEFAULTS, Sd3Model
from calotype.families.sd3.conditioning import ClipReader, T5Reader
from calotype.families.sd3.config import LARGE, MEDIUM, MEDIUM_3_5, SAMPLING, VAE, Sd3Config
from calotype.families.sd3.controlnet import CONTROL, control_misfit
from calotype.families.sd3.keys import TRANSFORMER
from calotype.families.sd3.network import Sd3Network
from calotype.nn.autoencoder import Autoencoder
from calotype.nn.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from calotype.text.clip import BIG_G, VIT_L, ClipConfig, ClipEncoder
from calotype.text.t5 import XXL, T5Encoder

TURBO = re.compile(r"(?<![a-z])turbo(?![a-z])", re.IGNORECASE)
TINY_VAE = TinyAutoencoderConfig(
    latent_channels=16,
    width=64,
    encoder_blocks=(1, 3, 3, 3),
    decoder_blocks=(3, 3, 3, 1),
    scale=1.0,
    shift=0.0,
)


def variant(config: Sd3Config, clues: Clues) -> str:
    """What is normed is of 3.5, what attends twice of its medium size; large-turbo differs by its name alone."""
    if config.dual:
        return "3.5-medium"
    if not config.norms:
        return "medium"
    return "3.5-large-turbo" if TURBO.search(clues.name) else "3.5-large"


def refusal(config: Sd3Config, clues: Clues) -> str | None:
    if config.channels_in != config.channels_out:
        return (
            f"Stable Diffusion {variant(config, clues)}: recognised, but its transformer takes {config.channels_in} "
            f"channels for the {config.channels_out} that it predicts, which is not supported; give a model that draws "
            "from a prompt alone"
        )
    return None


def misfit(configs: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first role whose configuration does not go with the transformer's, and why."""
    transformer: Sd3Config = configs["transformer"]
    clips: dict[str, ClipConfig] = {role: configs[role] for role in ("clip_l", "clip_g") if role in configs}
    last = next(reversed(clips), "")
    pooled = sum(clip.projection or clip.width for clip in clips.values())
    if len(clips) == 2 and pooled != transformer.pooled_width:
        return last, f"pooled states of width {pooled} from both CLIPs, but {_this_takes(transformer.pooled_width)}"
    if pooled > transformer.pooled_width:
        return last, f"a pooled state of width {pooled}, but {_this_takes(transformer.pooled_width)} from both CLIPs"
    if sum(clip.width for clip in clips.values()) > transformer.text_width:
        return last, f"CLIP states wider than the {transformer.text_width} that this transformer takes"
    if "t5" in configs and configs["t5"].width != transformer.text_width:
        return "t5", f"a T5 encoder of width {configs['t5'].width}, but {_this_takes(transformer.text_width)}"
    latents = configs["vae"].latent_channels
    if latents != transformer.channels_in:
        return "vae", f"an autoencoder with latent channels: {latents}, but {_this_takes(transformer.channels_in)}"
    return None


def _this_takes(what: int) -> str:
    return f"this Stable Diffusion 3 transformer takes {what}"


def scheduler(variant: str) -> dict[str, Any]:
    """scheduler_config.json of a variant, for conversion."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": SAMPLING.shift,
    }


def assemble(given: Assembly) -> Sd3Model:
    """The model of these networks; a folder's own scheduler and card stand before the family's numbers."""
    transformer, vae = given.networks["transformer"], given.networks["vae"]
    assert isinstance(transformer, Sd3Network)
    assert isinstance(vae, (Autoencoder, TinyAutoencoder))
    name = str(given.card.get("variant", variant(transformer.config, given.clues)))
    defaults = DEFAULTS.get(name, DEFAULTS[variant(transformer.config, given.clues)])
    size = given.clues.settings.get("sample_size")
    if isinstance(size, int):
        defaults = replace(defaults, width=size * vae.config.factor, height=size * vae.config.factor)
    published = given.clues.scheduler
    return Sd3Model(
        transformer=transformer,
        clip_l=_clip(given, "clip_l"),
        clip_g=_clip(given, "clip_g"),
        t5=_t5(given),
        vae=vae,
        sampling=SAMPLING if published is None else flow_settings(published, "Stable Diffusion 3"),
        defaults=with_card(defaults, given.card.get("defaults", {})),
        variant=name,
        source=given.source,
        device=given.device,
    )


def _clip(given: Assembly, role: str) -> ClipReader | None:
    encoder = given.networks.get(role)
    if encoder is None:
        return None
    assert isinstance(encoder, ClipEncoder)
    return ClipReader(encoder, given.tokenizers[role], given.embeddings_of(encoder.config.width))


def _t5(given: Assembly) -> T5Reader | None:
    encoder = given.networks.get("t5")
    if encoder is None:
        return None
    assert isinstance(encoder, T5Encoder)
    return T5Reader(encoder, given.tokenizers["t5"])


def _large(config: ClipConfig) -> bool:
    """Of the two CLIPs the second is the wider one."""
    return config.width > VIT_L.width


def _images() -> Iterator[Extra]:
    """The side of OpenAI's CLIP that looks at pictures, a ViT-L of 14 pixels a patch, in transformers' names."""
    width, out = 1024, VIT_L.width
    yield Extra("logit_scale", ())
    yield Extra("visual_projection.weight", (out, width))
    yield Extra("vision_model.embeddings.class_embedding", (width,))
    yield Extra("vision_model.embeddings.patch_embedding.weight", (width, 3, 14, 14))
    yield Extra("vision_model.embeddings.position_embedding.weight", (16 * 16 + 1, width))
    yield Extra("vision_model.embeddings.position_ids", (1, 16 * 16 + 1))
    norms = ["pre_layrnorm", "post_layernorm"]  # spelt so
    for number in range(24):
        layer = f"encoder.layers.{number}"
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        for name, rows, columns in (
            *((f"self_attn.{x}_proj", width, width) for x in ("q", "k", "v", "out")),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            yield Extra(f"vision_model.{layer}.{name}.weight", (rows, columns))
            yield Extra(f"vision_model.{layer}.{name}.bias", (rows,))
    for norm in norms:
        yield Extra(f"vision_model.{norm}.weight", (width,))
        yield Extra(f"vision_model.{norm}.bias", (width,))


PROJECTED_L = replace(VIT_L, projection=VIT_L.width)
CLIPS = (
    ManifestPart(part=CLIP, layout="transformers", config=VIT_L, prefix="text_encoders.clip_l.transformer."),
    ManifestPart(part=CLIP, layout="transformers", config=BIG_G, prefix="text_encoders.clip_g.transformer."),
)
T5XXL = ManifestPart(
    part=T5,
    layout="transformers",
    config=XXL,
    prefix="text_encoders.t5xxl.transformer.",
    extras=("encoder.embed_tokens.weight",),
)


def _original(name: str, config: Sd3Config, *encoders: ManifestPart) -> Manifest:
    """A file of Stability AI's."""
    return Manifest(
        name=name,
        parts=(
            ManifestPart(part=TRANSFORMER, layout="original", config=config, prefix="model.diffusion_model."),
            ManifestPart(part=AUTOENCODER, layout="original", config=VAE, prefix="first_stage_model."),
            *encoders,
        ),
    )


MANIFESTS = (
    _original("sd3-medium", MEDIUM),
    _original("sd3-medium-incl-clips", MEDIUM, *CLIPS),
    _original("sd3-medium-incl-clips-t5xxl", MEDIUM, *CLIPS, T5XXL),  # with T5 in float16 and in float8 alike
    _original("sd3.5-medium", MEDIUM_3_5),
    _original("sd3.5-large", LARGE),  # and large-turbo
    whole("sd3-clip-l", CLIP, "transformers", VIT_L),
    Manifest(
        name="sd3-clip-l-openai",
        parts=(
            ManifestPart(
                part=CLIP,
                layout="transformers",
                config=PROJECTED_L,
                extras=("text_model.embeddings.position_ids",),
            ),
        ),
        more=tuple(_images()),
    ),
    whole("sd3-clip-g", CLIP, "transformers", BIG_G),
    whole("sd3-t5xxl", T5, "transformers", XXL, extras=("encoder.embed_tokens.weight",)),
    whole("sd3-transformer-diffusers-medium", TRANSFORMER, "diffusers", MEDIUM),
    whole("sd3-transformer-diffusers-3.5-medium", TRANSFORMER, "diffusers", MEDIUM_3_5),
    whole("sd3-transformer-diffusers-3.5-large", TRANSFORMER, "diffusers", LARGE),
    whole("sd3-text-encoder", CLIP, "transformers", PROJECTED_L),
    whole("sd3-text-encoder-2", CLIP, "transformers", BIG_G),
    whole("sd3-text-encoder-3", T5, "transformers", XXL),
    whole("sd3-vae-diffusers", AUTOENCODER, "diffusers", VAE),
    whole("taesd3-encoder", TINY_AUTOENCODER, "taesd", TINY_VAE, only="encoder."),
    whole("taesd3-decoder", TINY_AUTOENCODER, "taesd", TINY_VAE, only="decoder."),
    whole("taesd3-diffusers", TINY_AUTOENCODER, "diffusers-tiny", TINY_VAE),
)

FAMILY = Family(
    name="sd3",
    title="Stable Diffusion 3",
    pipeline="StableDiffusion3Pipeline",
    roles=(
        Role(
            name="transformer",
            parts=(TRANSFORMER,),
            folder="transformer",
            file="sd3-{}.safetensors",
            where="sd3_medium.safetensors, sd3.5_large.safetensors, or transformer/ of a diffusers folder",
        ),
        Role(
            name="clip_l",
            parts=(CLIP,),
            folder="text_encoder",
            tokenizer="tokenizer",
            inverted=True,
            settings=((CLIP, {"project": True}),),
            fits=lambda config: not _large(config),
            where="clip_l.safetensors or text_encoder/",
            optional="prompts count for less: its states are zeros",
        ),
        Role(
            name="clip_g",
            parts=(CLIP,),
            folder="text_encoder_2",
            tokenizer="tokenizer_2",
            inverted=True,
            settings=((CLIP, {"project": True}),),
            fits=_large,
            where="clip_g.safetensors or text_encoder_2/",
            optional="prompts count for less: its states are zeros",
        ),
        Role(
            name="t5",
            parts=(T5,),
            folder="text_encoder_3",
            tokenizer="tokenizer_3",
            where="t5xxl_fp16.safetensors or text_encoder_3/",
            optional="long prompts and written words are followed less: its states are zeros",
        ),
        Role(
            name="vae",
            parts=(AUTOENCODER, TINY_AUTOENCODER),
            folder="vae",
            file="vae.safetensors",
            settings=((AUTOENCODER, {"scaling_factor": VAE.scale, "shift_factor": VAE.shift}),),
            fits=lambda config: config.latent_channels == VAE.latent_channels,
            where="the same file, or vae/ of a diffusers folder",
        ),
    ),
    variants=DEFAULTS,
    variant=variant,
    refusal=refusal,
    misfit=misfit,
    scheduler=scheduler,
    assemble=assemble,
    manifests=MANIFESTS,
    controls=Controls(part=CONTROL, misfit=control_misfit),
    harmless=("*.logit_scale", "logit_scale", "*.position_ids", "*.spiece_model"),
)
