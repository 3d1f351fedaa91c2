"""Convolutions and group norms of tensors too large to be held several times: a few rows at a time.

A strip is some whole rows of a picture; strips come from the top down and each row once. A convolution keeps the two
rows that the next strip needs, so that no row of any layer is computed twice on a way through; what a group norm has
to know of all rows is gathered while the layer before is written.
"""

# b batch · c channels · h height · w width

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from calotype.nn.linear import widened

WHOLE = 2**17  # pixels of pictures that a CPU still takes in one piece: beyond, strips are no slower there, and smaller
WHOLE_ELSEWHERE = 2**20  # where small operations cost more than on a CPU
STRIP = 2**22  # numbers in a strip: it stays in a large cache, and allocators keep such a size for the next one

Strips = Iterator[Tensor]
"""Consecutive rows of a tensor b c h w, from the top."""


class Kernel(NamedTuple):
    """A convolution's weights, in what it computes in."""

    weight: Tensor
    bias: Tensor | None


class Affine(NamedTuple):
    """A group norm whose statistics are known: x * scale + shift, each b c 1 1 in float32."""

    scale: Tensor
    shift: Tensor


def in_strips(network: nn.Module, x: Tensor, factor: int) -> bool:
    """Whether a tensor is better taken in strips, `factor` squared pixels for each of its own.

    Never where gradients are wanted: what they need is not held.
    """
    if x.shape[0] * x.shape[2] * x.shape[3] * factor**2 <= (WHOLE if x.device.type == "cpu" else WHOLE_ELSEWHERE):
        return False
    wanted = x.requires_grad or any(weight.requires_grad for weight in network.parameters())
    return not (torch.is_grad_enabled() and wanted)


def lent(layer: nn.Conv2d | nn.GroupNorm) -> Kernel:
    """A copy of a layer's weights, taken while it is called: layers that come and go hold theirs only then.

    On a CPU without half-precision arithmetic they are widened.
    """
    taken: list[Kernel] = []

    def take(*_: object) -> tuple[Tensor]:
        weight, bias = layer.weight.detach(), layer.bias
        dtype = torch.float32 if widened(weight) else weight.dtype
        taken.append(Kernel(weight.to(dtype, copy=True), None if bias is None else bias.detach().to(dtype, copy=True)))
        channels = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.num_channels
        return (weight.new_empty(0, channels, 3, 3),)  # nothing is computed

    hook = layer.register_forward_pre_hook(take)  # after those that bring the weights
    try:
        layer(torch.empty(0))
    finally:
        hook.remove()
    return taken[0]


