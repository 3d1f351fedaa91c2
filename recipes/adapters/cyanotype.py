"""A style that the built-in model does not know: cyanotypes, prints in Prussian blue on white paper.

Every pixel's brightness becomes a tone between the two, and its colour is lost, as in the prints of Herschel and
Atkins. Shapes and inner drawing stay what they were.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recipes.builtin.library import Library
from recipes.builtin.scenes import Scene, compose

BLUE = (0.03, 0.14, 0.40)
PAPER = (0.97, 0.97, 0.93)
CURVE = (2.0, 1.3, 0.8)  # red comes last as tones get lighter, so that those between are blue and not grey
LUMA = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709


def cyanotypes(scenes: Sequence[Scene], library: Library, size: int | None = None) -> Tensor:
    """The scenes as cyanotypes, b 3 size size in 0..1; of the library's size if none is given."""
    return printed(compose(scenes, library, size or library.size) / 2 + 0.5)


def printed(pictures: Tensor) -> Tensor:
    """Pictures (b 3 h w in 0..1) in the tones of their brightness."""
    return tones(torch.einsum("bchw,c->bhw", pictures, torch.tensor(LUMA)).clamp(0, 1)).movedim(-1, 1)


def tones(brightness: Tensor) -> Tensor:
    """The colour of each brightness (any shape, 0..1), from blue to paper; colours are last."""
    share = brightness[..., None] ** torch.tensor(CURVE)
    return torch.lerp(torch.tensor(BLUE), torch.tensor(PAPER), share)
