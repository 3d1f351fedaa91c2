"""IP-Adapters of UNets (Ye et al. 2023): what CLIP sees in a picture, as tokens that cross-attention reads beside text.

Three ways lead from CLIP to tokens: a projection of the picture's one embedding (the base adapters), a small
perceiver over its penultimate states ("plus"), an MLP of each of these states ("full"). Every cross-attention has keys
and values of its own for them. Nothing depends on the noisy picture: all of it is computed once a job.
"""

# b batch · n tokens · m states of the encoder · d width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from calotype.nn.attention import attention, split_heads
from calotype.nn.linear import Linear
from calotype.nn.unet import KeysAndValues, UNetConfig
from calotype.nn.vision import VisionConfig, VisionStates


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    """Of the base adapters: as many `tokens` of one embedding."""

    tokens: int


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig:
    """Of the "plus" adapters: a perceiver with as many queries as `tokens`."""

    tokens: int
    width: int
    layers: int
    heads: int
    head_width: int
    mlp_width: int


@dataclass(frozen=True, kw_only=True)
class FullConfig:
    """Of the "full" adapters: a token of each state, through an MLP of this inner width."""

    mlp_width: int


@dataclass(frozen=True, kw_only=True)
class ImageAdapterConfig:
    """`seen_width` is that of what it takes from CLIP, `text_width` that of its tokens, which is the text's.

    `widths` are those of the cross-attentions, in the order in which adapters number them: the way down, the way up,
    the middle.
    """

    seen_width: int
    text_width: int
    widths: tuple[int, ...]
    form: ProjectionConfig | ResamplerConfig | FullConfig

    def sees(self, encoder: VisionConfig) -> bool:
        """Whether an encoder gives what this adapter takes."""
        own = encoder.projection if isinstance(self.form, ProjectionConfig) else encoder.width
        return own == self.seen_width


BASE = ProjectionConfig(tokens=4)  # as published


def perceiver(width: int) -> ResamplerConfig:
    """The resampler of the published "plus" adapters, in one of two widths."""
    return ResamplerConfig(tokens=16, width=width, layers=4, heads=width // 64, head_width=64, mlp_width=4 * width)


class Projection(nn.Module):
    """The embedding of a picture (b d) -> tokens (b n text_width)."""

    def __init__(self, config: ImageAdapterConfig, form: ProjectionConfig) -> None:
        super().__init__()
        self.tokens = form.tokens
        self.tokens_in = Linear(config.seen_width, form.tokens * config.text_width)
        self.norm = nn.LayerNorm(config.text_width)

    def forward(self, seen: Tensor) -> Tensor:
        return self.norm(rearrange(self.tokens_in(seen), "b (n d) -> b n d", n=self.tokens))


class ResamplerLayer(nn.Module):
    def __init__(self, form: ResamplerConfig) -> None:
        super().__init__()
        inner = form.heads * form.head_width
        self.heads = form.heads
        self.seen_norm = nn.LayerNorm(form.width)
        self.tokens_norm = nn.LayerNorm(form.width)
        self.q = Linear(form.width, inner, bias=False)
        self.kv = Linear(form.width, 2 * inner, bias=False)
        self.out = Linear(inner, form.width, bias=False)
        self.mlp_norm = nn.LayerNorm(form.width)
        self.mlp_in = Linear(form.width, form.mlp_width, bias=False)
        self.mlp_out = Linear(form.mlp_width, form.width, bias=False)

    def forward(self, tokens: Tensor, seen: Tensor) -> Tensor:
        """Tokens read the states (b m d) and one another."""
        own = self.tokens_norm(tokens)
        k, v = self.kv(torch.cat([self.seen_norm(seen), own], dim=1)).chunk(2, dim=-1)
        q, k, v = (split_heads(x, self.heads) for x in (self.q(own), k, v))
        tokens = tokens + self.out(attention(q, k, v))
        return tokens + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(tokens))))


