"""What the bytes of stored weights mean: block formats of GGUF files, float8, plain types, each widened to float32.

A weight is a row of blocks: so many weights in so many bytes. The block formats are those of ggml, as its sources and
the package gguf define them (https://github.com/ggml-org/ggml, ggml-quants.c); every step is taken in the same order
as there, so that results are equal bit for bit. Written as passes over whole tensors: these are bound by memory, and
what a pass touches should lie in a CPU's cache (`calotype.nn.packed` sees to that).
"""

# n blocks · d scale of a block

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SUPER = 256  # weights in a block of the K formats


class Format(NamedTuple):
    """Blocks of `weights` weights in `bytes` bytes; `widen` makes (n weights), float32, of (n bytes), uint8."""

    weights: int
    bytes: int
    widen: Callable[[Tensor], Tensor]


def _halves(blocks: Tensor) -> Tensor:
    """Two bytes a block -> a float16 number a block, as float32 (n 1)."""
    return blocks.contiguous().view(torch.float16).float()


def _signed(blocks: Tensor) -> Tensor:
    return blocks.view(torch.int8)


def _nibbles(packed: Tensor, width: int) -> Tensor:
    """The low four bits of `width` bytes, then the high ones: (n b) -> (n b/width 2 width), float32."""
    x = packed.unflatten(1, (-1, width))
    out = torch.empty(x.shape[0], x.shape[1], 2, width, device=packed.device)
    out[:, :, 0] = x & 15
    out[:, :, 1] = x >> 4
    return out


def _bits(packed: Tensor) -> Tensor:
    """Every bit of some bytes, the lowest first: (n b) -> (n 8b), 0 or 1, uint8."""
    out = torch.empty(*packed.shape, 8, dtype=torch.uint8, device=packed.device)
    for bit in range(8):
        out[:, :, bit] = (packed >> bit) & 1
    return out.flatten(1)


def _q8_0(blocks: Tensor) -> Tensor:
    return _signed(blocks[:, 2:]).float().mul_(_halves(blocks[:, :2]))


def _q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 2:], 16).flatten(1).sub_(8).mul_(_halves(blocks[:, :2]))


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:], 16).flatten(1).mul_(_halves(blocks[:, :2])).add_(_halves(blocks[:, 2:4]))


def _q5_0(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, 6:], 16).flatten(1)
    return low.add_(_bits(blocks[:, 2:6]), alpha=16).sub_(16).mul_(_halves(blocks[:, :2]))


def _q5_1(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, 8:], 16).flatten(1)
    return low.add_(_bits(blocks[:, 4:8]), alpha=16).mul_(_halves(blocks[:, :2])).add_(_halves(blocks[:, 2:4]))


def _pairs(packed: Tensor) -> Tensor:
    """Two bits at a time of 32 bytes, the lowest first: (n 32 b) -> (n b 4 32), uint8."""
    x = packed.unflatten(1, (-1, 32))
    out = torch.empty(x.shape[0], x.shape[1], 4, 32, dtype=torch.uint8, device=packed.device)
    for place in range(4):
        out[:, :, place] = (x >> (2 * place)) & 3
    return out


