"""Scenes: what is in a training picture, the picture itself, and a caption that is true of it.

What a caption says always holds; what it leaves open varies from scene to scene, so that seeds come to
differ. `Variety` sets how much is left open: training moves from `FIXED` through `VARIED` to `FREE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from recipes.builtin.colours import BACKGROUNDS, COLOURS, ramps
from recipes.builtin.library import STYLES, Library
from recipes.builtin.objects import Object, share

T = TypeVar("T")
Kind = Literal["single", "sized", "placed", "count", "pair", "related", "mixed"]


@dataclass(frozen=True, kw_only=True)
class Variety:
    """How free scenes and captions are. Probabilities are 0..1; lengths are fractions of the canvas side."""

    kinds: dict[Kind, float]  # weights of the kinds of scene
    most: int  # largest count
    scale: tuple[float, float]  # objects are drawn this much of their nominal size
    shift: float  # centres move by up to this much
    layouts: bool  # counts and pairs in other arrangements than the standing one
    flip: float
    recolour: float
    background: float  # probability of one that is not white
    tint: float  # lightness of a background may differ from its word's by this much
    styles: tuple[float, ...]  # weights, in the order of library.STYLES
    say_usual_style: float  # how often the caption mentions the first style, and
    say_other_style: float  # ... any other one
    synonym: float
    unknown: float  # a word that changes nothing
    decorate: float  # "a picture of ...", "..., high quality"


FIXED = Variety(
    kinds={"single": 0.73, "pair": 0.12, "count": 0.10, "sized": 0.05},
    most=4,
    scale=(1.0, 1.0),
    shift=0.0,
    layouts=False,
    flip=0.0,
    recolour=0.25,
    background=0.6,
    tint=0.0,
    styles=(1.0, 0.0, 0.0),
    say_usual_style=0.04,
    say_other_style=1.0,
    synonym=0.15,
    unknown=0.02,
    decorate=0.06,
)
VARIED = replace(
    FIXED,
    kinds={"single": 0.60, "pair": 0.16, "count": 0.12, "sized": 0.07, "placed": 0.05},
    scale=(0.8, 1.0),
    shift=8 / 128,
    flip=0.5,
    tint=0.04,
    styles=(0.75, 0.25, 0.0),
    say_usual_style=0.25,
    say_other_style=0.85,
    unknown=0.06,
    decorate=0.12,
)
FREE = replace(
    VARIED,
    kinds={
        "single": 0.42,
        "pair": 0.15,
        "count": 0.13,
        "sized": 0.07,
        "placed": 0.08,
        "related": 0.08,
        "mixed": 0.07,
    },  # fmt: skip
    most=6,
    scale=(0.75, 1.0),
    layouts=True,
    recolour=0.3,
    styles=(0.70, 0.20, 0.10),
)
STAGES = {"fixed": FIXED, "varied": VARIED, "free": FREE}


class Item(NamedTuple):
    """One drawn object: `x`, `y` its centre and `size` its longer side, as fractions of the canvas."""

    thing: Object
    style: str
    colour: str | None  # None: as it is
    x: float
    y: float
    size: float
    flip: bool


class Scene(NamedTuple):
    """Everything visible. `groups` are how many of which object, in caption order; `said` is the size, place
    or relation the scene was made to show (empty for none)."""

    kind: Kind
    items: tuple[Item, ...]
    groups: tuple[tuple[int, Object, str | None], ...]
    said: str
    style: str
    background: str
    tint: float


class Box(NamedTuple):
    x: float
    y: float
    size: float


SINGLE = Box(0.5, 0.5, 0.8125)
SIZES = {"tiny": 0.22, "small": 0.36, "big": 0.97}
SIZE_WORDS = {"tiny": ("tiny", "very small"), "small": ("small", "little"), "big": ("big", "large", "huge")}
PLACES = {
    "on the left": (0.25, 0.5), "on the right": (0.75, 0.5),
    "at the top": (0.5, 0.25), "at the bottom": (0.5, 0.75),
    "in the top left corner": (0.25, 0.25), "in the top right corner": (0.75, 0.25),
    "in the bottom left corner": (0.25, 0.75), "in the bottom right corner": (0.75, 0.75),
}  # fmt: skip
BESIDE = (Box(0.25, 0.5, 0.4375), Box(0.75, 0.5, 0.4375))
STACKED = (Box(0.5, 0.25, 0.4375), Box(0.5, 0.75, 0.4375))
CORNERS = tuple(Box(x, y, 0.4375) for y in (0.25, 0.75) for x in (0.25, 0.75))
# The standing arrangement of each number, then the others.
ARRANGED: dict[int, tuple[tuple[Box, ...], ...]] = {
    1: ((SINGLE,),),
    2: (BESIDE, STACKED, (CORNERS[0], CORNERS[3]), (CORNERS[1], CORNERS[2])),
    3: (
        (Box(0.5, 0.25, 0.4375), *CORNERS[2:]),
        (*CORNERS[:2], Box(0.5, 0.75, 0.4375)),
        tuple(Box(x, 0.5, 0.3) for x in (0.17, 0.5, 0.83)),
    ),
    4: (CORNERS, tuple(Box(x, y, 0.3) for x, y in ((0.5, 0.17), (0.17, 0.5), (0.83, 0.5), (0.5, 0.83)))),
    5: ((*(Box(x, y, 0.3) for y in (0.2, 0.8) for x in (0.2, 0.8)), Box(0.5, 0.5, 0.3)),),
    6: (
        tuple(Box(x, y, 0.3) for y in (0.28, 0.72) for x in (0.17, 0.5, 0.83)),
        tuple(Box(x, y, 0.3) for y in (0.17, 0.5, 0.83) for x in (0.28, 0.72)),
    ),
}
# relation -> (boxes of the first and the second thing)
RELATIONS = {
    "to the left of": BESIDE,
    "to the right of": BESIDE[::-1],
    "above": STACKED,
    "below": STACKED[::-1],
}


# What training never shows, so that evaluation can ask for it -----------------------------------------------


def held_out_colour(thing: Object, colour: str) -> bool:
    """1 in 10 of (object, object colour); colours an object has anyway are not held out."""
    return colour not in thing.colours and share("colour", thing.name, colour) < 0.1


def held_out_background(thing: Object, background: str) -> bool:
    """1 in 10 of (object, background); white is not held out."""
    return background != "white" and share("background", thing.name, background) < 0.1


def held_out_pair(first: Object, second: Object) -> bool:
    """30 % of ordered pairs of different objects; the other order may be trained."""
    return first != second and share("pair", first.name, second.name) < 0.3


# Sampling ---------------------------------------------------------------------------------------------------


def sample_scenes(rng: Generator, count: int, variety: Variety, objects: Sequence[Object]) -> list[Scene]:
    """Random scenes of these objects, none of them held out."""
    kinds = list(variety.kinds)
    weights = np.array([variety.kinds[kind] for kind in kinds])
    drawn = rng.choice(len(kinds), size=count, p=weights / weights.sum())
    return [_sample(rng, kinds[index], variety, objects) for index in drawn]


def make_scene(
    groups: Sequence[tuple[int, Object, str | None]],
    *,
    kind: Kind,
    said: str = "",
    style: str = STYLES[0],
    background: str = "white",
    rng: Generator | None = None,
    variety: Variety = FIXED,
) -> Scene:
    """The scene that shows these groups; without `rng` in the standing places. Evaluation builds its
    references so.
    """
    boxes = _boxes(rng, [number for number, _, _ in groups], kind, said, variety)
    things = [(thing, colour) for number, thing, colour in groups for _ in range(number)]
    mirrored = rng is not None and rng.random() < variety.flip  # alike ones face alike
    items: list[Item] = []
    for (thing, colour), box in zip(things, boxes, strict=True):
        if rng is not None and len(groups) > 1:
            mirrored = rng.random() < variety.flip
        items.append(Item(thing, style, colour, box.x, box.y, box.size, mirrored and thing.flips))
    tint = 0.0 if rng is None or background == "white" else float(rng.uniform(-variety.tint, variety.tint))
    return Scene(kind, tuple(items), tuple(groups), said, style, background, tint)


def _sample(rng: Generator, kind: Kind, variety: Variety, objects: Sequence[Object]) -> Scene:
    things = _things(rng, kind, objects)
    colours = tuple(_colour(rng, thing, variety) for thing in things)
    style = STYLES[int(rng.choice(len(STYLES), p=np.array(variety.styles) / sum(variety.styles)))]
    numbers, said = [1] * len(things), ""
    if kind == "sized":
        said = _pick(rng, ("small", "small", "big", "big", "tiny"))
    elif kind == "placed":
        said = _pick(rng, tuple(PLACES))
    elif kind == "related":
        said = _pick(rng, tuple(RELATIONS))
    elif kind == "count":
        numbers = [int(rng.integers(2, variety.most + 1))]
    elif kind == "mixed":
        numbers = list(_pick(rng, ((2, 1), (1, 2), (2, 2), (3, 1), (1, 3), (2, 3), (3, 2), (3, 3))))
    return make_scene(
        list(zip(numbers, things, colours, strict=True)),
        kind=kind,
        said=said,
        style=style,
        background=_background(rng, things, colours, variety),
        rng=rng,
        variety=variety,
    )


def _things(rng: Generator, kind: Kind, objects: Sequence[Object]) -> tuple[Object, ...]:
    while True:
        first = _pick(rng, objects)
        if kind in ("count", "mixed") and not first.plural:
            continue
        if kind in ("single", "sized", "placed", "count"):
            return (first,)
        second = _pick(rng, objects)
        if second != first and not held_out_pair(first, second) and (kind != "mixed" or second.plural):
            return first, second


def _colour(rng: Generator, thing: Object, variety: Variety) -> str | None:
    if not thing.recolours or rng.random() >= variety.recolour:
        return None
    while True:
        colour = _pick(rng, COLOURS)
        if not held_out_colour(thing, colour):
            return None if colour in thing.colours else colour


def _background(rng: Generator, things: Sequence[Object], colours: Sequence[str | None], variety: Variety) -> str:
    """Never the colour an object was given: it has to be seen."""
    if "white" not in colours and rng.random() >= variety.background:
        return "white"
    taken = {"white", *colours}
    for thing in things:
        taken.update(thing.colours if thing.kind == "shape" else ())
    while True:
        background = _pick(rng, tuple(BACKGROUNDS))
        if background.split()[-1] in taken:  # "dark blue" is blue too
            continue
        if not any(held_out_background(thing, background) for thing in things):
            return background


def _boxes(rng: Generator | None, numbers: Sequence[int], kind: Kind, said: str, variety: Variety) -> list[Box]:
    """A box for every object, jittered as far as `variety` and the room between boxes allow."""
    scale, shift = variety.scale, variety.shift
    if kind == "sized":
        boxes = [Box(0.5, 0.5, SIZES[said])]
        scale = (max(scale[0], 0.92), 1.0)  # the word must stay true
        shift = 3 * shift if said != "big" else 0.0
    elif kind == "placed":
        boxes = [Box(*PLACES[said], 0.4375)]
    elif kind == "related":
        boxes = list(RELATIONS[said])
    elif kind == "mixed":
        boxes = _rows(numbers, upright=rng is not None and variety.layouts and rng.random() < 0.3)
    else:
        choices = ARRANGED[sum(numbers)]
        free = rng is not None and variety.layouts and rng.random() < 0.5
        boxes = list(_pick(rng, choices) if rng is not None and free else choices[0])
    if rng is None:
        return boxes
    # Objects alike in number share one scale: "three apples" of one size read best.
    common = float(rng.uniform(*scale))
    return [_jitter(rng, box, common, shift, alone=len(boxes) == 1) for box in boxes]


def _rows(numbers: Sequence[int], *, upright: bool) -> list[Box]:
    """Each group in a row of its own, or in a column of its own."""
    size = min(0.4375, 0.9 / max(numbers))
    boxes: list[Box] = []
    for row, number in enumerate(numbers):
        across = (row + 0.5) / len(numbers)
        for column in range(number):
            along = (
                (column + 0.5) / number if number == max(numbers) else 0.5 + (column - (number - 1) / 2) * size * 1.08
            )
            boxes.append(Box(across, along, size) if upright else Box(along, across, size))
    return boxes


def _jitter(rng: Generator, box: Box, scale: float, shift: float, *, alone: bool) -> Box:
    """Shrink, then move; objects side by side move only within what shrinking freed, so they never touch."""
    size = box.size * scale
    room = shift if alone else min(shift, (box.size - size) / 2 + 0.015)
    limit = max(0.0, 0.49 - size / 2)
    x, y = rng.uniform(-room, room, 2) if room else (0.0, 0.0)
    return Box(
        float(np.clip(box.x + x, 0.5 - limit, 0.5 + limit)),
        float(np.clip(box.y + y, 0.5 - limit, 0.5 + limit)),
        size,
    )


# Captions ---------------------------------------------------------------------------------------------------

NUMBERS = {
    1: ("one",),
    2: ("two", "2"),
    3: ("three", "3"),
    4: ("four", "4"),
    5: ("five", "5"),
    6: ("six", "6"),
}
BESIDE_WORDS = ("and", "and", "and", "next to", "beside", "with")
OPENINGS = (
    "a picture of {}", "an image of {}", "a drawing of {}", "an illustration of {}", "picture of {}",
    "draw {}", "please draw {}", "i want {}", "show me {}", "a photo of {}", "an emoji of {}",
)  # fmt: skip
ENDINGS = ("high quality", "detailed", "4k", "best quality", "clean", "simple", "masterpiece")
IDLE = (
    "nice", "beautiful", "cute", "lovely", "pretty", "awesome", "perfect", "amazing", "great", "good",
    "fancy", "wonderful", "famous", "typical", "ordinary", "magical", "gorgeous", "elegant", "charming",
)  # fmt: skip


def caption(scene: Scene, rng: Generator, variety: Variety = FREE) -> str:
    """A short lower-case description; everything in it is true of the scene."""
    words = [_noun(scene, rng, variety, index) for index in range(len(scene.groups))]
    if scene.kind == "related":
        text = f"{words[0]} {_relation(rng, scene.said)} {words[1]}"
    elif len(words) == 2:
        level = scene.kind == "pair" and abs(scene.items[0].y - scene.items[1].y) < 0.1
        text = f"{words[0]} {_pick(rng, BESIDE_WORDS) if level else 'and'} {words[1]}"
    else:
        text = words[0]
    if scene.kind == "placed":
        text = f"{text} {scene.said if rng.random() < 0.7 else scene.said.replace(' corner', '')}"
    style = ""
    chance = variety.say_usual_style if scene.style == STYLES[0] else variety.say_other_style
    if rng.random() < chance:
        style = scene.style
    lead = style and len(scene.items) == 1 and rng.random() < 0.4
    if lead:
        text = f"{style} {_bare(text)}" if rng.random() < 0.5 else f"a {style} picture of {text}"
    text += _setting(scene, rng)
    if style and not lead:
        text += _pick(rng, (f", {style} style", f" in {style} style", f", {style}", f" {style}"))
    if rng.random() < variety.decorate:
        text = f"{text}, {_pick(rng, ENDINGS)}" if rng.random() < 0.35 else _pick(rng, OPENINGS).format(text)
    return text


def _noun(scene: Scene, rng: Generator, variety: Variety, index: int) -> str:
    """The words for one group: number or article, size, colour, name."""
    number, thing, colour = scene.groups[index]
    many = number > 1
    name = thing.plural if many else thing.name
    if not many and thing.synonyms and rng.random() < variety.synonym:
        name = _pick(rng, thing.synonyms)
    adjectives: list[str] = []
    if rng.random() < variety.unknown:
        adjectives.append(_pick(rng, IDLE) if rng.random() < 0.6 else _nonsense(rng))
    if scene.kind == "sized":
        adjectives.append(_pick(rng, SIZE_WORDS[scene.said]))
    if colour:
        adjectives.append(colour)
    elif thing.colours and rng.random() < 0.2:
        adjectives.append(_pick(rng, thing.colours))
    phrase = " ".join([*adjectives, name])
    if many:
        return f"{_pick(rng, NUMBERS[number]) if rng.random() < 0.3 else NUMBERS[number][0]} {phrase}"
    if scene.kind == "mixed" and rng.random() < 0.5:
        return f"one {phrase}"
    if not thing.plural or name.endswith("s") and name != thing.name or rng.random() < 0.35:
        return phrase
    return f"the {phrase}" if rng.random() < 0.06 else f"{_article(phrase)} {phrase}"


def _setting(scene: Scene, rng: Generator) -> str:
    """The background: always said when it is not white, rarely when it is."""
    if scene.background == "white" and rng.random() >= 0.1:
        return ""
    word = scene.background
    ground = f"{_article(word)} {word} background"
    forms = (f" on {ground}", f" on {ground}", f" on {ground}", f" on {word}", f", {word} background")
    return _pick(rng, (*forms, f" against {ground}", f" with {ground}"))


def _relation(rng: Generator, said: str) -> str:
    forms = {
        "to the left of": ("to the left of", "left of", "on the left of"),
        "to the right of": ("to the right of", "right of", "on the right of"),
        "above": ("above", "over", "on top of"),
        "below": ("below", "under", "underneath"),
    }
    return _pick(rng, forms[said])


def _article(phrase: str) -> str:
    sounds_like_consonant = phrase.startswith(("ufo", "unicorn", "eucalyptus", "one"))
    return "an" if phrase[0] in "aeiou" and not sounds_like_consonant else "a"


def _bare(phrase: str) -> str:
    return phrase.removeprefix("a ").removeprefix("an ").removeprefix("the ")


def _nonsense(rng: Generator) -> str:
    return "".join(_pick(rng, "bdfgklmnprstvz") + _pick(rng, "aeiou") for _ in range(int(rng.integers(2, 4))))


def _pick(rng: Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.random() * len(choices))]


# Pictures ---------------------------------------------------------------------------------------------------

REACH = 8  # source pixels the scaling filter can reach to either side; enough to shrink 3.5 times


def compose(scenes: Sequence[Scene], library: Library, size: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw the scenes: float32 b 3 size size in -1..1, on `device` (where the library should be already)."""
    colours = torch.tensor([_backdrop(scene) for scene in scenes], device=device)
    canvas = colours[:, None, :, None].expand(-1, size, -1, size).contiguous()  # b row colour column
    for layer in range(max(len(scene.items) for scene in scenes)):
        rows = [row for row, scene in enumerate(scenes) if len(scene.items) > layer]
        for small in (False, True):
            chosen = [row for row in rows if (scenes[row].items[layer].size * size <= library.size / 2) == small]
            if chosen:
                drawn = _draw([scenes[row].items[layer] for row in chosen], library, size, device, small=small)
                where = torch.tensor(chosen, device=device)
                canvas[where] = torch.addcmul(drawn[:, :, :3], canvas[where], 1 - drawn[:, :, 3:])
    return canvas.mul_(2).sub_(1).clamp_(-1, 1).transpose(1, 2).contiguous()


