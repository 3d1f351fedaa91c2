"""Sizes of pictures, in pixels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """A picture's size in pixels."""

    width: int
    height: int

    def nearest(self, grain: int) -> Size:
        """The closest size whose sides are multiples of `grain` (at least one grain each)."""
        width, height = (max(grain, int(side / grain + 0.5) * grain) for side in (self.width, self.height))
        return Size(width, height)

    def of_area(self, pixels: int, grain: int) -> Size:
        """A size of about these proportions and so many pixels, its sides multiples of `grain`."""
        factor = (pixels / (self.width * self.height)) ** 0.5
        return Size(round(self.width * factor), round(self.height * factor)).nearest(grain)

    def tokens(self, grain: int) -> int:
        """How many square tokens of `grain` pixels a side cover the picture."""
        return (self.width // grain) * (self.height // grain)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"