class Resampler(nn.Module):
    """The encoder's penultimate states (b m d) -> tokens (b n text_width): a perceiver (Alayrac et al. 2022)."""

    def __init__(self, config: ImageAdapterConfig, form: ResamplerConfig) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(1, form.tokens, form.width))
        self.seen_in = Linear(config.seen_width, form.width)
        self.layers = nn.ModuleList(ResamplerLayer(form) for _ in range(form.layers))
        self.tokens_out = Linear(form.width, config.text_width)
        self.norm = nn.LayerNorm(config.text_width)

    def forward(self, seen: Tensor) -> Tensor:
        seen = self.seen_in(seen)
        tokens = self.queries.expand(len(seen), -1, -1)
        for layer in self.layers:
            tokens = layer(tokens, seen)
        return self.norm(self.tokens_out(tokens))


class Full(nn.Module):
    """The encoder's penultimate states (b m d) -> as many tokens (b m text_width)."""

    def __init__(self, config: ImageAdapterConfig, form: FullConfig) -> None:
        super().__init__()
        self.mlp_in = Linear(config.seen_width, form.mlp_width)
        self.mlp_out = Linear(form.mlp_width, config.text_width)
        self.norm = nn.LayerNorm(config.text_width)

    def forward(self, seen: Tensor) -> Tensor:
        return self.norm(self.mlp_out(F.gelu(self.mlp_in(seen))))


class ImageAdapter(nn.Module):
    """What CLIP sees -> what every cross-attention reads of it."""

    def __init__(self, config: ImageAdapterConfig) -> None:
        super().__init__()
        self.config = config
        match config.form:
            case ProjectionConfig():
                self.tokens = Projection(config, config.form)
            case ResamplerConfig():
                self.tokens = Resampler(config, config.form)
            case FullConfig():
                self.tokens = Full(config, config.form)
        self.keys = nn.ModuleList(Linear(config.text_width, width, bias=False) for width in config.widths)
        self.values = nn.ModuleList(Linear(config.text_width, width, bias=False) for width in config.widths)

    @property
    def of_embedding(self) -> bool:
        """Whether it takes the embedding of the whole picture, and not CLIP's penultimate states.

        Where no picture is shown (the negative side of guidance), it is then given zeros, else what CLIP sees in zeros.
        """
        return isinstance(self.tokens, Projection)

    def taken(self, seen: VisionStates) -> Tensor:
        """What of CLIP's answer becomes tokens."""
        return (seen.embedding if self.of_embedding else seen.penultimate).to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        first = self.keys[0]
        assert isinstance(first, Linear)
        return first.dtype

    def forward(self, taken: Tensor, heads: Sequence[int]) -> KeysAndValues:
        """What `taken` gave -> keys and values of each cross-attention, in adapters' order, with this many heads."""
        tokens = self.tokens(taken)
        layers = zip(self.keys, self.values, heads, strict=True)
        return tuple((split_heads(key(tokens), n), split_heads(value(tokens), n)) for key, value, n in layers)


@dataclass(frozen=True, kw_only=True)
class Places:
    """The cross-attentions of a UNet, in adapters' order: the way down, the way up, the middle."""

    widths: tuple[int, ...]
    heads: tuple[int, ...]
    down: int  # how many are on the way down
    middle: int

    @classmethod
    def of(cls, config: UNetConfig) -> Places:
        levels = list(enumerate(config.depths))
        down = [level for level, depth in levels for _ in range(config.blocks * depth)]
        up = [level for level, depth in reversed(levels) for _ in range((config.blocks + 1) * depth)]
        every = [*down, *up, *[len(levels) - 1] * config.middle_depth]
        return cls(
            widths=tuple(config.widths[level] for level in every),
            heads=tuple(config.heads[level] for level in every),
            down=len(down),
            middle=config.middle_depth,
        )

    def in_forward_order(self, read: KeysAndValues) -> KeysAndValues:
        """Of adapters' order, the order in which the UNet goes through them: the middle before the way up."""
        up = len(read) - self.middle
        return (*read[: self.down], *read[up:], *read[self.down : up])