def _draw(items: Sequence[Item], library: Library, size: int, device: torch.device | str, *, small: bool) -> Tensor:
    """Single objects, premultiplied: n row plane column, size x size.

    Scaling is a product with one matrix for the rows and one for the columns, whose entries are an anti-
    aliasing cubic filter: exact at every scale and place, and two batched matrix products on any device.
    """
    wanted = [(STYLES.index(item.style), library.rows[item.thing.name], _number(item.colour)) for item in items]
    numbers = torch.tensor(wanted, device=device)
    boxes = torch.tensor([(item.x, item.y, item.size, -1.0 if item.flip else 1.0) for item in items], device=device)
    source = library.half if small else library.full
    picture = _recoloured(source[numbers[:, 0], numbers[:, 1]], numbers[:, 2])  # n row plane column
    x, y, extent, facing = boxes.unbind(1)
    down = _filter(y, extent, torch.ones_like(facing), source.shape[-1], size)
    across = _filter(x, extent, facing, source.shape[-1], size)
    tall = torch.bmm(down, picture.flatten(2)).unflatten(2, (4, -1))
    return torch.bmm(tall.flatten(1, 2), across.transpose(1, 2)).unflatten(1, (size, 4)).clamp_(0, 1)


def _recoloured(planes: Tensor, colour: Tensor) -> Tensor:
    """uint8 n s 6 s to premultiplied float n s 4 s, in the colour of that number where it is not -1."""
    picture = planes[:, :, :4] * (1 / 255)
    changed = (colour >= 0).nonzero()[:, 0]
    if len(changed):
        shade, keep = planes[changed, :, 4].long(), planes[changed, :, 5, None] * (1 / 255)
        painted = ramps(planes.device)[colour[changed, None, None], shade].transpose(2, 3)  # n s 3 s
        own, alpha = picture[changed].split((3, 1), 2)
        picture[changed, :, :3] = torch.lerp(painted * alpha, own, keep)
    return picture


