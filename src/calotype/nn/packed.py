"""Layers whose weight stays in the bytes that a file has it in: GGUF's blocks, float8 with or without a scale.

A weight may be made of several pieces of a file (queries, keys and values on top of one another, halves in another
order), each in its own format and with its own scale. They stay where they are; nothing is put together but what a
product needs at the moment.
"""

# r rows · p columns of a weight

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from calotype.nn.formats import FORMATS
from calotype.nn.stored import ROWS, Stored, StoredConv2d, StoredEmbedding, StoredLinear, parameter


class Piece(NamedTuple):
    """`rows` rows of a weight: their bytes (uint8), what these mean, and what the numbers are to be multiplied by.

    `scale` is float32, one number or one a row.
    """

    rows: int
    format: str
    values: Tensor
    scale: Tensor | None = None


class Packed(Stored):
    """Pieces on top of one another."""

    def __init__(self, shape: Sequence[int], pieces: Sequence[Piece], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.dtype = dtype
        self.pieces = tuple((piece.rows, piece.format) for piece in pieces)
        assert sum(rows for rows, _ in self.pieces) == self.shape[0]
        kept: list[str] = []
        for number, piece in enumerate(pieces):
            form = FORMATS[piece.format]
            assert piece.values.dtype == torch.uint8
            assert piece.values.numel() * form.weights == piece.rows * self.columns * form.bytes
            self.register_buffer(f"values{number}", piece.values.view(-1, form.bytes))
            if piece.scale is not None:
                self.register_buffer(f"scale{number}", piece.scale.view(-1, 1))
                kept.append(f"scale{number}")
        self.kept = tuple(kept)

    def widen(self, start: int, stop: int) -> Tensor:
        parts: list[Tensor] = []
        first = 0
        for number, (rows, _) in enumerate(self.pieces):
            begin, end = max(start - first, 0), min(stop - first, rows)
            if begin < end:
                parts.append(self._piece(number, begin, end))
            first += rows
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _piece(self, number: int, start: int, stop: int) -> Tensor:
        rows, name = self.pieces[number]
        form = FORMATS[name]
        # Blocks may cross the borders of rows: as many rows together as fill whole ones.
        unit = form.weights // math.gcd(form.weights, self.columns)
        begin, end = start - start % unit, min(-(-stop // unit) * unit, rows)
        values: Tensor = getattr(self, f"values{number}")
        blocks = values[begin * self.columns // form.weights : end * self.columns // form.weights]
        x = form.widen(blocks).view(-1, self.columns)[start - begin : stop - begin]
        scale: Tensor | None = getattr(self, f"scale{number}", None)
        if scale is None:
            return x
        return x * (scale if len(scale) == 1 else scale[start:stop])

    def rounded(self, rows: Tensor) -> Tensor:
        """In the layer's dtype: so that results are those of a layer whose weight was widened to it when loaded."""
        return rows.to(self.dtype)

    def extra_repr(self) -> str:
        formats = ", ".join(dict.fromkeys(name for _, name in self.pieces))
        return f"shape={self.shape}, formats={formats}"


class PackedLinear(Packed, StoredLinear):
    """A linear layer of `pieces`; the bias is kept as it is."""

    def __init__(self, shape: Sequence[int], pieces: Sequence[Piece], dtype: torch.dtype, bias: Tensor | None) -> None:
        super().__init__(shape, pieces, dtype)
        self.bias = parameter(bias)


class PackedConv2d(Packed, StoredConv2d):
    """A convolution of `pieces`, with the settings of the one whose place it takes."""

    def __init__(
        self,
        shape: Sequence[int],
        pieces: Sequence[Piece],
        dtype: torch.dtype,
        bias: Tensor | None,
        how: dict[str, Any],
    ) -> None:
        super().__init__(shape, pieces, dtype)
        self.bias = parameter(bias)
        self.how = how


class PackedEmbedding(Packed, StoredEmbedding):
    """Vectors by number, each of whole blocks and all in one piece."""

    def lines(self, numbers: Tensor) -> Tensor:
        ((rows, name),) = self.pieces
        form = FORMATS[name]
        values: Tensor = getattr(self, "values0")  # noqa: B009  registered under a made name
        blocks = values.view(rows, -1)[numbers].view(-1, form.bytes)
        x = form.widen(blocks).view(-1, self.columns)
        scale: Tensor | None = getattr(self, "scale0", None)
        if scale is None:
            return x
        return x * (scale if len(scale) == 1 else scale[numbers])


def packed(module: nn.Module, pieces: Sequence[Piece], dtype: torch.dtype) -> Packed | None:
    """The layer that does what a module does, with these pieces as its weight; None for what has no such layer."""
    if isinstance(module, nn.Linear):
        return PackedLinear(module.weight.shape, pieces, dtype, module.bias)
    if isinstance(module, nn.Conv2d):
        how = StoredConv2d.settings(module)
        return PackedConv2d(module.weight.shape, pieces, dtype, module.bias, how)
    if isinstance(module, nn.Embedding) and len(pieces) == 1:
        whole = module.embedding_dim % FORMATS[pieces[0].format].weights == 0
        return PackedEmbedding(module.weight.shape, pieces, dtype) if whole else None
    return None


LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}
FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def in_float8(weight: Tensor, name: str) -> Piece:
    """A weight (r ...) as float8, rounded to nearest, with a scale a row: its largest value becomes the format's.

    The weight is read some rows at a time and not kept. Without a scale, weights of a usual spread (0.02) lie where
    e4m3 has no more than three bits, and fewer the smaller they are.
    """
    values = torch.empty(weight.shape[0], math.prod(weight.shape[1:]), dtype=torch.uint8, device=weight.device)
    scale = torch.empty(weight.shape[0], 1, device=weight.device)
    for start in range(0, len(weight), ROWS):
        block = weight[start : start + ROWS].detach().flatten(1).float()
        most = block.abs().amax(1, keepdim=True) / LARGEST[name]
        most = torch.where(most == 0, 1, most)
        scale[start : start + ROWS] = most
        values[start : start + ROWS] = (block / most).to(FLOAT8[name]).view(torch.uint8)
    return Piece(len(weight), name, values, scale)
