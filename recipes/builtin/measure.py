"""What can be read off a picture without a network: background, place, size, number, colour and likeness.

All of it rests on one mask: the pixels that differ from the background, which is the colour of the corners.
Pictures are float32 b 3 h w in 0..1, on the CPU. None of these measures is exact; `evaluate` states how often
each one is right on real composites, beside what it says of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.builtin.colours import BACKGROUNDS, COLOURS, to_oklab
from recipes.builtin.library import STYLES, Library
from recipes.builtin.objects import Object
from recipes.builtin.scenes import PLACES, SIZES, Scene, compose, make_scene

DIFFERENT = 0.06  # OKLab distance from the background from which a pixel belongs to an object
STRAY = 0.004  # share of the visible pixels, at either end of an axis, that a bounding box leaves out
MARGIN = 1.06  # side of a crop, in longer sides of what it shows
FRAGMENT = 0.12  # a component smaller than this share of the largest one is no object of its own


class Boxes(NamedTuple):
    """Where the visible part of each picture is: b each, as fractions of the canvas side."""

    x: Tensor  # centre
    y: Tensor
    width: Tensor
    height: Tensor

    @property
    def side(self) -> Tensor:
        return torch.maximum(self.width, self.height)


def compose_all(scenes: Sequence[Scene], library: Library, size: int | None = None) -> Tensor:
    """Real pictures of scenes, b 3 size size in 0..1, drawn a few at a time; of the library's size if none is given."""
    parts = [scenes[first : first + 64] for first in range(0, len(scenes), 64)]
    return torch.cat([compose(part, library, size or library.size) for part in parts]) / 2 + 0.5


