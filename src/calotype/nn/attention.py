"""Attention: one function for every network."""

# b batch · h heads · n queries · m keys · d width of a head

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention with the heads merged back: q (b h n d), k and v (b h m d) -> (b n h*d).

    `bias` is added to the logits (broadcast to b h n m); `scale` multiplies them, 1/sqrt(d) unless given.
    """
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale)
    return rearrange(mixed, "b h n d -> b n (h d)")


def in_rows(x: Tensor, rows: int) -> Tensor:
    """(b ...) -> (rows ...), a multiple of b: each row, then itself again, as often as it takes."""
    if len(x) == 1:
        return x.expand(rows, *x.shape[1:])
    return x if len(x) == rows else x.repeat_interleave(rows // len(x), dim=0)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(b n h*d) -> (b h n d)."""
    return rearrange(x, "b n (h d) -> b h n d", h=heads)
