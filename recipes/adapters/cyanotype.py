"""A style that the built-in model does not know: cyanotypes, white prints on Prussian blue paper.

Things become prints in pale blue and white, their lightness stretched to the whole range so that each keeps its inner
drawing; the background, whatever its colour, becomes paper, a little darker in the corners. No lines: the autoencoder,
which keeps twelve numbers of 8x8 pixels, would lose them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recipes.builtin.colours import BACKGROUNDS, to_oklab
from recipes.builtin.library import Library
from recipes.builtin.scenes import Scene, compose

PAPER = (0.06, 0.19, 0.47)
WHITE = (0.96, 0.97, 0.94)
SHADE = 0.35  # how much of the print is left where a thing is darkest: all of it stands out from the paper
RANGE = 0.35  # lightness is not stretched from less than this, so that plain things stay plain


def cyanotypes(scenes: Sequence[Scene], library: Library, size: int | None = None) -> Tensor:
    """The scenes as cyanotypes, b 3 size size in 0..1; of the library's size if none is given."""
    colour, alpha = _matted(scenes, library, size or library.size)
    lightness = to_oklab((colour / alpha.clamp_min(0.02)).clamp(0, 1).movedim(1, -1))[..., 0]
    tone = SHADE + (1 - SHADE) * _stretched(lightness, alpha[:, 0])[:, None]
    paper, white = (torch.tensor(wanted)[:, None, None] for wanted in (PAPER, WHITE))
    return torch.lerp(_paper(*colour.shape[2:]), torch.lerp(paper, white, tone), alpha).clamp(0, 1)


def _matted(scenes: Sequence[Scene], library: Library, size: int) -> tuple[Tensor, Tensor]:
    """Things without their background: premultiplied colour b 3 h w, and how much they cover, b 1 h w.

    What shows through is what differs between the same things on white and on black.
    """
    grounds = [torch.tensor(BACKGROUNDS[word])[:, None, None] / 255 for word in ("white", "black")]
    on_white, on_black = (
        compose([scene._replace(background=word, tint=0.0) for scene in scenes], library, size) / 2 + 0.5
        for word in ("white", "black")
    )
    alpha = (1 - (on_white - on_black) / (grounds[0] - grounds[1])).mean(1, keepdim=True).clamp(0, 1)
    return on_black - grounds[1] * (1 - alpha), alpha


def _stretched(lightness: Tensor, alpha: Tensor) -> Tensor:
    """Lightness (b h w) of what is covered, on a scale from its darkest to its lightest twentieth."""
    made = torch.empty_like(lightness)
    for row, (values, covered) in enumerate(zip(lightness, alpha, strict=True)):
        seen = values[covered > 0.5]
        low, high = (float(seen.quantile(share)) for share in (0.05, 0.95)) if len(seen) else (0.0, 1.0)
        low = min(low, high - RANGE)
        made[row] = (values - low) / (high - low)
    return made.clamp(0, 1)


def _paper(height: int, width: int) -> Tensor:
    """3 h w."""
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    return torch.tensor(PAPER)[:, None, None] * (1.1 - 0.35 * ((x * x + y * y) / 2) ** 1.5)
