"""A linear layer that is also quick where the processor lacks its dtype's arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 64  # from here on a product costs more than widening the weights for it
BLOCK = 1024  # rows of weights that are in float32 at a time

Rows = Callable[[int, int, torch.dtype], Tensor]
"""Some rows of a weight, from the one to the other, in a dtype."""


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


def product(x: Tensor, rows: Rows, count: int, dtype: torch.dtype, bias: Tensor | None, block: int = BLOCK) -> Tensor:
    """x (... in) times the transpose of a weight (count in) of this dtype, and the bias: (... count) like `x`.

    Where it is taken in float32 and `x` or the weight is not, `block` rows of weights are widened at a time on a CPU.
    """
    if x.dtype == dtype and (not widened(x) or x.numel() < ROWS * x.shape[-1]):
        return _linear(x, rows(0, count, dtype), bias)
    y = x.float()
    step = block if x.device.type == "cpu" else count
    pieces: list[Tensor] = []
    for start in range(0, count, step):
        stop = min(start + step, count)
        part = None if bias is None else bias[start:stop].float()
        pieces.append(_linear(y, rows(start, stop, torch.float32), part).to(x.dtype))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch's, whose rounding does not depend on where in memory the weight lies.

    On some CPUs (AMD's) MKL takes the product of one row in an order that depends on the address of the weight modulo
    16. Views of a file lie as the file has them; the same weight read into memory, or from a file of another layout,
    would then give another last bit. Products of two rows and more do not.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])  # torch takes the rows of a batch that is not contiguous one by one
    rows = len(flat)
    made = F.linear(flat.expand(2, -1) if rows == 1 else flat, weight, bias)
    return made[:rows].view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """torch's linear layer; on a CPU without half-precision arithmetic, large products are taken in float32.

    The result is rounded once, to the dtype that came in: nearer to the exact one than the emulation is. An input of
    float32 is answered in float32, whatever the weights are stored in.
    """

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; a layer that keeps its weight in fewer bits has this too."""
        return self.weight.dtype

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        # A gradient of rows would be as large as that of all.
        block = self.out_features if self.weight.requires_grad else BLOCK
        return product(input, self._rows, self.out_features, self.dtype, self.bias, block)

    def _rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return (self.weight if stop - start == self.out_features else self.weight[start:stop]).to(dtype)
