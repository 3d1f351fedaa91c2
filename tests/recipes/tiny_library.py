"""A picture library of plain shapes, so that the recipe's pure parts are tested without its data."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw

from recipes.builtin.library import STYLES, Library, _planes, cut_out, resize
from recipes.builtin.objects import load_objects

SIZE = 64
NAMES = ("apple", "cat", "dog", "rocket", "tree", "house", "car", "fish", "banana", "star", "heart", "umbrella")


def tiny_library() -> Library:
    """Twelve objects in the three styles: regular polygons of different corners, colours and proportions."""
    objects = tuple(thing for thing in load_objects() if thing.name in NAMES)
    assert len(objects) == len(NAMES)
    full = torch.empty(len(STYLES), len(objects), SIZE, 6, SIZE, dtype=torch.uint8)
    half = torch.empty(len(STYLES), len(objects), SIZE // 2, 6, SIZE // 2, dtype=torch.uint8)
    for style in range(len(STYLES)):
        for row in range(len(objects)):
            picture = cut_out(_shape(row, style), SIZE)
            full[style, row] = _planes(picture)
            half[style, row] = _planes(resize(picture, SIZE // 2))
    return Library(objects=objects, full=full, half=half)


def _shape(row: int, style: int) -> Image.Image:
    """A polygon in two tones; another style turns it and changes its colour a little."""
    side = 4 * SIZE
    picture = Image.new("RGBA", (side, side))
    pen = ImageDraw.Draw(picture)
    height = (0.5, 0.3, 0.4)[row % 3] * side
    corners = 3 + row % 4
    points = [
        (
            side / 2 + 0.48 * side * math.cos(2 * math.pi * (k + 0.15 * style) / corners),
            side / 2 + height * math.sin(2 * math.pi * (k + 0.15 * style) / corners),
        )
        for k in range(corners)
    ]
    hue = np.array([math.cos(row * 2.4 + k * 2.1) for k in range(3)])
    tone = (115 + 100 * hue + 10 * style).astype(int)
    pen.polygon(points, fill=(int(tone[0]), int(tone[1]), int(tone[2]), 255))
    quarter = (side * 3 // 8, side * (3 + row % 2) // 8, side * 5 // 8, side * 5 // 8)
    pen.rectangle(quarter, fill=(int(tone[1] // 2), int(tone[0] // 2), int(tone[2] // 2), 255))
    return picture
