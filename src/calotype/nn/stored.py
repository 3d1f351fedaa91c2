"""Layers whose weight is kept in fewer bits than they compute in, and widened when they are used.

Only storage is narrow: products are taken in the dtype of what comes in, activations are never rounded to anything
less. How a weight is kept is a subclass's (`packed`, `quantized`); what is done with it stands here.
"""

# r rows of a weight · p columns: all that one output is made of

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.nn.linear import BLOCK, product, widened

ROWS = 256  # widened at a time on a CPU: some megabytes, which stay in its cache
ROWS_ELSEWHERE = 2048  # on an accelerator, where starting an operation costs more


class Stored(nn.Module):
    """A weight in fewer bits. `shape` is its own, `dtype` what the layer computes in."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    kept: tuple[str, ...] = ()  # buffers that keep their dtype whatever the module is cast to

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    def widen(self, start: int, stop: int) -> Tensor:
        """Some rows of the weight (r p), float32."""
        raise NotImplementedError

    def blocks(self, rows: int = ROWS) -> Iterator[Tensor]:
        """The weight (r p), float32, so many rows at a time."""
        for start in range(0, self.shape[0], rows):
            yield self.widen(start, min(start + rows, self.shape[0]))

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Some rows (r p) in a dtype; they are in float32 a few at a time only."""
        step = ROWS if self.device.type == "cpu" else ROWS_ELSEWHERE
        if stop - start <= step:
            return self.rounded(self.widen(start, stop)).to(dtype)
        out = torch.empty(stop - start, self.columns, dtype=dtype, device=self.device)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            out[first - start : last - start] = self.rounded(self.widen(first, last))
        return out

    def rounded(self, rows: Tensor) -> Tensor:
        """Rows as a product takes them: what a subclass does to them after widening."""
        return rows

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Stored:
        """Moves and casts go through here: what is stored moves, and stays what it is."""
        before = {name: getattr(self, name) for name in self.kept}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if old is not None and new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


def parameter(bias: Tensor | None) -> nn.Parameter | None:
    """A bias as a layer has it: the very parameter where it is one."""
    if bias is None or isinstance(bias, nn.Parameter):
        return bias
    return nn.Parameter(bias.detach(), requires_grad=False)


class StoredLinear(Stored):
    """A linear layer: (... in) -> (... out), in the dtype of its input."""

    bias: nn.Parameter | None

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def out_features(self) -> int:
        return self.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.rows, self.out_features, self.dtype, self.bias, BLOCK)


class StoredConv2d(Stored):
    """A convolution, with the settings of the one whose weight it keeps."""

    bias: nn.Parameter | None
    how: dict[str, Any]

    @staticmethod
    def settings(given: nn.Conv2d) -> dict[str, Any]:
        assert given.padding_mode == "zeros"
        return {name: getattr(given, name) for name in ("stride", "padding", "dilation", "groups")}

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.float32 if widened(x) else x.dtype
        weight = self.rows(0, self.shape[0], dtype).view(self.shape)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.conv2d(x.to(dtype), weight, bias, **self.how).to(x.dtype)


class StoredEmbedding(Stored):
    """Vectors by number: (...) -> (... width), in the layer's dtype."""

    def lines(self, numbers: Tensor) -> Tensor:
        """Rows by number, (m) -> (m p), float32."""
        raise NotImplementedError

    def forward(self, numbers: Tensor) -> Tensor:
        return self.lines(numbers.flatten()).to(self.dtype).unflatten(0, numbers.shape)
