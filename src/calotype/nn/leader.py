"""What ControlNets of all families have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import nn


class Leader(nn.Module):
    """A network beside a model's backbone that sees a picture and adds to what the backbone computes.

    `sees` says what becomes of the picture first: nothing, or an autoencoder's latents of it; "masked" are those of
    what a mask leaves of it, with the mask behind them. `count` is that of the kinds of picture that it must be told, 0
    where it knows one only. `blank` stands for pixels that a mask takes away, where it sees pictures of the kind
    "inpaint".
    """

    names: ClassVar[Mapping[str, int]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.sees: Literal["picture", "latents", "masked"] = "picture"
        self.count = 0
        self.blank = -1.0

    @property
    def kinds(self) -> dict[str, int]:
        """The kinds that it tells apart, by number; none where it is not told any."""
        return {name: number for name, number in self.names.items() if number < self.count}