def grounds(pictures: Tensor) -> Tensor:
    """The background colour of each picture, b 3: the median of the pixels in its four corners."""
    edge = max(2, pictures.shape[-1] // 32)
    rows = torch.cat([pictures[:, :, :edge], pictures[:, :, -edge:]], 2)
    return torch.cat([rows[..., :edge], rows[..., -edge:]], 3).flatten(2).median(2).values


def named_grounds(colours: Tensor) -> list[str]:
    """The background word nearest to each colour (b 3)."""
    palette = torch.tensor(list(BACKGROUNDS.values())) / 255
    words = list(BACKGROUNDS)
    return [words[int(row)] for row in torch.cdist(to_oklab(colours), to_oklab(palette)).argmin(1)]


def visible(pictures: Tensor, ground: Tensor) -> Tensor:
    """b h w, true where a picture differs from its background."""
    lab = to_oklab(pictures.movedim(1, -1)) - to_oklab(ground)[:, None, None]
    return lab.norm(dim=-1) > DIFFERENT


def boxes(mask: Tensor) -> Boxes:
    """Bounding boxes of masks (b h w), a few stray pixels aside; the whole canvas where nothing is visible."""

    def extent(along: Tensor) -> tuple[Tensor, Tensor]:
        """First and last + 1 of what counts, from the visible pixels of each row or column (b n)."""
        length = along.shape[1]
        total = along.sum(1, keepdim=True)
        reached = along.cumsum(1)
        first = (reached <= STRAY * total).sum(1)
        last = (reached < (1 - STRAY) * total).sum(1) + 1
        empty = total[:, 0] == 0
        return first.masked_fill(empty, 0) / length, last.masked_fill(empty, length) / length

    top, bottom = extent(mask.sum(2, dtype=torch.float32))
    left, right = extent(mask.sum(1, dtype=torch.float32))
    return Boxes(x=(left + right) / 2, y=(top + bottom) / 2, width=right - left, height=bottom - top)


def crops(pictures: Tensor, ground: Tensor, size: int) -> Tensor:
    """The visible part of each picture, squared, centred and scaled to `size`: b 4 size size, colour and mask.

    So likeness does not depend on where and how large an object was drawn.
    """
    mask = visible(pictures, ground)
    found = boxes(mask)
    side = pictures.shape[-1]
    planes = torch.cat([pictures, mask[:, None].float()], 1)
    made = torch.empty(len(pictures), 4, size, size)
    for row, picture in enumerate(planes):
        reach = max(4, round(float(found.side[row]) * side * MARGIN / 2))
        x, y = round(float(found.x[row]) * side), round(float(found.y[row]) * side)
        square = torch.cat([ground[row], torch.zeros(1)])[:, None, None].expand(4, 2 * reach, 2 * reach).clone()
        top, left = max(0, y - reach), max(0, x - reach)
        part = picture[:, top : min(side, y + reach), left : min(side, x + reach)]
        down, across = top - (y - reach), left - (x - reach)
        square[:, down : down + part.shape[1], across : across + part.shape[2]] = part
        made[row] = F.interpolate(square[None], (size, size), mode="bilinear", antialias=True)[0]
    return made


def halves(pictures: Tensor, ground: Tensor) -> tuple[Tensor, Tensor]:
    """Both parts of pictures of two things, first the upper or left one; the other part becomes background.

    The cut is the emptiest row or column near the middle.
    """
    mask = visible(pictures, ground)
    side = pictures.shape[-1]
    window = slice(side * 3 // 8, side * 5 // 8)
    middle = (torch.arange(side) - side / 2).abs()[window] * 1e-3  # of equally empty ones the most central
    across = mask.sum(1)[:, window] + middle  # columns: b n
    down = mask.sum(2)[:, window] + middle
    place = torch.arange(side)
    first: list[Tensor] = []
    second: list[Tensor] = []
    for row, picture in enumerate(pictures):
        beside = across[row].min() <= down[row].min()
        cut = window.start + int((across if beside else down)[row].argmin())
        upper = (place[None, :] < cut) if beside else (place[:, None] < cut)
        blank = ground[row][:, None, None]
        first.append(torch.where(upper, picture, blank))
        second.append(torch.where(upper, blank, picture))
    return torch.stack(first), torch.stack(second)


def numbers(pictures: Tensor, ground: Tensor) -> list[int]:
    """How many separate things each picture shows: connected components of the mask, without fragments."""
    mask = visible(pictures, ground).float()[:, None]
    mask = F.avg_pool2d(mask, mask.shape[-1] // 64) > 0.25
    cells = mask[0].numel()
    labels = torch.arange(1, cells + 1, dtype=torch.float32).view(mask.shape[1:]) * mask
    while True:  # every cell takes the largest label around it until nothing changes
        spread = F.max_pool2d(labels, 3, 1, 1) * mask
        if torch.equal(spread, labels):
            break
        labels = spread
    counted: list[int] = []
    for picture in labels:
        areas = torch.bincount(picture.flatten().long())[1:]
        counted.append(int((areas > FRAGMENT * areas.max()).sum()) if picture.any() else 0)
    return counted


def placed(found: Boxes) -> list[str]:
    """The nearest of the places that captions speak of; empty for the middle."""
    spots = torch.tensor([*PLACES.values(), (0.5, 0.5)])
    nearest = torch.cdist(torch.stack([found.x, found.y], 1), spots).argmin(1)
    return [[*PLACES, ""][int(row)] for row in nearest]


def sized(found: Boxes) -> list[str]:
    """The word for each size; empty for the usual one. Limits lie between the sizes that scenes are made with."""
    limits = ((0.285, "tiny"), (0.47, "small"), (0.85, ""))
    assert SIZES["tiny"] < limits[0][0] < SIZES["small"] < limits[1][0] < limits[2][0] < SIZES["big"]
    return [next((word for limit, word in limits if side < limit), "big") for side in found.side.tolist()]


def tones(pictures: Tensor, ground: Tensor) -> Tensor:
    """The mean colour of what is visible, b 3 in OKLab."""
    mask = visible(pictures, ground)[..., None]
    lab = to_oklab(pictures.movedim(1, -1))
    return (lab * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)


class Match(NamedTuple):
    """How a picture compares with every reference. `rank` 1 means that the nearest one shows the right object."""

    rank: int  # 1 + how many (object, style) of other objects are nearer than the right object's nearest
    style: str  # of the right object's nearest reference
    distance: float  # to that one: root mean square over pixels and colours, in 1/255
    nearest: float  # to the nearest of all


class References:
    """Every object in every style, on any background, cropped to 32 x 32: what pictures are compared with."""

    SIDE = 32

    def __init__(self, library: Library) -> None:
        self.library = library
        self._drawn: dict[str, Tensor] = {}
        self._tones: dict[tuple[str, str], Tensor] = {}

    def match(self, picture: Tensor, thing: Object) -> Match:
        """Compare a picture (3 h w) with the references on the background that it has.

        Mirror images count as the same reference.
        """
        ground = grounds(picture[None])
        drawn = self._on(named_grounds(ground)[0])
        shown = _features(picture[None], ground)
        distance = _distance(torch.cat([shown, shown.flip(-1)]), drawn).amin(0).view(-1, len(STYLES))
        row = self.library.rows[thing.name]
        own, style = distance[row].min(0)
        others = torch.cat([distance[:row], distance[row + 1 :]])
        return Match(
            rank=1 + int((others < own).sum()),
            style=STYLES[int(style)],
            distance=float(own),
            nearest=float(distance.min()),
        )

    def apart(self) -> Tensor:
        """How far each object (first style, on white) is from the nearest other object, in 1/255."""
        drawn = self._on("white")[:: len(STYLES)]
        distance = torch.minimum(_distance(drawn, drawn), _distance(drawn.flip(-1), drawn))
        return distance.fill_diagonal_(torch.inf).min(1).values

    def colour(self, picture: Tensor, thing: Object) -> str:
        """The colour word in which a composite of `thing`, in any style, comes nearest to the picture (3 h w).

        Asking per object lets leaves stay green and highlights white.
        """
        ground = grounds(picture[None])
        background = named_grounds(ground)[0]
        key = thing.name, background
        if key not in self._tones:
            scenes = [
                make_scene([(1, thing, colour)], kind="single", style=style, background=background)
                for colour in COLOURS
                for style in STYLES
            ]
            real = compose_all(scenes, self.library, self.library.size // 2)
            self._tones[key] = tones(real, grounds(real))
        distance = (self._tones[key] - tones(picture[None], ground)).norm(dim=1)
        return COLOURS[int(distance.argmin()) // len(STYLES)]

    def _on(self, background: str) -> Tensor:
        """(object style) 3 32 32, the styles of one object after one another."""
        if background not in self._drawn:
            scenes = [
                make_scene([(1, thing, None)], kind="single", style=style, background=background)
                for thing in self.library.objects
                for style in STYLES
            ]
            real = compose_all(scenes, self.library)
            self._drawn[background] = _features(real, grounds(real))
        return self._drawn[background]


def _features(pictures: Tensor, ground: Tensor) -> Tensor:
    """Crops relative to the background's colour, so that a slightly different shade of it does not count."""
    return crops(pictures, ground, References.SIDE)[:, :3] - ground[:, :, None, None]


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """Root mean square difference of each with each, in 1/255."""
    one, other = one.flatten(1), other.flatten(1)
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist") / one.shape[1] ** 0.5 * 255
