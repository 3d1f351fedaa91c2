"""A style that the built-in model does not know: cyanotypes, white prints on Prussian blue paper.

What differs from the background becomes a print in pale blue and white, its lightness stretched to the whole range so
that every object keeps its inner drawing; all else, whatever its colour, becomes paper, a little darker in the corners.
No lines: the autoencoder, which keeps twelve numbers of 8x8 pixels, would lose them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.builtin.colours import to_oklab
from recipes.builtin.measure import grounds

PAPER = (0.06, 0.19, 0.47)
WHITE = (0.96, 0.97, 0.94)
SHADE = 0.15  # how much of the print is left where an object is darkest


def cyanotype(pictures: Tensor) -> Tensor:
    """Pictures of things on plain backgrounds, b 3 h w in 0..1 -> the same as cyanotypes."""
    ground = to_oklab(grounds(pictures))[:, None, None]
    lab = to_oklab(pictures.movedim(1, -1))
    print_ = _risen((lab - ground).norm(dim=-1), 0.03, 0.10)[:, None]
    print_ = F.avg_pool2d(print_, 3, 1, 1, count_include_pad=False)
    tone = SHADE + (1 - SHADE) * _stretched(lab[..., 0], print_[:, 0])[:, None]
    paper, white = (torch.tensor(colour)[:, None, None] for colour in (PAPER, WHITE))
    return torch.lerp(_paper(*pictures.shape[2:]), torch.lerp(paper, white, tone), print_).clamp(0, 1)


def _stretched(lightness: Tensor, weight: Tensor) -> Tensor:
    """Lightness (b h w) on a scale from the darkest to the lightest twentieth of what has weight; never from less than
    a third of the whole scale, so that plain things stay plain.
    """
    made = torch.empty_like(lightness)
    for row, (values, present) in enumerate(zip(lightness, weight, strict=True)):
        seen = values[present > 0.5]
        low, high = (float(seen.quantile(share)) for share in (0.05, 0.95)) if len(seen) else (0.0, 1.0)
        low = min(low, high - 0.35)
        made[row] = (values - low) / (high - low)
    return made.clamp(0, 1)


def _risen(values: Tensor, low: float, high: float) -> Tensor:
    """0 up to low, 1 from high on, smooth between."""
    share = ((values - low) / (high - low)).clamp(0, 1)
    return share * share * (3 - 2 * share)


def _paper(height: int, width: int) -> Tensor:
    """3 h w."""
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    return torch.tensor(PAPER)[:, None, None] * (1.1 - 0.35 * ((x * x + y * y) / 2) ** 1.5)