def _q2_k(blocks: Tensor) -> Tensor:
    scales, d, least = blocks[:, :16], _halves(blocks[:, 80:82]), _halves(blocks[:, 82:84])
    x = _pairs(blocks[:, 16:80]).view(-1, 16, 16).float()
    x.mul_((d * (scales & 15).float())[..., None]).sub_((least * (scales >> 4).float())[..., None])
    return x.flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    mask, scales = blocks[:, :32], blocks[:, 96:108]
    # Sixteen scales of six bits: the low four in eight bytes, the high two in four.
    low = torch.cat([scales[:, :8] & 15, scales[:, :8] >> 4], dim=1)
    high = torch.cat([(scales[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1)
    d = _halves(blocks[:, 108:110]) * ((low | (high << 4)).float() - 32)
    x = _pairs(blocks[:, 32:96]).view(-1, 8, 32).float()
    # A weight is 4 less where its bit is not set.
    for place in range(8):
        x[:, place].sub_(((mask >> place) & 1 ^ 1), alpha=4)
    return x.view(-1, 16, 16).mul_(d[..., None]).flatten(1)


def _scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Twelve bytes a block -> eight scales and eight lowest values, six bits each, float32 (n 8)."""
    d, m, both = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = torch.cat([d & 63, (both & 15) | ((d >> 2) & 48)], dim=1)
    least = torch.cat([m & 63, (both >> 4) | ((m >> 2) & 48)], dim=1)
    return scale.float(), least.float()


def _with_scales(x: Tensor, blocks: Tensor) -> Tensor:
    """(n 8 32) integers with what a block of Q4_K or Q5_K begins with: scale, lowest value, and parts of both."""
    scale, least = _scales(blocks[:, 4:16])
    scale *= _halves(blocks[:, :2])
    least *= _halves(blocks[:, 2:4])
    return x.mul_(scale[..., None]).sub_(least[..., None]).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    return _with_scales(_nibbles(blocks[:, 16:], 32).view(-1, 8, 32), blocks)


def _q5_k(blocks: Tensor) -> Tensor:
    x, high = _nibbles(blocks[:, 48:], 32).view(-1, 8, 32), blocks[:, 16:48]
    for place in range(8):
        x[:, place].add_((high >> place) & 1, alpha=16)
    return _with_scales(x, blocks)


def _q6_k(blocks: Tensor) -> Tensor:
    x = _nibbles(blocks[:, :128], 64).view(-1, 8, 32)
    x.add_(_pairs(blocks[:, 128:192]).view(-1, 8, 32), alpha=16).sub_(32)
    scale = _signed(blocks[:, 192:208]).float().mul_(_halves(blocks[:, 208:]))
    return x.view(-1, 16, 16).mul_(scale[..., None]).flatten(1)


LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # of the formats IQ4


def _levels(packed: Tensor, width: int) -> Tensor:
    numbers = _nibbles(packed, width).flatten(1).int()
    return torch.tensor(LEVELS, dtype=torch.float32, device=packed.device)[numbers]


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _levels(blocks[:, 2:], 16).mul_(_halves(blocks[:, :2]))


def _iq4_xs(blocks: Tensor) -> Tensor:
    high, low = blocks[:, 2:4], blocks[:, 4:8]
    low = torch.stack([low & 15, low >> 4], dim=2).flatten(1)
    high = torch.stack([(high >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2).flatten(1)
    scale = _halves(blocks[:, :2]) * ((low | (high << 4)).float() - 32)
    return _levels(blocks[:, 8:], 16).view(-1, 8, 32).mul_(scale[..., None]).flatten(1)


def _e4m3(blocks: Tensor) -> Tensor:
    """float8 with four bits of exponent; torch's own conversion takes fifty times as long on a CPU.

    The seven bits of a magnitude are put where float32 has the end of its exponent and the beginning of its mantissa.
    That is the number, but for the smallest ones, which have no leading one: f is to become 2f - 2**-6 there, which is
    less than f exactly for these. Magnitudes are negative on the way, so that the code for "not a number", which comes
    out as -480, is on the far side of a threshold.
    """
    if blocks.device.type != "cpu":
        return blocks.view(torch.float8_e4m3fn).float()
    signed = _signed(blocks)
    exponent = torch.tensor((120 << 23) - 2**31, dtype=torch.int32)
    x = torch.add(exponent, (signed & 127).int(), alpha=1 << 20).view(torch.float32)
    x = torch.maximum(x, torch.add(torch.tensor(2.0**-6), x, alpha=2))
    x = F.threshold(x, -480.0, torch.nan).abs_()
    return x.view(torch.int32).bitwise_or_(signed.int().bitwise_and_(-(2**31))).view(torch.float32)


def _plain(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def widen(blocks: Tensor) -> Tensor:
        return blocks.contiguous().view(dtype).float()

    return widen


FORMATS: dict[str, Format] = {
    "F32": Format(1, 4, _plain(torch.float32)),
    "F16": Format(1, 2, _plain(torch.float16)),
    "BF16": Format(1, 2, _plain(torch.bfloat16)),
    "F8_E4M3": Format(1, 1, _e4m3),
    "F8_E5M2": Format(1, 1, _plain(torch.float8_e5m2)),
    "Q4_0": Format(32, 18, _q4_0),
    "Q4_1": Format(32, 20, _q4_1),
    "Q5_0": Format(32, 22, _q5_0),
    "Q5_1": Format(32, 24, _q5_1),
    "Q8_0": Format(32, 34, _q8_0),
    "Q2_K": Format(SUPER, 84, _q2_k),
    "Q3_K": Format(SUPER, 110, _q3_k),
    "Q4_K": Format(SUPER, 144, _q4_k),
    "Q5_K": Format(SUPER, 176, _q5_k),
    "Q6_K": Format(SUPER, 210, _q6_k),
    "IQ4_NL": Format(32, 18, _iq4_nl),
    "IQ4_XS": Format(SUPER, 136, _iq4_xs),
}
