"""The UNet of latent diffusion (Rombach et al. 2022): Stable Diffusion 1.x, SDXL (Podell et al. 2023), Kolors.

Whatever does not depend on the noisy picture is computed once a job by `prepare`: the keys and values that the text
gives to every cross-attention, and the shifts that time gives to every residual block at all levels.
"""

# b batch · t levels · n text tokens · c channels · h height · w width

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from calotype.nn.attention import attention, in_rows, split_heads
from calotype.nn.conv import Conv2d
from calotype.nn.embeddings import Embedder, sinusoid
from calotype.nn.linear import Linear

GROUPS = 32


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """`widths`, `depths` and `heads` run over the levels, full resolution first.

    `blocks` residual blocks a level (one more on the way up); `depths` transformer blocks after each of them, none
    where 0; `text_width` is what cross-attention takes, `text_width_in` what comes in where a projection stands before
    it (Kolors); `vector_width` is the width of the pooled text and sizes (SDXL), None where there is no such input,
    and `size_width` that of each size among them. `convolved` says how files hold the projections around transformers:
    as convolutions of size 1, or as the linear layers that they are.
    """

    channels_in: int
    channels_out: int
    widths: tuple[int, ...]
    blocks: int
    depths: tuple[int, ...]
    middle_depth: int
    heads: tuple[int, ...]
    text_width: int
    text_width_in: int | None
    vector_width: int | None
    size_width: int
    convolved: bool


KeysAndValues = tuple[tuple[Tensor, Tensor], ...]
"""What text gives to one cross-attention: (b h n d) twice, for each group of rows whose prompts are of one length."""


class Read(NamedTuple):
    """What one cross-attention reads: text, and the pictures of image prompts, each attended to by itself."""

    text: KeysAndValues
    pictures: KeysAndValues = ()  # for all rows at once, an entry a picture; its values hold its scale


class Prepared(NamedTuple):
    """All that one job's steps share."""

    shifts: tuple[Tensor, ...]  # of each residual block: t b c 1 1
    text: tuple[KeysAndValues, ...]  # of each cross-attention

    def at(self, level: int) -> tuple[tuple[Tensor, ...], tuple[KeysAndValues, ...]]:
        """What `UNet.forward` takes beside the picture, at the prepared level of this number."""
        return tuple(shift[level] for shift in self.shifts), self.text


