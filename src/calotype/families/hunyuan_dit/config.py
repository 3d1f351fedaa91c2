"""Hunyuan-DiT's numbers (Tencent, 2024)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from calotype.families.diffusion import DiffusionSettings, scaled_linear
from calotype.nn.autoencoder import AutoencoderConfig


@dataclass(frozen=True, kw_only=True)
class HunyuanConfig:
    """`text_*` is BERT's side of the prompt, `t5_*` that of T5, which is projected to BERT's width.

    `channels_out` are twice `channels_in`: the prediction, then a variance that samplers have no use for. `styled` says
    that the network is told sizes, a crop and a style (of which there is one): versions 1.0 and 1.1.
    """

    channels_in: int
    channels_out: int
    patch: int
    width: int
    heads: int
    mlp_width: int
    blocks: int
    text_width: int
    text_tokens: int
    t5_width: int
    t5_tokens: int
    pooled_width: int
    styled: bool


V1_2 = HunyuanConfig(
    channels_in=4,
    channels_out=8,
    patch=2,
    width=1408,
    heads=16,
    mlp_width=6144,
    blocks=40,
    text_width=1024,
    text_tokens=77,
    t5_width=2048,
    t5_tokens=256,
    pooled_width=1024,
    styled=False,
)
V1_1 = replace(V1_2, styled=True)

VAE = AutoencoderConfig(  # SDXL's
    latent_channels=4, widths=(128, 256, 512, 512), blocks=2, quant_convs=True, scale=0.13025, shift=0.0
)

LAST_BETA = {"1.1": 0.03, "1.2": 0.018}  # by variant; files do not say it
DIFFUSION = {
    variant: DiffusionSettings(
        process=scaled_linear(last=last),
        prediction="v",
        sampler="euler_ancestral",
        schedule="leading",
        unit_start=True,
    )
    for variant, last in LAST_BETA.items()
}
ORIGINAL_SIZE = (1024, 1024)  # what 1.0 and 1.1 are told of the picture before it was scaled, whatever its size now
