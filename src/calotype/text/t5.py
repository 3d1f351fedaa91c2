"""The T5 1.1 encoder (Raffel et al. 2020; gated GELU as in Shazeer 2020)."""

# b batch · n tokens · d width · h heads

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from calotype.nn.attention import attention, split_heads
from calotype.nn.linear import Linear
from calotype.nn.norms import RMSNorm


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """`head_width` times `heads` need not be `width`; `buckets` and `distance` shape the relative position bias."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    head_width: int
    mlp_width: int
    buckets: int
    distance: int


XXL = T5Config(
    vocabulary=32128,
    width=4096,
    layers=24,
    heads=64,
    head_width=64,
    mlp_width=10240,
    buckets=32,
    distance=128,
)


MT5_XL = T5Config(  # Hunyuan-DiT's: 101 languages (Xue et al. 2020)
    vocabulary=250112,
    width=2048,
    layers=24,
    heads=32,
    head_width=64,
    mlp_width=5120,
    buckets=32,
    distance=128,
)


def position_buckets(length: int, buckets: int, distance: int) -> Tensor:
    """Bucket of each (query, key) pair, (n n): half for keys behind, half ahead; exact near by, logarithmic far off."""
    position = torch.arange(length)
    offset = position[None, :] - position[:, None]
    half = buckets // 2
    exact = half // 2
    near = offset.abs()
    far = exact + (torch.log(near.clamp(min=1).float() / exact) / math.log(distance / exact) * (half - exact)).long()
    return torch.where(offset > 0, half, 0) + torch.where(near < exact, near, far.clamp(max=half - 1))


class Layer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        inner = config.heads * config.head_width
        self.heads = config.heads
        self.attention_norm = RMSNorm(config.width)
        self.q = Linear(config.width, inner, bias=False)
        self.k = Linear(config.width, inner, bias=False)
        self.v = Linear(config.width, inner, bias=False)
        self.attention_out = Linear(inner, config.width, bias=False)
        self.mlp_norm = RMSNorm(config.width)
        self.mlp_gate = Linear(config.width, config.mlp_width, bias=False)
        self.mlp_in = Linear(config.width, config.mlp_width, bias=False)
        self.mlp_out = Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        y = self.attention_norm(x)
        q, k, v = (split_heads(project(y), self.heads) for project in (self.q, self.k, self.v))
        # T5 folds 1/sqrt(d) into its initialisation.
        x = x + self.attention_out(attention(q, k, v, bias=bias, scale=1.0))
        y = self.mlp_norm(x)
        y = F.gelu(self.mlp_gate(y), approximate="tanh") * self.mlp_in(y)
        if y.dtype == torch.float16:
            # The widest activations of T5-XXL overflow float16: this product is taken in float32.
            return _finite(x + self.mlp_out(y.float()).to(y.dtype))
        return x + self.mlp_out(y)


def _finite(x: Tensor) -> Tensor:
    limit = torch.finfo(x.dtype).max - 1000
    return x.clamp(-limit, limit)


class T5Encoder(nn.Module):
    """Token ids (b n) -> states after the final norm (b n d).

    All tokens attend to all, padding too, as FLUX.1 was trained; with a mask (b n), true where there is a token, none
    attends to padding, as Hunyuan-DiT was.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.position_bias = nn.Embedding(config.buckets, config.heads)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm_out = RMSNorm(config.width)

    @property
    def device(self) -> torch.device:
        """Where it computes: large weights may be elsewhere meanwhile, norms are not."""
        return self.norm_out.weight.device

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        buckets = position_buckets(ids.shape[1], self.config.buckets, self.config.distance).to(ids.device)
        bias = rearrange(self.position_bias(buckets), "n m h -> 1 h n m")
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None], -torch.inf)
        x = self.tokens(ids)
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm_out(x)
