"""BERT (Devlin et al. 2018) as a text encoder: Hunyuan-DiT's bilingual CLIP, of RoBERTa-wwm-ext-large's shape."""

# b batch · n tokens · d width · h heads

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.nn.attention import attention, split_heads
from calotype.nn.linear import Linear

EPSILON = 1e-12


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """`kinds` is the number of token types; a prompt's tokens are all of type 0."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    positions: int
    kinds: int


HUNYUAN_CLIP = BertConfig(
    vocabulary=47020,
    width=1024,
    layers=24,
    heads=16,
    mlp_width=4096,
    positions=512,
    kinds=2,
)


class Layer(nn.Module):
    """Norms come after the sums here, as in the first transformers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = Linear(config.width, config.width)
        self.k = Linear(config.width, config.width)
        self.v = Linear(config.width, config.width)
        self.attention_out = Linear(config.width, config.width)
        self.attention_norm = nn.LayerNorm(config.width, EPSILON)
        self.mlp_in = Linear(config.width, config.mlp_width)
        self.mlp_out = Linear(config.mlp_width, config.width)
        self.mlp_norm = nn.LayerNorm(config.width, EPSILON)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (split_heads(project(x), self.heads) for project in (self.q, self.k, self.v))
        x = self.attention_norm(x + self.attention_out(attention(q, k, v, bias=bias)))
        return self.mlp_norm(x + self.mlp_out(F.gelu(self.mlp_in(x))))


class BertEncoder(nn.Module):
    """Token ids (b n) int64, n at most `positions`, and a mask (b n), true where there is a token -> states (b n d).

    Nothing attends to padding; padding has states too, which Hunyuan-DiT replaces by learned ones.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.positions, config.width)
        self.kinds = nn.Embedding(config.kinds, config.width)
        self.norm_in = nn.LayerNorm(config.width, EPSILON)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    @property
    def device(self) -> torch.device:
        """Where it computes: large weights may be elsewhere meanwhile, norms are not."""
        return self.norm_in.weight.device

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm_in(self.tokens(ids) + self.kinds(torch.zeros_like(places)) + self.positions(places))
        bias = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(~mask, -torch.inf)[:, None, None]
        for layer in self.layers:
            x = layer(x, bias)
        return x
