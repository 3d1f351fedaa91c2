"""The FLUX.1 transformer (Black Forest Labs, 2024): joint blocks over text and image, then single blocks over both.

Whatever does not depend on the noisy picture is computed once a job by `prepare`: the modulation of all blocks at all
levels, the projected text, the rotations. `forward` is left with what changes from step to step.
"""

# b batch · t levels · n tokens · d width · h heads

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from calotype.families.flux.config import FluxConfig
from calotype.nn.attention import attention, in_rows
from calotype.nn.embeddings import Embedder, sinusoid
from calotype.nn.linear import Linear
from calotype.nn.norms import RMSNorm, modulated
from calotype.nn.rope import rope_table, rotate

TIME_WIDTH = 256  # channels of the sinusoid of time and guidance
TIME_SCALE = 1000.0  # both are fed times a thousand


class Modulation(nn.Module):
    """adaLN-zero for every block from one vector: rows of (shift, scale, gate), two such rows for a joint stream."""

    def __init__(self, config: FluxConfig, *, ends: bool = True) -> None:
        super().__init__()
        d = config.width
        self.joint_image = nn.ModuleList(Linear(d, 6 * d) for _ in range(config.joint_blocks))
        self.joint_text = nn.ModuleList(Linear(d, 6 * d) for _ in range(config.joint_blocks))
        self.single = nn.ModuleList(Linear(d, 3 * d) for _ in range(config.single_blocks))
        self.out = Linear(d, 2 * d) if ends else None

    def forward(self, vector: Tensor) -> ModulationTable:
        """(t b d) -> a table of t b 1 d rows."""
        vector = F.silu(vector)

        def rows(layer: nn.Module, count: int) -> tuple[Tensor, ...]:
            return tuple(layer(vector).unsqueeze(-2).chunk(count, dim=-1))

        return ModulationTable(
            joint_image=tuple(rows(layer, 6) for layer in self.joint_image),
            joint_text=tuple(rows(layer, 6) for layer in self.joint_text),
            single=tuple(rows(layer, 3) for layer in self.single),
            out=() if self.out is None else rows(self.out, 2),
        )


class ModulationTable(NamedTuple):
    """Every block's modulation, t b 1 d each: six rows a joint stream, three a single block, two at the end if any."""

    joint_image: tuple[tuple[Tensor, ...], ...]
    joint_text: tuple[tuple[Tensor, ...], ...]
    single: tuple[tuple[Tensor, ...], ...]
    out: tuple[Tensor, ...]


class Prepared(NamedTuple):
    """All that one job's steps share."""

    text: Tensor  # b n d, projected
    rope: Tensor  # rotations of text and image tokens, 2 n d/2h
    table: ModulationTable


class Stream(nn.Module):
    """One modality's half of a joint block."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.qkv = Linear(d, 3 * d)
        self.q_norm = RMSNorm(d // config.heads)
        self.k_norm = RMSNorm(d // config.heads)
        self.attention_out = Linear(d, d)
        self.mlp_in = Linear(d, config.mlp_ratio * d)
        self.mlp_out = Linear(config.mlp_ratio * d, d)

    def heads_of(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, b h n d/h."""
        q, k, v = rearrange(
            self.qkv(modulated(x, shift, scale)), "b n (three h d) -> three b h n d", three=3, h=self.heads
        )
        return self.q_norm(q), self.k_norm(k), v

    def mlp(self, x: Tensor) -> Tensor:
        return self.mlp_out(F.gelu(self.mlp_in(x), approximate="tanh"))


