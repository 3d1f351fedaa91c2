"""Hunyuan-DiT's transformer (Li et al. 2024): blocks of self-attention, cross-attention to text, and an MLP.

Those of the second half take back what those of the first half left.

Whatever does not depend on the noisy picture is computed once a job by `prepare`: what time, size, style and pooled
text add to every block at all levels, the keys and values that text gives to every cross-attention, the rotations.
"""

# b batch · t levels · n image tokens · m text tokens · d width · h heads · c channels of a latent

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from calotype.families.hunyuan_dit.config import HunyuanConfig
from calotype.nn.attention import attention, in_rows, split_heads
from calotype.nn.conv import Conv2d
from calotype.nn.embeddings import Embedder, sinusoid
from calotype.nn.linear import Linear
from calotype.nn.norms import modulated
from calotype.nn.rope import rope_table, rotate

EPSILON = 1e-6
SINUSOID = 256  # channels of the sinusoid of time, and of each size
SIZES = 6  # width and height before scaling, width and height now, left and top of the crop
POOL_HEADS = 8
BASE = 32  # tokens a side that positions are measured in: those of 512 pixels
THETA = 10_000.0


class Prepared(NamedTuple):
    """All that one job's steps share."""

    shifts: tuple[Tensor, ...]  # of each block: t b 1 d
    out: tuple[Tensor, ...]  # shift and scale at the end, t b 1 d each; none where it does not end
    text: tuple[tuple[Tensor, Tensor], ...]  # keys and values for each block, b h m d/h each
    rope: Tensor  # rotations of image tokens, 2 n d/2h


class Projection(nn.Module):
    """Two linear layers with a SiLU between."""

    def __init__(self, width_in: int, inner: int, width: int) -> None:
        super().__init__()
        self.inner = Linear(width_in, inner)
        self.outer = Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.silu(self.inner(x)))


class Pool(nn.Module):
    """States (b m d) -> one vector (b d_out): what their mean finds by attending to itself and to all of them.

    CLIP's attention pooling (Radford et al. 2021), with a learned position for each.
    """

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        d = config.t5_width
        self.positions = nn.Embedding(config.t5_tokens + 1, d)
        self.q = Linear(d, d)
        self.k = Linear(d, d)
        self.v = Linear(d, d)
        self.out = Linear(d, config.pooled_width)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
        x = x + self.positions(torch.arange(x.shape[1], device=x.device))
        q, k, v = (split_heads(y, POOL_HEADS) for y in (self.q(x[:, :1]), self.k(x), self.v(x)))
        return self.out(attention(q, k, v))[:, 0]


class TextHeads(nn.Module):
    """What one block's cross-attention reads of the text."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.kv = Linear(config.text_width, 2 * config.width)
        self.k_norm = nn.LayerNorm(config.width // config.heads, EPSILON)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (split_heads(part, self.heads) for part in self.kv(text).chunk(2, dim=-1))
        return self.k_norm(k), v


class Conditioner(nn.Module):
    """All that no step needs once the job is prepared."""

    def __init__(self, config: HunyuanConfig, *, ends: bool) -> None:
        super().__init__()
        d = config.width
        self.time_in = Embedder(SINUSOID, d)
        self.pool = Pool(config)
        self.style = nn.Embedding(1, d) if config.styled else None
        extra = config.pooled_width + (SIZES * SINUSOID + d if config.styled else 0)
        self.extra_in = Projection(extra, 4 * d, d)
        self.t5_in = Projection(config.t5_width, 4 * config.t5_width, config.text_width)
        self.padding = nn.Embedding(config.text_tokens + config.t5_tokens, config.text_width)
        self.shifts = nn.ModuleList(Linear(d, d) for _ in range(config.blocks))
        self.text = nn.ModuleList(TextHeads(config) for _ in range(config.blocks))
        self.out = Linear(d, 2 * d) if ends else None

    def vectors(self, t5: Tensor, sizes: Tensor | None, times: Tensor) -> Tensor:
        """What time, the prompt as a whole, sizes and style come to, activated: (t b d)."""
        extra = [self.pool(t5)]
        assert (sizes is None) == (self.style is None)
        if self.style is not None and sizes is not None:
            extra.append(sinusoid(sizes, SINUSOID).flatten(1).to(t5.dtype))
            extra.append(self.style(torch.zeros(len(t5), dtype=torch.int64, device=t5.device)))
        time = self.time_in(sinusoid(times, SINUSOID).to(t5.dtype))
        return F.silu(time + self.extra_in(torch.cat(extra, dim=1)))

    def texts(self, text: Tensor, t5: Tensor, mask: Tensor) -> Tensor:
        """Both encoders' states as one sequence, padding replaced by what was learned for its place: (b m d_text)."""
        both = torch.cat([text, self.t5_in(t5)], dim=1)
        return torch.where(mask[..., None], both, self.padding(torch.arange(both.shape[1], device=both.device)))


