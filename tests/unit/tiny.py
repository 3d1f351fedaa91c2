"""A FLUX-architecture model small enough to run in milliseconds, with random weights and a word tokenizer."""

from __future__ import annotations

from dataclasses import replace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from calotype.families.flux import SCHNELL_DEFAULTS, FluxModel
from calotype.families.flux.config import DEV_SAMPLING, FluxConfig
from calotype.families.flux.network import FluxNetwork
from calotype.nn.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from calotype.text.clip import ClipConfig, ClipEncoder
from calotype.text.t5 import T5Config, T5Encoder
from calotype.text.tokenizers import PromptTokenizer

FLUX = FluxConfig(
    image_width=16,
    image_width_out=16,
    text_width=24,
    pooled_width=16,
    width=48,
    heads=2,
    mlp_ratio=2,
    joint_blocks=2,
    single_blocks=2,
    axes=(4, 10, 10),
    theta=10_000,
    guidance_input=True,
    patch=2,
)
T5 = T5Config(vocabulary=16, width=24, layers=2, heads=2, head_width=8, mlp_width=32, buckets=32, distance=128)
CLIP = ClipConfig(
    vocabulary=16,
    width=16,
    layers=2,
    heads=2,
    mlp_width=32,
    positions=12,
    quick_gelu=True,
    projection=None,
    end=1,
)
VAE = TinyAutoencoderConfig(
    latent_channels=4, width=8, encoder_blocks=(1, 1, 1, 1), decoder_blocks=(1, 1, 1, 1), scale=1.0, shift=0.0
)
WORDS = ("<pad>", "</s>", "<unk>", "<s>", "a", "red", "blue", "fox", "cat", "in", "the", "snow", "on")


def scattered(module: nn.Module, seed: int, spread: float = 0.15) -> nn.Module:
    """Random weights under which every path counts."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(gain + spread * torch.randn(parameter.shape, generator=rng))
    return module.eval().requires_grad_(False)


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def flux_model(*, guidance: bool = True) -> FluxModel:
    """The tiny model, in float32 on the CPU; 32 pixels a side and 4 steps unless asked otherwise."""
    transformer, clip, t5, vae = (
        FluxNetwork(replace(FLUX, guidance_input=guidance)),
        ClipEncoder(CLIP),
        T5Encoder(T5),
        TinyAutoencoder(VAE),
    )
    for seed, module in enumerate((transformer, clip, t5, vae)):
        scattered(module, seed)
    return FluxModel(
        transformer=transformer,
        clip=clip,
        t5=t5,
        vae=vae,
        clip_tokenizer=PromptTokenizer(tokenizer(), start=3, end=1, padding=0),
        t5_tokenizer=PromptTokenizer(tokenizer(), start=None, end=1, padding=0),
        sampling=DEV_SAMPLING,
        defaults=replace(
            SCHNELL_DEFAULTS, width=32, height=32, text_tokens=10, embedded_guidance=3.5 if guidance else None
        ),
        variant="tiny",
        source="tiny",
        device=torch.device("cpu"),
    )
