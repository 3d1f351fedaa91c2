"""Stable Diffusion 1.x's numbers (Rombach et al. 2022; CompVis, Runway, Stability AI)."""

from __future__ import annotations

from dataclasses import replace

from calotype.families.diffusion import DiffusionSettings, scaled_linear
from calotype.nn.autoencoder import AutoencoderConfig
from calotype.nn.tiny_autoencoder import TinyAutoencoderConfig
from calotype.nn.unet import UNetConfig

UNET = UNetConfig(
    channels_in=4,
    channels_out=4,
    widths=(320, 640, 1280, 1280),
    blocks=2,
    depths=(1, 1, 1, 0),
    middle_depth=1,
    heads=(8, 8, 8, 8),
    text_width=768,
    text_width_in=None,
    vector_width=None,
    size_width=256,
    convolved=True,
)
INPAINTING = replace(UNET, channels_in=9)  # the mask and the masked picture's latents beside the noisy ones
EDITING = replace(UNET, channels_in=8)  # InstructPix2Pix: the picture's latents beside the noisy ones

VAE = AutoencoderConfig(
    latent_channels=4, widths=(128, 256, 512, 512), blocks=2, quant_convs=True, scale=0.18215, shift=0.0
)
TINY_VAE = TinyAutoencoderConfig(
    latent_channels=4, width=64, encoder_blocks=(1, 3, 3, 3), decoder_blocks=(3, 3, 3, 1), scale=1.0, shift=0.0
)

PROCESS = scaled_linear(last=0.012)
ZERO_SNR = scaled_linear(last=0.012, zero_snr=True)
DIFFUSION = DiffusionSettings(process=PROCESS, prediction="noise", sampler="dpmpp_2m", schedule="karras")
