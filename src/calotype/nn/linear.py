"""A linear layer that is also quick where the processor lacks its dtype's arithmetic."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 64  # from here on a product costs more than widening the weights for it


@cache
def native(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU multiplies matrices of `dtype` in hardware.

    Most CPUs only store half precision and emulate its products, at a fifth of float32's speed.
    """
    has = (
        "_is_amx_tile_supported",
        "_is_avx512_bf16_supported" if dtype == torch.bfloat16 else "_is_amx_fp16_supported",
    )
    answers = [getattr(torch.cpu, name)() for name in has if hasattr(torch.cpu, name)]
    return any(answers) or not answers


def widened(x: Tensor) -> bool:
    """Whether products of `x` are better taken in float32: half precision on a CPU without its arithmetic."""
    return x.dtype in (torch.bfloat16, torch.float16) and x.device.type == "cpu" and not native(x.dtype)


class Linear(nn.Linear):
    """torch's linear layer; on a CPU without half-precision arithmetic, large products are taken in float32.

    The result is rounded once, to the dtype that came in: nearer to the exact one than the emulation is. An input of
    float32 is answered in float32, whatever the weights are stored in.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        weight = self.weight
        if input.dtype == weight.dtype and (not widened(weight) or input.numel() < ROWS * input.shape[-1]):
            return F.linear(input, weight, self.bias)
        bias = None if self.bias is None else self.bias.float()  # pyright: ignore[reportUnnecessaryComparison]
        return F.linear(input.float(), weight.float(), bias).to(input.dtype)
