"""A convolution that is also quick where the processor lacks its dtype's arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calotype.nn.linear import widened


class Conv2d(nn.Conv2d):
    """torch's convolution; on a CPU without half-precision arithmetic it is taken in float32, as in `Linear`."""

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; a layer that keeps its weight in fewer bits has this too."""
        return self.weight.dtype

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        if not widened(self.weight):
            return super().forward(input)
        bias = None if self.bias is None else self.bias.float()
        return self._conv_forward(input.float(), self.weight.float(), bias).to(input.dtype)
