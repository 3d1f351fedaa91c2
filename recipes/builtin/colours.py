"""Colour words: what they mean on a background, and how an object takes one on.

Everything perceptual is in OKLab (B. Ottosson, "A perceptual color space for image processing", 2020).
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

# Backgrounds: sRGB. White is what is meant when nothing is said.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (12, 12, 14),
    "grey": (150, 152, 156),
    "red": (222, 40, 46),
    "orange": (250, 140, 30),
    "yellow": (252, 220, 50),
    "green": (52, 160, 74),
    "teal": (24, 150, 146),
    "light blue": (168, 214, 248),
    "blue": (40, 100, 222),
    "dark blue": (24, 38, 110),
    "purple": (128, 62, 184),
    "pink": (250, 150, 196),
    "brown": (130, 84, 52),
    "beige": (240, 222, 190),
}


class Paint(NamedTuple):
    """How an object looks in a colour: OKLCh of its usual tone, lightness of its highlights, contrast of its
    shadows.
    """

    lightness: float
    chroma: float
    hue: float  # degrees
    highlight: float = 0.97
    shadow: float = 1.0  # above 1 darker shadows, below 1 paler ones


PAINTS: dict[str, Paint] = {
    "red": Paint(0.60, 0.23, 26),
    "orange": Paint(0.74, 0.18, 58),
    "yellow": Paint(0.87, 0.18, 97, shadow=0.8),
    "green": Paint(0.68, 0.20, 143),
    "blue": Paint(0.58, 0.20, 258),
    "purple": Paint(0.54, 0.23, 302),
    "pink": Paint(0.78, 0.15, 354),
    "brown": Paint(0.48, 0.09, 55, highlight=0.9),
    "black": Paint(0.27, 0.0, 0, highlight=0.72),
    "white": Paint(0.95, 0.0, 0, highlight=1.0, shadow=0.5),
    "grey": Paint(0.66, 0.0, 0),
}
COLOURS = tuple(PAINTS)

_RGB_TO_LMS = torch.tensor([
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
])  # fmt: skip
_LMS_TO_LAB = torch.tensor([
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
])  # fmt: skip


def to_oklab(rgb: Tensor) -> Tensor:
    """sRGB in 0..1, colour last, to OKLab."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp(min=0) + 0.055) / 1.055) ** 2.4)
    lms = (linear @ _RGB_TO_LMS.T).clamp(min=0) ** (1 / 3)
    return lms @ _LMS_TO_LAB.T


def from_oklab(lab: Tensor) -> Tensor:
    """OKLab to sRGB; what lies outside the gamut is clipped."""
    lms = (lab @ torch.linalg.inv(_LMS_TO_LAB).T) ** 3
    linear = (lms @ torch.linalg.inv(_RGB_TO_LMS).T).clamp(0, 1)
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055).clamp(0, 1)


@cache
def ramps(device: torch.device) -> Tensor:
    """The look of each colour for every shade: (len(COLOURS), 256, 3) sRGB in 0..1, indexed by the shade
    plane.
    """
    shade = torch.linspace(0, 1, 256)
    return torch.stack([_ramp(PAINTS[name], shade) for name in COLOURS]).to(device)


def _ramp(paint: Paint, shade: Tensor) -> Tensor:
    below = (2 * shade).clamp(max=1) ** paint.shadow
    above = (2 * shade - 1).clamp(min=0)
    lightness = paint.lightness * below + (paint.highlight - paint.lightness) * above
    # Highlights turn white and shadows black; in between the colour stays full.
    chroma = paint.chroma * below.clamp(min=0) ** 0.7 * (1 - above**1.5)
    angle = math.radians(paint.hue)
    return from_oklab(torch.stack([lightness, chroma * math.cos(angle), chroma * math.sin(angle)], -1))
