"""ChatGLM3 (GLM team 2024) as Kolors' text encoder: a decoder-only language model, read two layers from its end."""

# b batch · n tokens · d width · h heads · g groups of key and value heads · c channels of a head

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from calotype.nn.attention import attention, split_heads
from calotype.nn.linear import Linear
from calotype.nn.norms import RMSNorm
from calotype.nn.rope import rope_table, rotate

EPSILON = 1e-5
THETA = 10_000.0


@dataclass(frozen=True, kw_only=True)
class ChatGlmConfig:
    """`heads` query heads share `groups` heads of keys and values, all `head_width` wide."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    groups: int
    head_width: int
    mlp_width: int


CHATGLM3_6B = ChatGlmConfig(
    vocabulary=65024,
    width=4096,
    layers=28,
    heads=32,
    groups=2,
    head_width=128,
    mlp_width=13696,
)


class GlmStates(NamedTuple):
    """What Kolors takes from ChatGLM3; neither passes the final norm, which is therefore not part of the encoder."""

    penultimate: Tensor  # b n d, the input of the last layer, of padding too
    pooled: Tensor  # b d, the output of the last layer at the last token


class Layer(nn.Module):
    def __init__(self, config: ChatGlmConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_width
        shared = config.groups * config.head_width
        self.heads = config.heads
        self.groups = config.groups
        self.rows = (inner, shared, shared)
        self.attention_norm = RMSNorm(config.width, EPSILON)
        self.qkv = Linear(config.width, sum(self.rows))
        self.attention_out = Linear(inner, config.width, bias=False)
        self.mlp_norm = RMSNorm(config.width, EPSILON)
        self.mlp_in = Linear(config.width, 2 * config.mlp_width, bias=False)
        self.mlp_out = Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor, rope: Tensor, bias: Tensor, *, only_last: bool = False) -> Tensor:
        """x (b n d) -> (b n d), or (b 1 d) where only the last token's state is wanted."""
        q, k, v = self.qkv(self.attention_norm(x)).split(self.rows, dim=-1)
        q = _rotated(split_heads(q, self.heads), rope)
        k = _rotated(split_heads(k, self.groups), rope)
        v = split_heads(v, self.groups)
        if only_last:
            x, q, bias = x[:, -1:], q[:, :, -1:], bias[:, :, -1:]
        k, v = (repeat(y, "b g n c -> b (g r) n c", r=self.heads // self.groups) for y in (k, v))
        x = x + self.attention_out(attention(q, k, v, bias=bias))
        gate, value = self.mlp_in(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.mlp_out(F.silu(gate) * value)


def _rotated(x: Tensor, rope: Tensor) -> Tensor:
    """GLM's rotary embedding: of the first half of a head's channels, in adjacent pairs."""
    turned, still = x.chunk(2, dim=-1)
    return torch.cat([rotate(turned, rope), still], dim=-1)


class ChatGlmEncoder(nn.Module):
    """ids and positions (b n) int64, mask (b n) bool, true where there is a token -> GlmStates.

    Prompts are padded on the left. Tokens attend to the tokens up to themselves. Padding attends to everything, before
    and behind it: so ChatGLM's mask has it, and Kolors' UNet reads the padding's states like any others.
    """

    def __init__(self, config: ChatGlmConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    @property
    def device(self) -> torch.device:
        """Where it computes: large weights may be elsewhere meanwhile, norms are not."""
        first = self.layers[0]
        assert isinstance(first, Layer)
        return first.attention_norm.weight.device

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor) -> GlmStates:
        x = self.tokens(ids)
        rope = rope_table(positions.reshape(-1, 1), (self.config.head_width // 2,), THETA)
        rope = rearrange(rope, "two (b n) c -> two b 1 n c", b=len(ids))
        bias = attention_bias(mask).to(x.dtype)
        *first, last = self.layers
        for layer in first:
            x = layer(x, rope, bias)
        return GlmStates(x, last(x, rope, bias, only_last=True)[:, 0])


def attention_bias(mask: Tensor) -> Tensor:
    """mask (b n) -> what is added to the logits of query n and key m, float32 (b 1 n m): 0 where it may look."""
    causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
    allowed = (causal & mask[:, None, :]) | ~mask[:, :, None]
    return torch.zeros(allowed.shape, device=mask.device).masked_fill(~allowed, -torch.inf)[:, None]
