"""CLIP's text encoder (Radford et al. 2021), from ViT-L to OpenCLIP's bigG."""

# b batch · n tokens · d width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.nn.attention import attention, split_heads
from calotype.nn.linear import Linear


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """`quick_gelu`: x * sigmoid(1.702 x), OpenAI's activation, instead of the exact one.

    `projection` is the width of the projection of the pooled state, None where there is none; `end` is the id of the
    end-of-text token, whose state is the pooled one.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    positions: int
    quick_gelu: bool
    projection: int | None
    end: int


VIT_L = ClipConfig(
    vocabulary=49408,
    width=768,
    layers=12,
    heads=12,
    mlp_width=3072,
    positions=77,
    quick_gelu=True,
    projection=None,
    end=49407,
)

BIG_G = ClipConfig(
    vocabulary=49408,
    width=1280,
    layers=32,
    heads=20,
    mlp_width=5120,
    positions=77,
    quick_gelu=False,
    projection=1280,
    end=49407,
)


class ClipStates(NamedTuple):
    """What families take from CLIP."""

    hidden: tuple[Tensor, ...]  # the input of each layer, then the output of the last: layers + 1 of b n d, not normed
    last: Tensor  # b n d, the last output after the final norm
    pooled: Tensor  # b d, `last` at the first end token, projected where there is a projection


class Layer(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.quick_gelu = config.quick_gelu
        self.attention_norm = nn.LayerNorm(config.width)
        self.q = Linear(config.width, config.width)
        self.k = Linear(config.width, config.width)
        self.v = Linear(config.width, config.width)
        self.attention_out = Linear(config.width, config.width)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp_in = Linear(config.width, config.mlp_width)
        self.mlp_out = Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention_norm(x)
        q, k, v = (split_heads(project(y), self.heads) for project in (self.q, self.k, self.v))
        x = x + self.attention_out(attention(q, k, v, causal=True))
        y = self.mlp_in(self.mlp_norm(x))
        y = y * torch.sigmoid(1.702 * y) if self.quick_gelu else F.gelu(y)
        return x + self.mlp_out(y)


Inserted = Sequence[tuple[int, Tensor]]  # in one row: where, and vectors (m d) that stand there instead of tokens


class ClipEncoder(nn.Module):
    """Token ids (b n), n at most `positions` -> ClipStates.

    `inserted`, one entry a row, puts vectors in the place of tokens (textual inversion, Gal et al. 2022); the ids there
    count for nothing, but must not be the end token's.
    """

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.positions, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.width)
        self.projection = Linear(config.width, config.projection, bias=False) if config.projection else None

    @property
    def device(self) -> torch.device:
        """Where it computes: large weights may be elsewhere meanwhile, norms are not."""
        return self.norm_out.weight.device

    def forward(self, ids: Tensor, inserted: Sequence[Inserted] = ()) -> ClipStates:
        x = self.tokens(ids)
        for row, pieces in enumerate(inserted):
            for start, vectors in pieces:
                x[row, start : start + len(vectors)] = vectors.to(x)
        x = x + self.positions(torch.arange(ids.shape[1], device=ids.device))
        hidden = [x]
        for layer in self.layers:
            x = layer(x)
            hidden.append(x)
        last = self.norm_out(x)
        end = (ids == self.config.end).int().argmax(dim=1)
        pooled = last[torch.arange(len(ids), device=ids.device), end]
        return ClipStates(tuple(hidden), last, pooled if self.projection is None else self.projection(pooled))
