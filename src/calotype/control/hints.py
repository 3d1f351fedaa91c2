"""What a ControlNet is given for one job."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calotype.errors import RequestError
from calotype.nn.leader import Leader
from calotype.request import Control


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
        return self.scale != 0 and leads(self, step, steps)


def leads(by: Hint | Control, step: int, steps: int) -> bool:
    """Whether all of a step, from 0, lies in the part that something leads."""
    return step / steps >= by.start and (step + 1) / steps <= by.end


def without_masked(network: Leader, picture: Tensor, mask: Tensor) -> Tensor:
    """What a network of the kind "inpaint" sees: a picture (b 3 h w in 0..1) with blanks where a mask (b 1 h w) is 1.

    ControlNet 1.1's has learned -1 for them, xinsir's union black.
    """
    return torch.where(mask > 0.5, network.blank, picture)


def kind_of(network: Leader, control: Control, field: str) -> int | None:
    """The number under which a union knows a kind ("canny", or "none:canny" for a ready picture); None for the others.

    Raises RequestError where the union knows no such kind.
    """
    if not network.count:
        return None
    known = network.kinds
    if control.shows not in known:
        allowed = f"one of {', '.join(known)}, or none:KIND for a ready picture: a union ControlNet must be told"
        raise RequestError(field, control.kind, allowed)
    return known[control.shows]
