"""What a ControlNet is given for one job."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from calotype.errors import RequestError
from calotype.nn.controlnet import ControlNet

# The kinds that xinsir's union ControlNets are told, by number; annotators' names first.
UNION_KINDS: dict[str, int] = {
    "openpose": 0,
    "pose": 0,
    "depth": 1,
    "soft_edge": 2,
    "softedge": 2,
    "scribble": 2,
    "canny": 3,
    "lineart": 3,
    "line": 3,
    "normal": 4,
    "segment": 5,
    "tile": 6,
    "blur": 6,
    "inpaint": 7,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Hint:
    """A picture for a ControlNet, at the job's size.

    picture     b 3 h w in 0..1, as an annotator draws it, on the network's device
    scale       what the network's additions are multiplied by
    start, end  the part of the steps that it leads, as fractions of them
    kind        the number of the picture's kind, for a union
    """

    network: ControlNet
    picture: Tensor
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    kind: int | None = None

    @cached_property
    def embedded(self) -> Tensor:
        """What the picture is to the network, computed once."""
        return self.network.embed(self.picture, self.kind)

    def leads(self, step: int, steps: int) -> bool:
        """Whether the network adds anything at this step, from 0."""
        return self.scale != 0 and step / steps >= self.start and (step + 1) / steps <= self.end


def kind_of(network: ControlNet, kind: str, field: str) -> int | None:
    """The number under which a union knows a kind ("canny", or "none:canny" for a ready picture); None for the others.

    Raises RequestError where the union knows no such kind.
    """
    if network.union is None:
        return None
    name = kind.removeprefix("none:")
    known = [each for each, number in UNION_KINDS.items() if number < len(network.union.kinds)]
    if name not in known:
        raise RequestError(
            field, kind, f"one of {', '.join(known)}, or none:KIND for a ready picture: a union ControlNet must be told"
        )
    return UNION_KINDS[name]
