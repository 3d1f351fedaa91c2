"""Normalisations that torch has no module for, or only since a version newer than our oldest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (Zhang and Sennrich 2019), computed in float32."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        # In half precision the weight is applied after rounding, as the references (BFL, T5) do.
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * self.weight


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm (Peebles and Xie 2022): LayerNorm without weights, then (1 + scale) x + shift.

    x (b n d); shift and scale (b 1 d).
    """
    return torch.addcmul(shift, F.layer_norm(x, (x.shape[-1],), eps=1e-6), 1 + scale)
