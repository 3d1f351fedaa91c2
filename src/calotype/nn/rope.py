"""Rotary position embedding over several axes (Su et al. 2021; FLUX.1's form: adjacent pairs, one band per axis)."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(positions: Tensor, axes: tuple[int, ...], theta: float) -> Tensor:
    """Unit complex numbers that rotate queries and keys at the given positions.

    positions (n, len(axes)): one coordinate per axis; `axes` are the even numbers of channels given to each axis.
    Returns complex64 (n, sum(axes) / 2). Angles are computed in float64: position * theta^(-2i/channels).
    """
    bands: list[Tensor] = []
    for axis, channels in enumerate(axes):
        exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=positions.device) / channels
        bands.append(positions[:, axis, None].double() * theta**-exponent)
    angle = torch.cat(bands, dim=-1)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate each adjacent pair of channels: x (b h n d), table (n, d/2) -> (b h n d), in float32 inside."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)
