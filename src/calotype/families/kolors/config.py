"""Kolors' numbers (Kuaishou, 2024)."""

from __future__ import annotations

from dataclasses import replace

from calotype.families.diffusion import DiffusionSettings, scaled_linear
from calotype.nn.autoencoder import AutoencoderConfig
from calotype.nn.unet import UNetConfig

UNET = UNetConfig(
    channels_in=4,
    channels_out=4,
    widths=(320, 640, 1280),
    blocks=2,
    depths=(0, 2, 10),
    middle_depth=10,
    heads=(5, 10, 20),
    text_width=2048,
    text_width_in=4096,
    vector_width=5632,
    size_width=256,
    convolved=False,
)
INPAINTING = replace(UNET, channels_in=9)

VAE = AutoencoderConfig(  # SDXL's
    latent_channels=4, widths=(128, 256, 512, 512), blocks=2, quant_convs=True, scale=0.13025, shift=0.0
)

TRAIN_STEPS, LAST_BETA = 1100, 0.014
DIFFUSION = DiffusionSettings(
    process=scaled_linear(last=LAST_BETA, steps=TRAIN_STEPS), prediction="noise", sampler="dpmpp_2m", schedule="karras"
)
ZERO_SNR = scaled_linear(last=LAST_BETA, steps=TRAIN_STEPS, zero_snr=True)
TEXT_TOKENS = 256