class ResidualBlock(nn.Module):
    def __init__(self, width_in: int, width: int, time_width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, width_in)
        self.conv1 = Conv2d(width_in, width, 3, padding=1)
        self.time = Linear(time_width, width)
        self.norm2 = nn.GroupNorm(GROUPS, width)
        self.conv2 = Conv2d(width, width, 3, padding=1)
        self.shortcut = Conv2d(width_in, width, 1) if width_in != width else None

    def shifts(self, time: Tensor) -> Tensor:
        """(t b time_width), activated -> what time adds, t b c 1 1."""
        return self.time(time)[..., None, None]

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + shift
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = Linear(width, width, bias=False)
        self.k = Linear(width, width, bias=False)
        self.v = Linear(width, width, bias=False)
        self.out = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(project(x), self.heads) for project in (self.q, self.k, self.v))
        return self.out(attention(q, k, v))


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = Linear(width, width, bias=False)
        self.k = Linear(text_width, width, bias=False)
        self.v = Linear(text_width, width, bias=False)
        self.out = Linear(width, width)

    def keys_and_values(self, texts: Sequence[Tensor]) -> KeysAndValues:
        return tuple((split_heads(self.k(text), self.heads), split_heads(self.v(text), self.heads)) for text in texts)

    def forward(self, x: Tensor, read: Read) -> Tensor:
        """One picture may meet several prompts here, its row is then repeated; or several pictures in turn each."""
        q = split_heads(self.q(x), self.heads)
        rows = [len(k) for k, _ in read.text]
        q = in_rows(q, max(sum(rows), len(q)))
        each = len(q) // sum(rows)
        parts = [
            attention(part, in_rows(k, len(part)), in_rows(v, len(part)))
            for part, (k, v) in zip(q.split([each * count for count in rows]), read.text, strict=True)
        ]
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
        for k, v in read.pictures:
            mixed = mixed + attention(q, in_rows(k, len(q)), in_rows(v, len(q)))
        return self.out(mixed)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = SelfAttention(width, heads)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = CrossAttention(width, heads, text_width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = Linear(width, 8 * width)  # values, then gates
        self.mlp_out = Linear(4 * width, width)

    def forward(self, x: Tensor, read: Read) -> Tensor:
        x = x + self.self_attention(self.self_norm(x))
        x = x + self.cross_attention(self.cross_norm(x), read)
        value, gate = self.mlp_in(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.mlp_out(value * F.gelu(gate))


class Transformer(nn.Module):
    """Transformer blocks over all positions."""

    def __init__(self, width: int, heads: int, text_width: int, depth: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.inward = Linear(width, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, text_width) for _ in range(depth))
        self.outward = Linear(width, width)

    def forward(self, x: Tensor, reads: Iterator[Read]) -> Tensor:
        tokens = self.inward(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block in self.blocks:
            tokens = block(tokens, next(reads))
        return x + rearrange(self.outward(tokens), "b (h w) c -> b c h w", h=x.shape[2])


class Level(nn.Module):
    """The blocks of one resolution, on the way down or up; `sample` leads to the next."""

    def __init__(self, widths_in: Sequence[int], width: int, config: UNetConfig, level: int, sample: bool) -> None:
        super().__init__()
        time_width = 4 * config.widths[0]
        depth, heads = config.depths[level], config.heads[level]
        self.blocks = nn.ModuleList(ResidualBlock(width_in, width, time_width) for width_in in widths_in)
        self.transformers = nn.ModuleList(
            Transformer(width, heads, config.text_width, depth) for _ in widths_in if depth
        )
        self.sample = Conv2d(width, width, 3, padding=1) if sample else None

    def steps(self) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        """Each residual block, and the transformer after it where there is one."""
        for number, block in enumerate(self.blocks):
            yield block, self.transformers[number] if len(self.transformers) else None


class DownLevel(Level):
    def __init__(self, config: UNetConfig, level: int) -> None:
        width = config.widths[level]
        last = level == len(config.widths) - 1
        widths_in = [config.widths[max(level - 1, 0)], *[width] * (config.blocks - 1)]
        super().__init__(widths_in, width, config, level, sample=not last)
        if self.sample is not None:
            self.sample.stride = (2, 2)


class UpLevel(Level):
    """Takes back, one a block, what the way down left at this resolution."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        widths = config.widths
        width = widths[level]
        below = widths[min(level + 1, len(widths) - 1)]
        skipped = [width] * config.blocks + [widths[max(level - 1, 0)]]
        widths_in = [(width if number else below) + skip for number, skip in enumerate(skipped)]
        super().__init__(widths_in, width, config, level, sample=level > 0)


class Middle(nn.Module):
    """What lies between the ways down and up; in small ControlNets one residual block alone."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width, time_width = config.widths[-1], 4 * config.widths[0]
        self.first = ResidualBlock(width, width, time_width)
        self.transformer: Transformer | None = None
        self.second: ResidualBlock | None = None
        if config.middle_depth:
            self.transformer = Transformer(width, config.heads[-1], config.text_width, config.middle_depth)
            self.second = ResidualBlock(width, width, time_width)


class Descent(nn.Module):
    """The way down and the middle, which a UNet and the ControlNets trained on it share, and what `prepare` gives them.

    Both sides of classifier-free guidance may be asked for at once: with two prompts prepared, one row of latents
    gives two. All that comes before the first place where the prompts differ is then computed once: in SD 1.x up to
    the first cross-attention, in SDXL (whose pooled text enters every residual block) the first convolution.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, levels = config.widths, range(len(config.widths))
        time_width = 4 * widths[0]
        self.time_in = Embedder(widths[0], time_width)
        self.vector_in = Embedder(config.vector_width, time_width) if config.vector_width else None
        self.text_in = Linear(config.text_width_in, config.text_width) if config.text_width_in else None
        self.conv_in = Conv2d(config.channels_in, widths[0], 3, padding=1)
        self.down = nn.ModuleList(DownLevel(config, level) for level in levels)
        self.middle = Middle(config)

    def only_for_preparing(self) -> tuple[nn.Module, ...]:
        """What no step needs: time, vectors and text on their way in, and cross-attention's keys and values."""
        inputs = [module for module in (self.time_in, self.vector_in, self.text_in) if module is not None]
        times = [block.time for block in self.modules() if isinstance(block, ResidualBlock)]
        texts = [pair for block in self.modules() if isinstance(block, CrossAttention) for pair in (block.k, block.v)]
        return (*inputs, *times, *texts)

    def prepare(
        self,
        texts: Sequence[Tensor],
        vector: Tensor | None,
        times: Tensor,
        *,
        reader: Descent | None = None,
        told: Tensor | None = None,
    ) -> Prepared:
        """What the steps of one job share.

        texts: (b n text_width) for each group of rows whose prompts are of one length; vector (b vector_width), the
        pooled text and sizes, exactly where the network has that input; times (t) in training steps for every level
        that will be asked for (or (t b): a time of its own for each picture, as in training). `reader` is the network
        whose projections of text and vector are used, this one unless given; `told` (b time_width) is what the network
        is told beside them.
        """
        return Prepared(
            shifts=self.shifts(vector, times, reader=reader, told=told), text=self.read(texts, reader=reader)
        )

    def shifts(
        self, vector: Tensor | None, times: Tensor, *, reader: Descent | None = None, told: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """What time and vector come to, as in `prepare`: of each residual block, t b c 1 1."""
        reader = self if reader is None else reader
        dtype = self.conv_in.dtype
        if times.ndim == 1:
            times = times[:, None]
        time = self.time_in(sinusoid(times, self.config.widths[0]).to(dtype))
        assert (vector is None) == (reader.vector_in is None)
        if told is not None:
            time = time + told
        if reader.vector_in is not None and vector is not None:
            time = time + reader.vector_in(vector.to(reader.conv_in.dtype)).to(dtype)
        time = F.silu(time)  # t b time_width
        # `modules` follows the order that forward goes through them.
        return tuple(block.shifts(time) for block in self.modules() if isinstance(block, ResidualBlock))

    def read(self, texts: Sequence[Tensor], *, reader: Descent | None = None) -> tuple[KeysAndValues, ...]:
        """What texts give to each cross-attention, as in `prepare`."""
        reader = self if reader is None else reader
        texts = [text.to(reader.conv_in.dtype) for text in texts]
        if reader.text_in is not None:
            texts = [reader.text_in(text) for text in texts]
        texts = [text.to(self.conv_in.dtype) for text in texts]
        return tuple(block.keys_and_values(texts) for block in self.modules() if isinstance(block, CrossAttention))

    def descend(self, x: Tensor, shift: Iterator[Tensor], reads: Iterator[Read]) -> list[Tensor]:
        """What comes out of `conv_in` (b c h w) -> it, what every block on the way down makes of it, and the middle."""
        skipped = [x]
        for level in self.down:
            assert isinstance(level, DownLevel)
            for block, transformer in level.steps():
                x = block(x, next(shift))
                if transformer is not None:
                    x = transformer(x, reads)
                skipped.append(x)
            if level.sample is not None:
                x = level.sample(x)
                skipped.append(x)
        x = self.middle.first(x, next(shift))
        if self.middle.transformer is not None and self.middle.second is not None:
            x = self.middle.second(self.middle.transformer(x, reads), next(shift))
        return [*skipped, x]


class UNet(Descent):
    """Noisy latents -> what the model predicts: noise, or v."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        widths = config.widths
        self.up = nn.ModuleList(UpLevel(config, level) for level in reversed(range(len(widths))))
        self.norm_out = nn.GroupNorm(GROUPS, widths[0])
        self.conv_out = Conv2d(widths[0], config.channels_out, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        shifts: Sequence[Tensor],
        text: Sequence[KeysAndValues],
        added: Sequence[Tensor] = (),
        pictures: Sequence[KeysAndValues] = (),
    ) -> Tensor:
        """x (b channels_in h w) with `shifts` and `text` of `Prepared.at` -> (b channels_out h w).

        Where those were prepared for more rows than x has, x has one, and each of them gets its answer. Texts may be
        fewer than x has rows: each is read by as many in turn. `added` is what
        ControlNets add: to each of the skip connections, in the order of the way down, and to the middle. `pictures`
        is what image prompts give to each cross-attention, where there are some.
        """
        shift = iter(shifts)
        pictures = pictures or [()] * len(text)
        reads = (Read(*both) for both in zip(text, pictures, strict=True))
        skipped = self.descend(self.conv_in(x.to(self.conv_in.dtype)), shift, reads)
        if added:
            skipped = [own + more.to(own.dtype) for own, more in zip(skipped, added, strict=True)]
        x = skipped.pop()
        for level in self.up:
            assert isinstance(level, UpLevel)
            for block, transformer in level.steps():
                x = block(torch.cat([x, skipped.pop().expand(len(x), -1, -1, -1)], dim=1), next(shift))
                if transformer is not None:
                    x = transformer(x, reads)
            if level.sample is not None:
                # To the size that the way down had here: sides need not be even there.
                height, width = skipped[-1].shape[-2:]
                x = level.sample(F.interpolate(x, size=(height, width), mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))
