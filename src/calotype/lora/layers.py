"""What an adapter adds to one weight: the product of small matrices, in the forms that trainers have.

    LowRank     up · down (Hu et al. 2021, LoRA), with a core between them where the layer is a convolution (LoCon)
    Hadamard    (a1 · b1) ∘ (a2 · b2) (Hyeon-Woo et al. 2021, LoHa)
    Kronecker   a ⊗ b (Yeh et al. 2023, LoKr)
    Full        the difference itself

and around any of them a magnitude (Liu et al. 2024, DoRA): the sum of weight and change is brought to given lengths.
"""

# o rows of a weight, what goes out · i what comes in · k l a convolution's kernel · r rank · s strength

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from calotype.checkpoint.files import Shape
from calotype.nn.linear import product, widened

BLOCK = 2**20  # numbers of a weight that are in float32 at a time


@dataclass(frozen=True, kw_only=True)
class Change(ABC):
    """A change of a weight of this shape, as its file has it. `factor` is alpha / rank, 1 where a file has no alpha."""

    shape: Shape
    factor: float

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows of the change, float32 (stop - start, columns)."""

    @abstractmethod
    def to(self, device: torch.device) -> Change:
        """The same on a device."""

    @abstractmethod
    def transposed(self) -> Change:
        """The same for a weight whose two axes are exchanged."""

    def add(self, out: Tensor, start: int, stop: int, strength: float) -> None:
        """Add so many times these rows of the change to `out`, float32 (stop - start, columns)."""
        out.add_(self.rows(start, stop), alpha=strength)

    def act(self, x: Tensor, start: int, stop: int, how: dict[str, Any] | None) -> Tensor:
        """What these rows of the change make of a layer's input, in the input's dtype.

        `how` is a convolution's stride, padding, dilation and groups; None for a linear layer.
        """
        if how is None:

            def some(first: int, last: int, dtype: torch.dtype) -> Tensor:
                return self.rows(start + first, start + last).to(dtype)

            return product(x, some, stop - start, x.dtype, None)
        return convolved(x, self.rows(start, stop).view(-1, *self.shape[1:]), how)


@dataclass(frozen=True, kw_only=True)
class LowRank(Change):
    """up (o r) times down (r i k l), which is flat for a linear layer."""

    up: Tensor
    down: Tensor

    def rows(self, start: int, stop: int) -> Tensor:
        return self.factor * (self.up[start:stop].float() @ self.down.flatten(1).float())

    def to(self, device: torch.device) -> LowRank:
        return replace(self, up=self.up.to(device), down=self.down.to(device))

    def transposed(self) -> LowRank:
        assert self.down.ndim == 2
        return replace(self, shape=self.shape[::-1], up=self.down.t().contiguous(), down=self.up.t().contiguous())

    def add(self, out: Tensor, start: int, stop: int, strength: float) -> None:
        out.addmm_(self.up[start:stop].float(), self.down.flatten(1).float(), alpha=self.factor * strength)

    def act(self, x: Tensor, start: int, stop: int, how: dict[str, Any] | None) -> Tensor:
        up = self.up[start:stop]
        if how is None:
            low = product(x, lambda a, b, dtype: self.down[a:b].to(dtype), len(self.down), x.dtype, None)
            return self.factor * product(low, lambda a, b, dtype: up[a:b].to(dtype), len(up), x.dtype, None)
        low = convolved(x, self.down, how)
        return self.factor * convolved(low, up[:, :, None, None], {})


@dataclass(frozen=True, kw_only=True)
class Hadamard(Change):
    """Two products of small matrices (o r) (r i), multiplied number by number."""

    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]

    def rows(self, start: int, stop: int) -> Tensor:
        (a1, b1), (a2, b2) = self.first, self.second
        one = a1[start:stop].float() @ b1.flatten(1).float()
        return self.factor * one * (a2[start:stop].float() @ b2.flatten(1).float())

    def to(self, device: torch.device) -> Hadamard:
        (a1, b1), (a2, b2) = self.first, self.second
        return replace(self, first=(a1.to(device), b1.to(device)), second=(a2.to(device), b2.to(device)))

    def transposed(self) -> Hadamard:
        (a1, b1), (a2, b2) = self.first, self.second
        return replace(self, shape=self.shape[::-1], first=(b1.t(), a1.t()), second=(b2.t(), a2.t()))


@dataclass(frozen=True, kw_only=True)
class Kronecker(Change):
    """The Kronecker product of `outer` (a b) and `inner` (c d k l): a·c rows, b·d columns and the kernel."""

    outer: Tensor
    inner: Tensor

    def rows(self, start: int, stop: int) -> Tensor:
        height = len(self.inner)
        first, last = start // height, -(-stop // height)
        outer = self.outer[first:last].float()
        # a b, c d k l -> (a c) (b d k l)
        made = torch.einsum("ab,cd...->acbd...", outer, self.inner.float()).reshape(-1, self.columns)
        return self.factor * made[start - first * height : stop - first * height]

    def to(self, device: torch.device) -> Kronecker:
        return replace(self, outer=self.outer.to(device), inner=self.inner.to(device))

    def transposed(self) -> Kronecker:
        return replace(self, shape=self.shape[::-1], outer=self.outer.t(), inner=self.inner.t())


@dataclass(frozen=True, kw_only=True)
class Full(Change):
    """The difference itself."""

    difference: Tensor

    def rows(self, start: int, stop: int) -> Tensor:
        return self.factor * self.difference[start:stop].flatten(1).float()

    def to(self, device: torch.device) -> Full:
        return replace(self, difference=self.difference.to(device))

    def transposed(self) -> Full:
        return replace(self, shape=self.shape[::-1], difference=self.difference.t())


@dataclass(frozen=True, kw_only=True)
class Decomposed(Change):
    """DoRA: weight and change together, each row (or each input's column) brought to the length in `magnitude`.

    `magnitude` is (o 1) or (1 i). Strength s leads s of the way from the weight to that: all trainers and peers agree
    at 1, where files are meant to be used. Needs the weight that it changes: `rows` and `add` are `inner`'s alone.
    """

    inner: Change
    magnitude: Tensor

    @property
    def by_row(self) -> bool:
        return self.magnitude.shape[1] == 1

    def rows(self, start: int, stop: int) -> Tensor:
        return self.inner.rows(start, stop)

    def to(self, device: torch.device) -> Decomposed:
        return replace(self, inner=self.inner.to(device), magnitude=self.magnitude.to(device))

    def transposed(self) -> Decomposed:
        return replace(self, shape=self.shape[::-1], inner=self.inner.transposed(), magnitude=self.magnitude.t())

    def lengths(self, weight: Tensor) -> Tensor:
        """By what rows (o 1) or inputs (1 i) are multiplied, for the whole weight that is changed, float32 (o ...)."""
        whole = weight.flatten(1).float() + self.inner.rows(0, self.shape[0])
        if self.by_row:
            norm = whole.norm(dim=1, keepdim=True)
        else:
            norm = whole.view(self.shape[0], self.shape[1], -1).norm(dim=(0, 2)).unsqueeze(0)
        # A row of zeros has no direction: it stays what it is.
        return torch.where(norm > 0, self.magnitude.float() / norm.clamp_min(torch.finfo(torch.float32).tiny), 1.0)

    def difference(self, weight: Tensor) -> Tensor:
        """The change that this is of a whole weight, float32 (o columns)."""
        flat = weight.flatten(1).float()
        by = self.lengths(weight)
        if not self.by_row:
            by = by.repeat_interleave(self.columns // self.shape[1], dim=1)
        return (flat + self.inner.rows(0, self.shape[0])) * by - flat


def convolved(x: Tensor, weight: Tensor, how: dict[str, Any]) -> Tensor:
    """A convolution in the dtype of what comes in, or in float32 where the processor is quicker there."""
    dtype = torch.float32 if widened(x) else x.dtype
    return F.conv2d(x.to(dtype), weight.to(dtype), None, **how).to(x.dtype)


@dataclass(frozen=True)
class Placed:
    """Rows of a change and where they go: `height` rows at `theirs` of it lie at `ours` in a network's own weight."""

    change: Change
    theirs: int
    ours: int
    height: int


def merged(weight: Tensor, parts: Sequence[tuple[Placed, float]]) -> Tensor:
    """A weight with so many times these changes, in its own dtype: computed in float32 and rounded once."""
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    flat, made = weight.detach().flatten(1), out.flatten(1)
    dense = [_dense(flat, placed) for placed, _ in parts]
    height = max(BLOCK // flat.shape[1], 1)
    # One for all of them: memory that is new costs more than the sums.
    buffer = torch.empty(min(height, len(flat)), flat.shape[1], dtype=torch.float32, device=weight.device)
    for start in range(0, len(flat), height):
        stop = min(start + height, len(flat))
        block = buffer[: stop - start].copy_(flat[start:stop])
        for (placed, strength), difference in zip(parts, dense, strict=True):
            first, last = max(start, placed.ours), min(stop, placed.ours + placed.height)
            if first >= last:
                continue
            rows, offset = block[first - start : last - start], placed.theirs - placed.ours
            if difference is None:
                placed.change.add(rows, first + offset, last + offset, strength)
            else:
                rows.add_(difference[first - placed.ours : last - placed.ours], alpha=strength)
        made[start:stop] = block
    return out


def _dense(weight: Tensor, placed: Placed) -> Tensor | None:
    """What a change that depends on the weight is of it: rows `ours`; None for others."""
    change = placed.change
    if not isinstance(change, Decomposed):
        return None
    if placed.height == change.shape[0]:
        return change.difference(weight[placed.ours : placed.ours + placed.height])
    assert change.by_row
    # Rows elsewhere count nothing for these.
    whole = torch.zeros(change.shape[0], weight.shape[1], device=weight.device)
    whole[placed.theirs : placed.theirs + placed.height] = weight[placed.ours : placed.ours + placed.height]
    return change.difference(whole)[placed.theirs : placed.theirs + placed.height]
