"""CLIP's image encoder (Radford et al. 2021): a vision transformer, from ViT-L to OpenCLIP's ViT-H and bigG."""

# b batch · n the class token, then the patches · d width

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from calotype.nn.attention import attention, split_heads
from calotype.nn.conv import Conv2d
from calotype.nn.linear import Linear


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """`side` of the pictures that it sees and `patch` are in pixels; `projection` is the width of its answer.

    `quick_gelu`: x * sigmoid(1.702 x), OpenAI's activation, instead of the exact one.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    patch: int
    side: int
    quick_gelu: bool
    projection: int

    @property
    def tokens(self) -> int:
        return 1 + (self.side // self.patch) ** 2


VIT_H = VisionConfig(
    width=1280,
    layers=32,
    heads=16,
    mlp_width=5120,
    patch=14,
    side=224,
    quick_gelu=False,
    projection=1024,
)
BIG_G = VisionConfig(
    width=1664,
    layers=48,
    heads=16,
    mlp_width=8192,
    patch=14,
    side=224,
    quick_gelu=False,
    projection=1280,
)


class VisionStates(NamedTuple):
    """What image prompts take from CLIP."""

    penultimate: Tensor  # b n d, the output of the last layer but one, not normed
    embedding: Tensor  # b projection, of the whole picture


class Layer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
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
        x = x + self.attention_out(attention(q, k, v))
        y = self.mlp_in(self.mlp_norm(x))
        y = y * torch.sigmoid(1.702 * y) if self.quick_gelu else F.gelu(y)
        return x + self.mlp_out(y)


class VisionEncoder(nn.Module):
    """Pictures (b 3 side side), normalised as CLIP's are -> VisionStates."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.whole = nn.Parameter(torch.empty(config.width))  # the class token
        self.patches = Conv2d(3, config.width, config.patch, stride=config.patch, bias=False)
        self.positions = nn.Embedding(config.tokens, config.width)
        self.norm_in = nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.width)
        self.projection = Linear(config.width, config.projection, bias=False)

    def forward(self, picture: Tensor) -> VisionStates:
        patches = rearrange(self.patches(picture.to(self.whole.dtype)), "b d h w -> b (h w) d")
        x = torch.cat([self.whole.expand(len(patches), 1, -1), patches], dim=1)
        x = self.norm_in(x + self.positions(torch.arange(x.shape[1], device=x.device)))
        before = x
        for layer in self.layers:
            before, x = x, layer(x)
        return VisionStates(before, self.projection(self.norm_out(x[:, 0])))