class JointBlock(nn.Module):
    """Text and image keep their own weights and meet in one attention."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.image = Stream(config)
        self.text = Stream(config)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        rope: Tensor,
        image_rows: tuple[Tensor, ...],
        text_rows: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor]:
        shift1, scale1, gate1, shift2, scale2, gate2 = image_rows
        text_shift1, text_scale1, text_gate1, text_shift2, text_scale2, text_gate2 = text_rows
        heads = zip(
            self.text.heads_of(text, text_shift1, text_scale1), self.image.heads_of(image, shift1, scale1), strict=True
        )
        q, k, v = (torch.cat(pair, dim=2) for pair in heads)
        mixed = attention(rotate(q, rope), rotate(k, rope), v)
        from_text, from_image = mixed.split([text.shape[1], image.shape[1]], dim=1)

        image = torch.addcmul(image, gate1, self.image.attention_out(from_image))
        image = torch.addcmul(image, gate2, self.image.mlp(modulated(image, shift2, scale2)))
        text = torch.addcmul(text, text_gate1, self.text.attention_out(from_text))
        text = torch.addcmul(text, text_gate2, self.text.mlp(modulated(text, text_shift2, text_scale2)))
        return image, text


class SingleBlock(nn.Module):
    """Attention and MLP side by side over text and image as one sequence (after Dehghani et al. 2023)."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.widths = (3 * d, config.mlp_ratio * d)
        self.inward = Linear(d, sum(self.widths))
        self.outward = Linear(d + config.mlp_ratio * d, d)
        self.q_norm = RMSNorm(d // config.heads)
        self.k_norm = RMSNorm(d // config.heads)

    def forward(self, x: Tensor, rope: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        shift, scale, gate = rows
        qkv, hidden = self.inward(modulated(x, shift, scale)).split(self.widths, dim=-1)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        mixed = attention(rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope), v)
        return torch.addcmul(x, gate, self.outward(torch.cat([mixed, F.gelu(hidden, approximate="tanh")], dim=-1)))


class Added(NamedTuple):
    """What a ControlNet adds to image tokens after the joint and the single blocks, b n d each.

    Fewer than the network has blocks go to several in a row each.
    """

    joint: tuple[Tensor, ...]
    single: tuple[Tensor, ...]


def _after(made: Sequence[Tensor], block: int, blocks: int) -> Tensor | None:
    """Of what a ControlNet adds, what comes after this block of so many."""
    return made[block // math.ceil(blocks / len(made))] if made else None


class FluxTrunk(nn.Module):
    """FLUX.1's transformer up to its last block: all of it, or a ControlNet's share."""

    def __init__(self, config: FluxConfig, *, ends: bool) -> None:
        super().__init__()
        self.config = config
        d = config.width
        self.image_in = Linear(config.image_width, d)
        self.text_in = Linear(config.text_width, d)
        self.time_in = Embedder(TIME_WIDTH, d)
        self.pooled_in = Embedder(config.pooled_width, d)
        self.guidance_in = Embedder(TIME_WIDTH, d) if config.guidance_input else None
        self.modulation = Modulation(config, ends=ends)
        self.joint = nn.ModuleList(JointBlock(config) for _ in range(config.joint_blocks))
        self.single = nn.ModuleList(SingleBlock(config) for _ in range(config.single_blocks))

    def only_for_preparing(self) -> tuple[nn.Module, ...]:
        """What no step needs: a good quarter of the weights."""
        inputs = (self.text_in, self.time_in, self.pooled_in, self.modulation)
        return inputs if self.guidance_in is None else (*inputs, self.guidance_in)

    def prepare(
        self,
        text: Tensor,
        pooled: Tensor,
        guidance: float | None,
        times: Tensor,
        rows: int,
        columns: int,
        *,
        before: Tensor | None = None,
    ) -> Prepared:
        """What the steps of one job share.

        text (b n text_width), pooled (b pooled_width), times (t) in 0..1 for every level that will be asked for (or
        (t b): a time of its own for each picture, as in training), rows and columns of image tokens.
        `guidance` is given exactly where the network has that input; `before` (m d) are tokens before the text's.
        """
        dtype = self.text_in.dtype
        if times.ndim == 1:
            times = times[:, None]
        vector = self.time_in(sinusoid(times * TIME_SCALE, TIME_WIDTH).to(dtype))
        if self.guidance_in is not None:
            assert guidance is not None
            scaled = torch.tensor(guidance * TIME_SCALE, device=text.device)
            vector = vector + self.guidance_in(sinusoid(scaled, TIME_WIDTH).to(dtype))
        vector = vector + self.pooled_in(pooled.to(dtype))  # t b d
        tokens = self.text_in(text.to(dtype))
        if before is not None:
            tokens = torch.cat([before.to(dtype).expand(len(tokens), -1, -1), tokens], dim=1)
        places = positions(tokens.shape[1], rows, columns, text.device)
        return Prepared(
            text=tokens,
            rope=rope_table(places, self.config.axes, self.config.theta),
            table=self.modulation(vector),
        )

    def through(
        self, image: Tensor, prepared: Prepared, level: int, added: Sequence[Added] = ()
    ) -> Generator[Tensor, None, None]:
        """Image tokens (b n d) after every block, joint ones first, with what ControlNets add.

        Where fewer rows were prepared, each is that of as many in turn.
        """
        table, text = prepared.table, in_rows(prepared.text, len(image))

        def at(rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(in_rows(row[level], len(image)) for row in rows)

        for number, (block, image_rows, text_rows) in enumerate(
            zip(self.joint, table.joint_image, table.joint_text, strict=True)
        ):
            image, text = block(image, text, prepared.rope, at(image_rows), at(text_rows))
            for more in (_after(each.joint, number, len(self.joint)) for each in added):
                image = image if more is None else image + more
            yield image
        words, x = text.shape[1], torch.cat([text, image], dim=1)
        for number, (block, rows) in enumerate(zip(self.single, table.single, strict=True)):
            x = block(x, prepared.rope, at(rows))
            for more in (_after(each.single, number, len(self.single)) for each in added):
                if more is not None:
                    x = torch.cat([x[:, :words], x[:, words:] + more], dim=1)
            yield x[:, words:]


class FluxNetwork(FluxTrunk):
    """Noisy image tokens -> velocity (noise - clean) tokens."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__(config, ends=True)
        self.out = Linear(config.width, config.image_width_out)

    def forward(self, image: Tensor, prepared: Prepared, level: int, added: Sequence[Added] = ()) -> Tensor:
        """image (b n image_width) at the prepared level number `level` -> velocity (b n image_width_out).

        `added` is what ControlNets add, one after the other.
        """
        image = self.image_in(image.to(self.image_in.dtype))
        for tokens in self.through(image, prepared, level, added):
            image = tokens
        shift, scale = (in_rows(row[level], len(image)) for row in prepared.table.out)
        return self.out(modulated(image, shift, scale))


def positions(text: int, rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """(text + rows * columns, 3): text tokens at the origin, image tokens at (0, row, column)."""
    grid = torch.zeros(rows, columns, 3, device=device)
    grid[..., 1] = torch.arange(rows, device=device)[:, None]
    grid[..., 2] = torch.arange(columns, device=device)
    return torch.cat([torch.zeros(text, 3, device=device), grid.flatten(0, 1)])


def to_tokens(latent: Tensor, patch: int) -> Tensor:
    """Square patches as tokens: (b c h*p w*p) -> (b h*w c*p*p)."""
    return rearrange(latent, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def to_latent(tokens: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """The inverse of `to_tokens`."""
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, w=columns, p=patch, q=patch)