class Moments:
    """Mean and variance of groups of channels, gathered strip by strip and joined as Chan et al. (1979) do."""

    def __init__(self, groups: int) -> None:
        self.groups = groups
        self._count = 0
        self._mean = self._square = torch.empty(0)  # b g; square is the sum of squared distances from the mean

    def add(self, strip: Tensor) -> None:
        b, c, h, w = strip.shape
        # The norm itself gathers them without cancellation, and faster than torch.var_mean.
        whole = strip.float().contiguous()
        _, mean, inverse = torch.native_group_norm(whole, None, None, b, c, h * w, self.groups, 0.0)
        exact = torch.float32 if strip.device.type == "mps" else torch.float64
        here = h * w * (c // self.groups)
        mean = mean.to(exact)
        square = here / inverse.to(exact) ** 2
        if not self._count:
            self._count, self._mean, self._square = here, mean, square
            return
        # In place: small tensors that stay would lie between the large ones that go.
        apart = mean - self._mean
        both = self._count + here
        self._square += square + apart**2 * (self._count * here / both)
        self._mean += apart * (here / both)
        self._count = both

    def affine(self, norm: nn.GroupNorm) -> Affine:
        """What the norm does to a tensor of these moments."""
        assert norm.num_groups == self.groups
        weight, bias = lent(norm)
        assert bias is not None
        mean = self._mean
        inverse = (self._square / self._count + norm.eps).rsqrt()
        each = norm.num_channels // self.groups
        scale = inverse.repeat_interleave(each, dim=1) * weight  # b c
        shift = bias - mean.repeat_interleave(each, dim=1) * scale
        return Affine(*(value[:, :, None, None].float() for value in (scale, shift)))


def rows_of(x: Tensor, channels: int) -> int:
    """Rows of a strip of a tensor like x with so many channels; even."""
    return max(STRIP // (x.shape[0] * channels * x.shape[3]) // 2 * 2, 2)


def strips_of(x: Tensor, rows: int) -> Strips:
    """The first has one row more: a convolution's strips then end at multiples of `rows`."""
    height = x.shape[2]
    start = 0
    while start < height:
        stop = min(start + rows + (start == 0), height)
        yield x[:, :, start:stop]
        start = stop


def convolved(strips: Strips, kernel: Kernel, height: int, before: Affine | None = None) -> Strips:
    """A 3x3 convolution, padded by one; of silu of the norm `before` where there is one.

    The strips that it gives end one row above those that it takes, the last one aside. So they may be written over the
    tensor that the others are read from.
    """
    above: Tensor | None = None
    seen = 0
    for strip in strips:
        b, c, rows, w = strip.shape
        seen += rows
        top = 1 if above is None else 2
        last = int(seen == height)
        padded = torch.empty(b, c, top + rows + last, w, dtype=kernel.weight.dtype, device=strip.device)
        if above is None:
            padded[:, :, :top] = 0
        else:
            padded[:, :, :top] = above
        inside = padded[:, :, top : top + rows]
        if before is None:
            inside.copy_(strip)
        else:
            torch.addcmul(before.shift, strip, before.scale, out=inside)
            F.silu(inside, inplace=True)
        if last:
            padded[:, :, -1:] = 0
        above = padded[:, :, -2:].clone()
        if padded.shape[2] > 2:
            made = F.conv2d(padded, kernel.weight, kernel.bias, padding=(0, 1))
            del padded, inside
            yield made
    assert seen == height


class Computed(ABC):
    """What a 3x3 convolution, padded by one, makes of a smaller tensor: computed where it is read, and never held."""

    def __init__(self, of: Tensor, kernel: Kernel) -> None:
        self.of = of
        self.kernel = kernel
        self.channels = kernel.weight.shape[0]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]: ...

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Some of its rows; both numbers are even, or the end."""

    def then(self, last: Kernel) -> Computed:
        """What a 1x1 convolution makes of this, as one with this."""
        across = last.weight[:, :, 0, 0]
        weight = einsum(across, self.kernel.weight, "o m, m c h w -> o c h w")
        biases = (None if self.kernel.bias is None else across @ self.kernel.bias), last.bias
        known = [bias for bias in biases if bias is not None]
        return type(self)(self.of, Kernel(weight, sum(known[1:], known[0]) if known else None))

    def strips(self, rows: int) -> Strips:
        for start in range(0, self.shape[2], rows):
            yield self.rows(start, min(start + rows, self.shape[2]))

    def moments(self, groups: int, rows: int) -> Moments:
        known = Moments(groups)
        for strip in self.strips(rows):
            known.add(strip)
        return known

    def _padded(self, start: int, stop: int) -> Tensor:
        """Rows of the smaller tensor with one more on each side."""
        above, below = int(start > 0), int(stop < self.of.shape[2])
        read = self.of[:, :, start - above : stop + below].to(self.kernel.weight.dtype)
        return F.pad(read, (1, 1, 1 - above, 1 - below))


class Convolved(Computed):
    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.of.shape[0], self.channels, self.of.shape[2], self.of.shape[3]

    def rows(self, start: int, stop: int) -> Tensor:
        return F.conv2d(self._padded(start, stop), self.kernel.weight, self.kernel.bias)


class Upsampled(Computed):
    """Of twice the size, each pixel repeated before the convolution.

    Of the nine pixels under a kernel at most four differ, so each of the four pixels that come of one is a 2x2
    convolution of the small tensor: 4/9 of the products.
    """

    def __init__(self, of: Tensor, kernel: Kernel) -> None:
        super().__init__(of, kernel)
        weight = kernel.weight
        self._kernels = [[_folded(_folded(weight, 2, y), 3, x).contiguous() for x in (0, 1)] for y in (0, 1)]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.of.shape[0], self.channels, 2 * self.of.shape[2], 2 * self.of.shape[3]

    def rows(self, start: int, stop: int) -> Tensor:
        b, c, _, w = self.shape
        pixels = self._pixels(start, stop)
        made: Tensor | None = None
        for y in (0, 1):
            pair = next(pixels), next(pixels)
            if made is None:
                made = pair[0].new_empty(b, c, (stop - start) // 2, 2, w // 2, 2)
            torch.stack(pair, dim=-1, out=made[:, :, :, y])
        assert made is not None
        return rearrange(made, "b c h two w too -> b c (h two) (w too)")

    def moments(self, groups: int, rows: int) -> Moments:
        known = Moments(groups)
        for start in range(0, self.shape[2], rows):
            for pixels in self._pixels(start, min(start + rows, self.shape[2])):
                known.add(pixels)
        return known

    def _pixels(self, start: int, stop: int) -> Iterator[Tensor]:
        """Of each four pixels in these rows the first, second, third and fourth ones."""
        padded = self._padded(start // 2, stop // 2)
        rows, width = (stop - start) // 2 + 1, self.of.shape[3] + 1
        for y in (0, 1):
            for x in (0, 1):
                yield F.conv2d(padded[:, :, y : y + rows, x : x + width], self._kernels[y][x], self.kernel.bias)


def _folded(weight: Tensor, axis: int, second: int) -> Tensor:
    """A kernel of three along an axis over pixels that are each there twice, as one of two over the pixels.

    Under the first of a pair are the pixel before and itself twice; under the second itself twice and the next.
    """
    first, middle, last = weight.unbind(axis)
    return torch.stack((first + middle, last) if second else (first, middle + last), axis)


def halved(x: Tensor, kernel: Kernel, rows: int) -> Strips:
    """A 3x3 convolution with stride 2, padded on the right and below only."""
    height = x.shape[2] // 2
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        read = x[:, :, 2 * start : 2 * stop + 1].to(kernel.weight.dtype)
        missing = 2 * (stop - start) + 1 - read.shape[2]
        yield F.conv2d(F.pad(read, (0, 1, 0, missing)), kernel.weight, kernel.bias, stride=2)


def written(out: Tensor, strips: Strips, groups: int | None = None) -> Moments:
    """Writes strips into a tensor; their moments, where groups are given."""
    known = Moments(groups or 1)
    start = 0
    for strip in strips:
        out[:, :, start : start + strip.shape[2]] = strip
        start += strip.shape[2]
        if groups is not None:
            known.add(strip)
    assert start == out.shape[2]
    return known


def plus(strips: Strips, other: Callable[[int, int], Tensor]) -> Strips:
    """Strips with the same rows of something else added."""
    start = 0
    for strip in strips:
        strip += other(start, start + strip.shape[2])
        start += strip.shape[2]
        yield strip


def moments_of(x: Tensor, groups: int) -> Moments:
    known = Moments(groups)
    for strip in strips_of(x, rows_of(x, x.shape[1])):
        known.add(strip)
    return known


def relu(strips: Strips) -> Strips:
    return (F.relu(strip, inplace=True) for strip in strips)


def enlarged(strips: Strips, factor: float) -> Strips:
    """Each pixel repeated."""
    return (F.interpolate(strip, scale_factor=factor, mode="nearest") for strip in strips)


def strided(strips: Strips, kernel: Kernel, height: int) -> Strips:
    """A 3x3 convolution with stride 2, padded by one on all sides."""
    above: Tensor | None = None
    seen = 0
    for strip in strips:
        strip = strip.to(kernel.weight.dtype)
        seen += strip.shape[2]
        rows = F.pad(strip, (0, 0, 1, 0)) if above is None else torch.cat((above, strip), dim=2)
        if seen == height:
            rows = F.pad(rows, (0, 0, 0, 1))
        made = (rows.shape[2] - 1) // 2
        above = rows[:, :, 2 * made :].clone()
        if made:
            yield F.conv2d(rows[:, :, : 2 * made + 1], kernel.weight, kernel.bias, stride=2, padding=(0, 1))


class Kept:
    """Strips that pass through, kept until they are taken again in strips of other heights."""

    def __init__(self, strips: Strips) -> None:
        self._strips = strips
        self._kept: list[Tensor] = []

    def passing(self) -> Strips:
        for strip in self._strips:
            self._kept.append(strip)
            yield strip

    def take(self, start: int, stop: int) -> Tensor:
        """The next rows, which must have passed."""
        taken: list[Tensor] = []
        missing = stop - start
        while missing:
            first = self._kept[0]
            taken.append(first[:, :, :missing])
            if first.shape[2] > missing:
                self._kept[0] = first[:, :, missing:]
            else:
                self._kept.pop(0)
            missing -= taken[-1].shape[2]
        return taken[0] if len(taken) == 1 else torch.cat(taken, dim=2)
