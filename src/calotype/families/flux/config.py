"""FLUX.1's numbers (Black Forest Labs, 2024)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from calotype.families.flow import FlowSettings


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    """The transformer.

    `image_width` is the width of an image token that enters (patch² latent channels, more for FLUX.1 Fill),
    `image_width_out` of one that leaves; `patch` is the side of an image token in latents; `axes` are the channels of
    a head rotated by text, row and column position.
    """

    image_width: int
    image_width_out: int
    text_width: int
    pooled_width: int
    width: int
    heads: int
    mlp_ratio: int
    joint_blocks: int
    single_blocks: int
    axes: tuple[int, ...]
    theta: int
    guidance_input: bool
    patch: int


DEV = FluxConfig(
    image_width=64,
    image_width_out=64,
    text_width=4096,
    pooled_width=768,
    width=3072,
    heads=24,
    mlp_ratio=4,
    joint_blocks=19,
    single_blocks=38,
    axes=(16, 56, 56),
    theta=10_000,
    guidance_input=True,
    patch=2,
)
SCHNELL = replace(DEV, guidance_input=False)
FILL = replace(DEV, image_width=384)


DEV_SAMPLING = FlowSettings(shift=1.0, dynamic=True, base_shift=0.5, max_shift=1.15, base_tokens=256, max_tokens=4096)
SCHNELL_SAMPLING = replace(DEV_SAMPLING, dynamic=False)
