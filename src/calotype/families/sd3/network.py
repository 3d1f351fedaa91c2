"""The transformer of Stable Diffusion 3 and 3.5, MMDiT (Esser et al. 2024): joint blocks over picture and text.

Whatever does not depend on the noisy picture is computed once a job by `prepare`: the modulation of all blocks at all
levels, the projected text, the positions. `forward` is left with what changes from step to step.
"""

# b batch · t levels · n image tokens · m text tokens · d width · h heads · c channels of a latent

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from calotype.families.sd3.config import Sd3Config
from calotype.nn.attention import attention, in_rows
from calotype.nn.conv import Conv2d
from calotype.nn.embeddings import Embedder, sinusoid
from calotype.nn.linear import Linear
from calotype.nn.norms import RMSNorm, modulated

TIME_WIDTH = 256  # channels of the sinusoid of time
TIME_SCALE = 1000.0  # which is fed times a thousand

Rows = tuple[Tensor, ...]  # shifts, scales and gates, t b 1 d each


class ModulationTable(NamedTuple):
    """Every block's modulation: six rows a stream (nine for the picture where it also attends to itself alone).

    Where the network ends, its last block's text, which only gives keys and values, has two, as the end has.
    """

    image: tuple[Rows, ...]
    text: tuple[Rows, ...]
    out: Rows


class Modulation(nn.Module):
    """adaLN-zero for every block from one vector: (shift, scale, gate) for attention, MLP, and dual attention."""

    def __init__(self, config: Sd3Config, *, ends: bool) -> None:
        super().__init__()
        d = config.width
        self.image = nn.ModuleList(Linear(d, (9 if i in config.dual else 6) * d) for i in range(config.blocks))
        self.text = nn.ModuleList(Linear(d, 6 * d) for _ in range(config.blocks - ends))
        self.last_text = Linear(d, 2 * d) if ends else None
        self.out = Linear(d, 2 * d) if ends else None

    def forward(self, vector: Tensor) -> ModulationTable:
        """(t b d) -> a table of t b 1 d rows."""
        vector = F.silu(vector)
        width = vector.shape[-1]

        def rows(layer: nn.Module) -> Rows:
            return layer(vector).unsqueeze(-2).split(width, dim=-1)

        return ModulationTable(
            image=tuple(rows(layer) for layer in self.image),
            text=tuple(rows(layer) for layer in (*self.text, self.last_text) if layer is not None),
            out=() if self.out is None else rows(self.out),
        )


class PositionTable(nn.Module):
    """What is added to an image token at each place of a square; a picture takes its middle."""

    def __init__(self, config: Sd3Config) -> None:
        super().__init__()
        self.side = config.positions
        self.table = nn.Parameter(torch.zeros(1, config.positions**2, config.width))

    def forward(self, rows: int, columns: int) -> Tensor:
        """(1 n d), rows * columns of them in reading order; neither may exceed the square's side."""
        assert rows <= self.side and columns <= self.side, (rows, columns)
        top, left = (self.side - rows) // 2, (self.side - columns) // 2
        square = self.table.unflatten(1, (self.side, self.side))
        return square[:, top : top + rows, left : left + columns].flatten(1, 2)


class Prepared(NamedTuple):
    """All that one job's steps share."""

    text: Tensor  # b m d, projected
    positions: Tensor  # 1 n d
    table: ModulationTable


class Heads(nn.Module):
    """Queries, keys and values, b h n d/h each, of a stream (b n d)."""

    def __init__(self, config: Sd3Config) -> None:
        super().__init__()
        head = config.width // config.heads
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width)
        self.q_norm = RMSNorm(head) if config.norms else nn.Identity()
        self.k_norm = RMSNorm(head) if config.norms else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.q_norm(q), self.k_norm(k), v


class Outcome(nn.Module):
    """What a stream makes of its attention, and the MLP after it."""

    def __init__(self, config: Sd3Config) -> None:
        super().__init__()
        self.attention_out = Linear(config.width, config.width)
        self.mlp_in = Linear(config.width, config.mlp_width)
        self.mlp_out = Linear(config.mlp_width, config.width)

    def mlp(self, x: Tensor) -> Tensor:
        return self.mlp_out(F.gelu(self.mlp_in(x), approximate="tanh"))


