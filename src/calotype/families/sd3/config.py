"""The numbers of Stable Diffusion 3 and 3.5 (Esser et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from calotype.families.flow import FlowSettings
from calotype.nn.autoencoder import AutoencoderConfig


@dataclass(frozen=True, kw_only=True)
class Sd3Config:
    """The transformer.

    `positions` are the tokens a side that the position table has; `dual` the numbers of the blocks in which the picture
    also attends to itself alone; `norms` says whether queries and keys are normed.
    """

    channels_in: int
    channels_out: int
    patch: int
    text_width: int
    pooled_width: int
    width: int
    heads: int
    mlp_width: int
    blocks: int
    positions: int
    dual: tuple[int, ...]
    norms: bool


MEDIUM = Sd3Config(
    channels_in=16,
    channels_out=16,
    patch=2,
    text_width=4096,
    pooled_width=2048,
    width=1536,
    heads=24,
    mlp_width=6144,
    blocks=24,
    positions=192,
    dual=(),
    norms=False,
)
MEDIUM_3_5 = replace(MEDIUM, positions=384, dual=tuple(range(13)), norms=True)
LARGE = replace(MEDIUM, width=2432, heads=38, mlp_width=9728, blocks=38, norms=True)

VAE = AutoencoderConfig(
    latent_channels=16, widths=(128, 256, 512, 512), blocks=2, quant_convs=False, scale=1.5305, shift=0.0609
)
SAMPLING = FlowSettings(shift=3.0, dynamic=False, base_shift=0.5, max_shift=1.15, base_tokens=256, max_tokens=4096)
CLIP_TOKENS = 77  # of a prompt that no CLIP reads