class SelfAttention(nn.Module):
    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.qkv = Linear(d, 3 * d)
        self.q_norm = nn.LayerNorm(d // config.heads, EPSILON)
        self.k_norm = nn.LayerNorm(d // config.heads, EPSILON)
        self.out = Linear(d, d)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.out(attention(rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope), v))


class CrossAttention(nn.Module):
    """Queries are turned by their place in the picture, though the text's keys have none."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = Linear(config.width, config.width)
        self.q_norm = nn.LayerNorm(config.width // config.heads, EPSILON)
        self.out = Linear(config.width, config.width)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, rope: Tensor) -> Tensor:
        q = rotate(self.q_norm(split_heads(self.q(x), self.heads)), rope)
        return self.out(attention(q, k, v))


class Block(nn.Module):
    """`rejoins` says whether it begins by taking in what an earlier block left."""

    def __init__(self, config: HunyuanConfig, *, rejoins: bool) -> None:
        super().__init__()
        d = config.width
        self.skip_norm = nn.LayerNorm(2 * d, EPSILON) if rejoins else None
        self.skip_in = Linear(2 * d, d) if rejoins else None
        self.self_norm = nn.LayerNorm(d, EPSILON)
        self.self_attention = SelfAttention(config)
        self.cross_norm = nn.LayerNorm(d, EPSILON)
        self.cross_attention = CrossAttention(config)
        self.mlp_norm = nn.LayerNorm(d, EPSILON)
        self.mlp_in = Linear(d, config.mlp_width)
        self.mlp_out = Linear(config.mlp_width, d)

    def forward(self, x: Tensor, skipped: Tensor | None, shift: Tensor, k: Tensor, v: Tensor, rope: Tensor) -> Tensor:
        if self.skip_norm is not None and self.skip_in is not None and skipped is not None:
            x = self.skip_in(self.skip_norm(torch.cat([x, skipped], dim=-1)))
        x = x + self.self_attention(self.self_norm(x) + shift, rope)
        x = x + self.cross_attention(self.cross_norm(x), k, v, rope)
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh"))


class HunyuanTrunk(nn.Module):
    """The transformer up to its last block: all of it, or a ControlNet's share, its first half without the middle."""

    def __init__(self, config: HunyuanConfig, *, ends: bool) -> None:
        super().__init__()
        self.config = config
        self.conditioner = Conditioner(config, ends=ends)
        self.image_in = Conv2d(config.channels_in, config.width, config.patch, stride=config.patch)
        self.blocks = nn.ModuleList(
            Block(config, rejoins=ends and number > config.blocks // 2) for number in range(config.blocks)
        )

    def only_for_preparing(self) -> tuple[nn.Module, ...]:
        """What no step needs: a sixth of the weights."""
        return (self.conditioner,)

    def prepare(
        self,
        text: Tensor,
        t5: Tensor,
        mask: Tensor,
        sizes: Tensor | None,
        times: Tensor,
        rows: int,
        columns: int,
    ) -> Prepared:
        """What the steps of one job share.

        text (b text_tokens text_width) and t5 (b t5_tokens t5_width) with one mask (b text_tokens + t5_tokens), true
        where there is a token; sizes (b 6) exactly where the network is told them; times (t) in training steps for
        every level that will be asked for (or (t b): a time of its own for each picture, as in training); rows and
        columns of image tokens.
        """
        given = self.conditioner
        dtype = given.padding.weight.dtype
        text, t5 = text.to(dtype), t5.to(dtype)
        if times.ndim == 1:
            times = times[:, None]
        vectors = given.vectors(t5, sizes, times)
        read = given.texts(text, t5, mask)
        out = () if given.out is None else given.out(vectors).unsqueeze(-2).chunk(2, dim=-1)
        head = self.config.width // self.config.heads
        return Prepared(
            shifts=tuple(layer(vectors).unsqueeze(-2) for layer in given.shifts),
            out=out,
            text=tuple(heads(read) for heads in given.text),
            rope=rope_table(positions(rows, columns, text.device), (head // 2, head // 2), THETA),
        )

    def enter(self, x: Tensor) -> Tensor:
        """Latents (b channels_in h w) -> tokens b n d."""
        return rearrange(self.image_in(x.to(self.image_in.dtype)), "b d h w -> b (h w) d")


class HunyuanNetwork(HunyuanTrunk):
    """Noisy latents -> what the model predicts (v), then a variance.

    Both sides of classifier-free guidance may be asked for at once: with two prompts prepared, one row of latents
    gives two.
    """

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__(config, ends=True)
        self.out = Linear(config.width, config.patch**2 * config.channels_out)

    def forward(self, x: Tensor, prepared: Prepared, level: int, added: Sequence[Sequence[Tensor]] = ()) -> Tensor:
        """x (b channels_in h w) at the prepared level number `level` -> (b channels_out h w).

        Where more rows were prepared than x has, x has one, and each of them gets its answer; where fewer were, each is
        that of as many in turn. `added` is what
        ControlNets add to what each block of the first half leaves for one of the second.
        """
        rows = x.shape[2] // self.config.patch
        x = in_rows(self.enter(x), max(len(x), len(prepared.text[0][0])))
        left: list[Tensor] = []
        half = self.config.blocks // 2
        for number, (block, shift, (k, v)) in enumerate(zip(self.blocks, prepared.shifts, prepared.text, strict=True)):
            k, v, shift = (in_rows(each, len(x)) for each in (k, v, shift[level]))
            x = block(x, left.pop() if number > half else None, shift, k, v, prepared.rope)
            if number < half - 1:
                left.append(sum((made[number] for made in added), x))
        shift, scale = (in_rows(part[level], len(x)) for part in prepared.out)
        patches = self.out(modulated(x, shift, scale))
        return rearrange(
            patches, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=self.config.patch, q=self.config.patch
        )


def positions(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """(rows * columns, 2): each token's column and row, as if the picture were scaled to 512 pixels a side.

    Its longer side takes up the BASE tokens, its shorter one its share in their middle, rounded to whole tokens (the
    authors' get_fill_resize_and_crop).
    """
    height = BASE if rows > columns else round(BASE / columns * rows)
    width = round(BASE / rows * columns) if rows > columns else BASE
    top, left = round((BASE - height) / 2), round((BASE - width) / 2)
    grid = torch.empty(rows, columns, 2, dtype=torch.float64, device=device)
    grid[..., 0] = left + torch.arange(columns, dtype=torch.float64, device=device) * (width / columns)
    grid[..., 1] = (top + torch.arange(rows, dtype=torch.float64, device=device) * (height / rows))[:, None]
    return grid.flatten(0, 1)