def _filter(centre: Tensor, extent: Tensor, facing: Tensor, source: int, size: int) -> Tensor:
    """n size source: how much each source pixel gives to each canvas pixel (Catmull-Rom, widened when
    shrinking).
    """
    step = source / (extent * size)  # source pixels for one canvas pixel
    target = (torch.arange(size, device=centre.device) + 0.5) - (centre * size)[:, None]
    wanted = facing[:, None] * target * step[:, None] + source / 2
    first = (wanted - REACH).round()
    taps = first[..., None] + torch.arange(2 * REACH, device=centre.device)
    distance = ((taps + 0.5 - wanted[..., None]) / step.clamp(min=1)[:, None, None]).abs_().clamp_(max=2)
    square = distance * distance
    near = (1.5 * distance - 2.5) * square + 1
    far = (2.5 - 0.5 * distance) * square - 4 * distance + 2
    weights = torch.where(distance < 1, near, far)
    weights = weights / weights.sum(-1, keepdim=True)
    # Outside the picture is transparent: those taps go to a margin that is cut off.
    places = (taps.long() + REACH).clamp_(0, source + 2 * REACH - 1)
    inside = (taps >= -REACH) & (taps < source + REACH)
    matrix = torch.zeros(len(centre), size, source + 2 * REACH, device=centre.device)
    return matrix.scatter_add_(2, places, weights * inside)[..., REACH:-REACH]


def _number(colour: str | None) -> int:
    return -1 if colour is None else COLOURS.index(colour)


def _backdrop(scene: Scene) -> tuple[float, ...]:
    return tuple(min(1.0, max(0.0, value / 255 + scene.tint)) for value in BACKGROUNDS[scene.background])