class Block(nn.Module):
    """Picture and text keep their own weights and meet in one attention.

    With `dual` the picture also attends to itself alone; after the `last` block nobody reads the text.
    """

    def __init__(self, config: Sd3Config, *, dual: bool, last: bool) -> None:
        super().__init__()
        self.image_heads = Heads(config)
        self.image = Outcome(config)
        self.own_heads = Heads(config) if dual else None
        self.own_out = Linear(config.width, config.width) if dual else None
        self.text_heads = Heads(config)
        self.text = None if last else Outcome(config)

    def forward(self, image: Tensor, text: Tensor, image_rows: Rows, text_rows: Rows) -> tuple[Tensor, Tensor]:
        shift1, scale1, gate1, shift2, scale2, gate2, *own_rows = image_rows
        text_shift1, text_scale1, *text_rest = text_rows
        heads = zip(
            self.image_heads(modulated(image, shift1, scale1)),
            self.text_heads(modulated(text, text_shift1, text_scale1)),
            strict=True,
        )
        mixed = attention(*(torch.cat(pair, dim=2) for pair in heads))
        from_image, from_text = mixed.split([image.shape[1], text.shape[1]], dim=1)

        after = torch.addcmul(image, gate1, self.image.attention_out(from_image))
        if self.own_heads is not None and self.own_out is not None:
            own_shift, own_scale, own_gate = own_rows
            own = attention(*self.own_heads(modulated(image, own_shift, own_scale)))
            after = torch.addcmul(after, own_gate, self.own_out(own))
        image = torch.addcmul(after, gate2, self.image.mlp(modulated(after, shift2, scale2)))
        if self.text is not None:
            text_gate1, text_shift2, text_scale2, text_gate2 = text_rest
            text = torch.addcmul(text, text_gate1, self.text.attention_out(from_text))
            text = torch.addcmul(text, text_gate2, self.text.mlp(modulated(text, text_shift2, text_scale2)))
        return image, text


class Sd3Trunk(nn.Module):
    """The transformer up to its last block: all of it, or a ControlNet's share."""

    def __init__(self, config: Sd3Config, *, ends: bool) -> None:
        super().__init__()
        self.config = config
        d = config.width
        self.image_in = Conv2d(config.channels_in, d, config.patch, stride=config.patch)
        self.positions = PositionTable(config)
        self.text_in = Linear(config.text_width, d)
        self.time_in = Embedder(TIME_WIDTH, d)
        self.pooled_in = Embedder(config.pooled_width, d)
        self.modulation = Modulation(config, ends=ends)
        self.blocks = nn.ModuleList(
            Block(config, dual=i in config.dual, last=ends and i == config.blocks - 1) for i in range(config.blocks)
        )

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in, whatever its matrices are stored in."""
        return self.positions.table.dtype

    def only_for_preparing(self) -> tuple[nn.Module, ...]:
        """What no step needs: a third of the weights."""
        return self.positions, self.text_in, self.time_in, self.pooled_in, self.modulation

    def prepare(self, text: Tensor, pooled: Tensor, times: Tensor, rows: int, columns: int) -> Prepared:
        """What the steps of one job share.

        text (b m text_width), pooled (b pooled_width), times (t) in 0..1 for every level that will be asked for (or
        (t b): a time of its own for each picture, as in training), rows and columns of image tokens.
        """
        dtype = self.dtype
        if times.ndim == 1:
            times = times[:, None]
        vector = self.time_in(sinusoid(times * TIME_SCALE, TIME_WIDTH).to(dtype)) + self.pooled_in(pooled.to(dtype))
        return Prepared(
            text=self.text_in(text.to(dtype)),
            positions=self.positions(rows, columns),
            table=self.modulation(vector),  # of t b d
        )

    def enter(self, x: Tensor, prepared: Prepared) -> Tensor:
        """Latents (b channels_in h w) -> tokens in their places, b n d."""
        return rearrange(self.image_in(x.to(self.dtype)), "b d h w -> b (h w) d") + prepared.positions

    def through(
        self, image: Tensor, prepared: Prepared, level: int, added: Sequence[Sequence[Tensor]] = ()
    ) -> Generator[Tensor, None, None]:
        """Image tokens (b n d) after every block, with what ControlNets add, but nothing after the last of all.

        Where more rows were prepared than there are, there is one, and each of them gets its answer; where fewer were,
        each is that of as many in turn. Fewer additions than blocks go to several in a row each.
        """
        table, image = prepared.table, in_rows(image, max(len(image), len(prepared.text)))
        text = in_rows(prepared.text, len(image))

        def at(rows: Rows) -> Rows:
            return tuple(in_rows(row[level], len(image)) for row in rows)

        for number, (block, image_rows, text_rows) in enumerate(zip(self.blocks, table.image, table.text, strict=True)):
            image, text = block(image, text, at(image_rows), at(text_rows))
            if number < len(self.blocks) - 1:
                for made in added:
                    image = image + made[number * len(made) // len(self.blocks)]
            yield image


class Sd3Network(Sd3Trunk):
    """Noisy latents -> velocity (noise - clean).

    Both sides of classifier-free guidance may be asked for at once: with two prompts prepared, one row of latents
    gives two.
    """

    def __init__(self, config: Sd3Config) -> None:
        super().__init__(config, ends=True)
        self.out = Linear(config.width, config.patch**2 * config.channels_out)

    def forward(self, x: Tensor, prepared: Prepared, level: int, added: Sequence[Sequence[Tensor]] = ()) -> Tensor:
        """x (b channels_in h w) at the prepared level number `level` -> velocity (b channels_out h w).

        Where more rows were prepared than x has, x has one, and each of them gets its answer. `added` is what
        ControlNets add, each after some of the blocks.
        """
        patch, rows = self.config.patch, x.shape[2] // self.config.patch
        image = self.enter(x, prepared)
        for tokens in self.through(image, prepared, level, added):
            image = tokens
        shift, scale = (in_rows(row[level], len(image)) for row in prepared.table.out)
        patches = self.out(modulated(image, shift, scale))
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=patch, q=patch)
