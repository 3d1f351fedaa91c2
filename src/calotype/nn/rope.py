"""Rotary position embedding over several axes (Su et al. 2021; FLUX.1's form: adjacent pairs, one band per axis)."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(positions: Tensor, axes: tuple[int, ...], theta: float) -> Tensor:
    """The rotations of queries and keys at the given positions.

    positions (n, len(axes)): one coordinate per axis; `axes` are the even numbers of channels given to each axis.
    Returns cosines and sines, float32 (2, n, sum(axes) / 2), of position * theta^(-2i/channels), taken in float64.
    """
    bands: list[Tensor] = []
    for axis, channels in enumerate(axes):
        exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=positions.device) / channels
        bands.append(positions[:, axis, None].double() * theta**-exponent)
    angle = torch.cat(bands, dim=-1)
    return torch.stack([angle.cos(), angle.sin()]).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate each adjacent pair of channels: x (b h n d), table (2 n d/2) -> (b h n d), in float32 inside.

    Real arithmetic: as fast as complex numbers, and devices and compilers without those take it too.
    """
    cos, sin = table
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)
