"""ControlNets of UNets (Zhang et al. 2023): a copy of the way down that sees a picture, and adds to the UNet.

A union ControlNet (xinsir, 2024) knows several kinds of picture: it is told which one it gets, and a small transformer
over the means of its features and of the latents' says what is added to each channel. As published, and as diffusers
runs it, that transformer attends over the batch and not over its two members: for one picture each of them meets
itself alone, attention is what its values are, and nothing of it depends on the latents. So it runs once a job, also
where the union sees several pictures in one pass: each by itself, and what they add is added up.
"""

# b batch · c channels · h height · w width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.nn.conv import Conv2d
from calotype.nn.embeddings import Embedder, sinusoid
from calotype.nn.leader import Leader
from calotype.nn.linear import Linear
from calotype.nn.unet import Descent, KeysAndValues, Prepared, Read, UNetConfig


@dataclass(frozen=True, kw_only=True)
class UnionConfig:
    """`kinds` of picture that a union ControlNet knows, and its transformer over their means."""

    kinds: int
    layers: int


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig:
    """`unet` are the numbers of the UNet's way down (its channels out say nothing here).

    `hint_widths` are those of the convolutions through which the picture goes, full resolution first; from each to the
    next its sides are halved. `pooled` says whether only the means over the picture of what it adds are added, and
    that where a prompt leads alone, not where a negative one does (ControlNet 1.1's for shuffled pictures).
    """

    unet: UNetConfig
    hint_widths: tuple[int, ...]
    union: UnionConfig | None
    pooled: bool


# The kinds that xinsir's union ControlNets are told, by number; annotators' names first.
UNION_KINDS: dict[str, int] = {
    "openpose": 0,
    "pose": 0,
    "depth": 1,
    "soft_edge": 2,
    "softedge": 2,
    "hed": 2,
    "scribble": 2,
    "canny": 3,
    "lineart": 3,
    "lineart_learned": 3,
    "lineart_anime": 3,
    "mlsd": 3,
    "line": 3,
    "normal": 4,
    "segment": 5,
    "tile": 6,
    "blur": 6,
    "inpaint": 7,
}


class HintEmbedding(nn.ModuleList):
    """A picture (b 3 8h 8w) in 0..1 -> features on the latents' grid."""

    def __init__(self, config: ControlNetConfig) -> None:
        widths = config.hint_widths
        convs = [Conv2d(3, widths[0], 3, padding=1)]
        for width, wider in zip(widths[:-1], widths[1:], strict=True):
            convs.append(Conv2d(width, width, 3, padding=1))
            convs.append(Conv2d(width, wider, 3, padding=1, stride=2))
        super().__init__([*convs, Conv2d(widths[-1], config.unet.widths[0], 3, padding=1)])

    def forward(self, picture: Tensor) -> Tensor:
        x = picture
        for number, conv in enumerate(self):
            x = conv(F.silu(x) if number else x)
        return x


class MemberBlock(nn.Module):
    """One block of a union's transformer, CLIP's kind."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = Linear(width, 4 * width)
        self.mlp_out = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """b c -> b c; each row by itself, so that attention gives its value."""
        *_, value = self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        x = x + self.out(value)
        y = self.mlp_in(self.mlp_norm(x))
        return x + self.mlp_out(y * torch.sigmoid(1.702 * y))


class Union(nn.Module):
    """What a union ControlNet has beside the others."""

    def __init__(self, config: ControlNetConfig, union: UnionConfig) -> None:
        super().__init__()
        width = config.unet.widths[0]
        self.kinds = nn.Parameter(torch.empty(union.kinds, width))
        self.kinds_in = Embedder(union.kinds * config.unet.size_width, 4 * width)
        self.blocks = nn.ModuleList(MemberBlock(width) for _ in range(union.layers))
        self.out = Linear(width, width)

    def forward(self, features: Tensor, kind: int, scale: float) -> Tensor:
        """A picture's features (b c h w), of the kind of this number -> what is added to the latents'."""
        member = scale * (features.mean(dim=(2, 3)) + self.kinds[kind])
        for block in self.blocks:
            member = block(member)
        return scale * (features + self.out(member)[..., None, None])


class ControlNet(Descent, Leader):
    """Noisy latents and a picture -> what the UNet adds to its skip connections and its middle."""

    names = UNION_KINDS

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config.unet)
        self.settings = config
        self.count = 0 if config.union is None else config.union.kinds
        self.hint = HintEmbedding(config)
        self.union = None if config.union is None else Union(config, config.union)
        if self.union is not None:
            self.blank = 0.0
        widths = [config.unet.widths[0]]
        for number, width in enumerate(config.unet.widths):
            last = number == len(config.unet.widths) - 1
            widths += [width] * (config.unet.blocks + (not last))
        self.taps = nn.ModuleList(Conv2d(width, width, 1) for width in [*widths, config.unet.widths[-1]])

    def only_for_preparing(self) -> tuple[nn.Module, ...]:
        told = () if self.union is None else tuple(self.union.modules())
        return (*super().only_for_preparing(), *self.hint, *told)

    def embed(self, picture: Tensor, kind: int | None, scale: float = 1.0) -> Tensor:
        """What a picture (b 3 8h 8w) in 0..1 adds to the latents' features, b c h w; a union must be told its kind.

        `scale` weighs it against others that the union sees in the same pass.
        """
        features = self.hint(picture.to(self.conv_in.dtype))
        if self.union is None:
            return features
        assert kind is not None
        return self.union(features, kind, scale)

    def prepare_hinted(
        self,
        texts: Sequence[Tensor],
        vector: Tensor | None,
        times: Tensor,
        kinds: Sequence[int],
        reader: Descent | None,
    ) -> Prepared:
        """As `prepare`, for pictures of these kinds, none unless it is a union; `reader` reads text and vector where
        the network's own is another model's (SDXL's ControlNets on Kolors)."""
        told = None
        if self.union is not None:
            assert kinds
            seen = torch.zeros(len(self.union.kinds), device=self.union.kinds.device)
            seen[list(kinds)] = 1
            told = self.union.kinds_in(sinusoid(seen, self.config.size_width).reshape(1, -1).to(self.conv_in.dtype))
        return self.prepare(texts, vector, times, reader=reader, told=told)

    def forward(self, x: Tensor, shifts: Sequence[Tensor], text: Sequence[KeysAndValues], hint: Tensor) -> list[Tensor]:
        """x (b channels h w) with `shifts` and `text` of `Prepared.at`, `hint` of `embed` -> additions.

        Of one that is pooled, their sides are 1.
        """
        x = self.conv_in(x.to(self.conv_in.dtype))
        made = self.descend(x + hint, iter(shifts), map(Read, text))
        tapped = [tap(each) for tap, each in zip(self.taps, made, strict=True)]
        return [each.mean(dim=(2, 3), keepdim=True) for each in tapped] if self.settings.pooled else tapped
