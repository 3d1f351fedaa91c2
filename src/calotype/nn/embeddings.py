"""Embeddings of scalars."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from calotype.nn.linear import Linear


def sinusoid(values: Tensor, width: int, *, period: float = 10_000.0) -> Tensor:
    """Cosines then sines of `values` (any shape) at width/2 geometric frequencies: (..., width), float32.

    The DDPM time embedding (Ho et al. 2020) in the order that diffusion checkpoints use (cosine first).
    """
    half = width // 2
    frequency = torch.exp(-math.log(period) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angle = values.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Embedder(nn.Module):
    """Two linear layers with a SiLU between: how a vector enters a network's conditioning stream."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.inner = Linear(width_in, width)
        self.outer = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(nn.functional.silu(self.inner(x)))
