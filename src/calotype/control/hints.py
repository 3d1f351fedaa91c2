"""What a ControlNet is given for one job."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calotype.errors import RequestError
from calotype.nn.leader import Leader

INPAINT = "inpaint"
"""The kind of a picture of which the job's mask takes away what is to be drawn."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Hint:
    """A picture for a ControlNet, at the job's size.

    picture     what the network sees, on its device: pixels b 3 h w in 0..1 as an annotator drew them, or latents
    scale       what the network's additions are multiplied by
    start, end  the part of the steps that it leads, as fractions of them
    kind        the number of the picture's kind, for a union
    """

    network: Leader
    picture: Tensor
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    kind: int | None = None

    def leads(self, step: int, steps: int) -> bool:
        """Whether the network adds anything at this step, from 0."""
        return self.scale != 0 and step / steps >= self.start and (step + 1) / steps <= self.end


def without_masked(network: Leader, picture: Tensor, mask: Tensor) -> Tensor:
    """What a network of the kind "inpaint" sees: a picture (b 3 h w in 0..1) with blanks where a mask (b 1 h w) is 1.

    ControlNet 1.1's has learned -1 for them, xinsir's union black.
    """
    return torch.where(mask > 0.5, network.blank, picture)


def shown(kind: str) -> str:
    """What a picture of a kind shows: of canny and of none:canny, canny."""
    return kind.removeprefix("none:")


def kind_of(network: Leader, kind: str, field: str) -> int | None:
    """The number under which a union knows a kind ("canny", or "none:canny" for a ready picture); None for the others.

    Raises RequestError where the union knows no such kind.
    """
    if not network.count:
        return None
    name, known = shown(kind), network.kinds
    if name not in known:
        allowed = f"one of {', '.join(known)}, or none:KIND for a ready picture: a union ControlNet must be told"
        raise RequestError(field, kind, allowed)
    return known[name]
