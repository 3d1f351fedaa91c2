"""Random tasks for what is said of places, inpainting and regions, as the built-in model can be asked for them.

The model draws things where it was shown them: two stand left and right, four in the corners. A region chooses between
what the prompts would draw at a place and moves nothing there. So a region's prompt says as many things as make one
stand in the region: "four cars" for a corner. What a user of a model that places things freely need not do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image

from recipes.builtin.objects import Object

SIDE = 128
HALF = SIDE // 2
# Draws next to nothing, on white: what is left where no region is.
EMPTY = "a tiny circle on a white background"
SCALE = 20.0  # of a region, against 1 for EMPTY
CORNERS = ((0, 0), (1, 0), (0, 1), (1, 1))


class Place(NamedTuple):
    """One region of a layout: where in the canvas (left, top, right, bottom), and how many things stand there alone."""

    boxes: tuple[tuple[int, int, int, int], ...]
    number: str  # "two" or "four": how many the prompt says, so that each box has one of them

    def mask(self) -> Image.Image:
        mask = Image.new("L", (SIDE, SIDE), 0)
        for box in self.boxes:
            mask.paste(255, box)
        return mask


class Layout(NamedTuple):
    """Two things and their places."""

    name: str
    things: tuple[Object, Object]
    places: tuple[Place, Place]
    seed: int

    def prompts(self, *, counted: bool = True) -> tuple[str, str]:
        """The regions' prompts: "four cars", or plainly "a car"."""
        first, second = (
            f"{place.number} {thing.plural}" if counted else phrase(thing)
            for thing, place in zip(self.things, self.places, strict=True)
        )
        return first, second

    def together(self) -> str:
        """Both things in one prompt."""
        return " and ".join(phrase(thing) for thing in self.things)


def phrase(thing: Object) -> str:
    return f"{'an' if thing.name[0] in 'aeiou' else 'a'} {thing.name}"


def countable(objects: Sequence[Object]) -> list[Object]:
    """The things of which there can be four."""
    return [thing for thing in objects if thing.plural]


def layouts(objects: Sequence[Object], count: int, seed: int = 0) -> list[Layout]:
    """Random layouts of random things: halves beside one another, halves over one another, and boxes in corners."""
    rng = np.random.default_rng(seed)
    things = countable(objects)
    made: list[Layout] = []
    for number in range(count):
        name = ("left and right", "top and bottom", "boxes")[number % 3]
        first, second = (things[int(row)] for row in rng.choice(len(things), 2, replace=False))
        made.append(Layout(name, (first, second), _places(rng, name), seed=number))
    return made


def _places(rng: Generator, name: str) -> tuple[Place, Place]:
    if name == "left and right":
        return Place((_box(0, 0, 1, 2),), "two"), Place((_box(1, 0, 2, 2),), "two")
    if name == "top and bottom":
        upper, lower = ((0, 1), (2, 3))
        return _corners(upper), _corners(lower)
    order = [int(corner) for corner in rng.permutation(4)]
    first, second = int(rng.integers(1, 3)), int(rng.integers(1, 3))
    return _corners(order[:first]), _corners(order[first : first + second])


def _corners(chosen: Sequence[int]) -> Place:
    boxes = tuple(_box(x, y, x + 1, y + 1) for x, y in (CORNERS[corner] for corner in chosen))
    return Place(boxes, "four")


def _box(left: int, top: int, right: int, bottom: int) -> tuple[int, int, int, int]:
    return left * HALF, top * HALF, right * HALF, bottom * HALF


def regions(layout: Layout, *, counted: bool = True) -> list[dict[str, object]]:
    """The `regions` of a request."""
    return [
        {"prompt": prompt, "mask": place.mask(), "scale": SCALE}
        for prompt, place in zip(layout.prompts(counted=counted), layout.places, strict=True)
    ]


class Change(NamedTuple):
    """Two things beside one another, of which one is to become another one: what is asked of inpainting."""

    left: Object
    right: Object
    wanted: Object
    side: int  # 0: the left one, 1: the right one
    seed: int

    def prompt(self) -> str:
        return f"{phrase(self.left)} and {phrase(self.right)}"

    def asked(self) -> str:
        """The prompt with the thing that is wanted, in its place."""
        pair = (self.wanted, self.right) if self.side == 0 else (self.left, self.wanted)
        return " and ".join(phrase(thing) for thing in pair)

    def box(self) -> tuple[int, int, int, int]:
        return _box(self.side, 0, self.side + 1, 2)

    def mask(self) -> Image.Image:
        return Place((self.box(),), "two").mask()


def changes(objects: Sequence[Object], count: int, seed: int = 1) -> list[Change]:
    """Random changes of random pairs."""
    rng = np.random.default_rng(seed)
    things = countable(objects)
    made: list[Change] = []
    for number in range(count):
        left, right, wanted = (things[int(row)] for row in rng.choice(len(things), 3, replace=False))
        made.append(Change(left, right, wanted, int(rng.integers(2)), seed=number))
    return made


def alone(picture: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """What a box shows, on a canvas of its background: as the classifier looks at things."""
    part = picture.convert("RGB").crop(box)
    edge = np.asarray(part)
    rim = np.concatenate([edge[0], edge[-1], edge[:, 0], edge[:, -1]])
    red, green, blue = (int(value) for value in np.median(rim, 0))
    canvas = Image.new("RGB", (SIDE, SIDE), (red, green, blue))
    canvas.paste(part, ((SIDE - part.width) // 2, (SIDE - part.height) // 2))
    return canvas
