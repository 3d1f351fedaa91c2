"""What the built-in model is asked for, and how its answers are judged.

A question is a caption together with a scene of which it is true. `MEASURES` lists kinds of questions with
the figures read off the pictures; `evaluate` puts them to a model and to the scenes' own composites alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal, NamedTuple

from numpy.random import Generator
from torch import Tensor

from recipes.builtin import classifier
from recipes.builtin.classifier import Judge
from recipes.builtin.colours import BACKGROUNDS, COLOURS
from recipes.builtin.library import STYLES, Library
from recipes.builtin.measure import References, boxes, grounds, halves, named_grounds, numbers, placed, sized, visible
from recipes.builtin.objects import Object
from recipes.builtin.scenes import (
    FREE,
    PLACES,
    RELATIONS,
    SIZES,
    Kind,
    Scene,
    caption,
    held_out_background,
    held_out_colour,
    held_out_pair,
    make_scene,
)

# Captions are plain: usual names, nothing idle in them, every other style said.
ASKED = replace(FREE, synonym=0, unknown=0, decorate=0, say_usual_style=0, say_other_style=1)
SEEDS = 6  # of each prompt, where variety is measured


# Kind, what is said, number: prompts that leave place, size or facing open.
LEFT_OPEN: tuple[tuple[Kind, str, int], ...] = (
    ("single", "", 1),
    ("count", "", 2),
    ("sized", "small", 1),
    ("pair", "", 1),
)


class Task(NamedTuple):
    """A caption to draw, and a scene of which it is true."""

    prompt: str
    scene: Scene
    seed: int

    @property
    def thing(self) -> Object:
        return self.scene.groups[0][1]


class Figure(NamedTuple):
    """What one measure found: a share of right pictures, or a median or mean of numbers."""

    kind: Literal["share", "median", "mean"]
    values: list[float]

    def value(self) -> float:
        return statistics.median(self.values) if self.kind == "median" else statistics.fmean(self.values)

    def error(self) -> float | None:
        """Standard error: binomial for shares, of the mean for means, none for medians."""
        n = len(self.values)
        if self.kind == "share":
            return math.sqrt(self.value() * (1 - self.value()) / n)
        return statistics.stdev(self.values) / math.sqrt(n) if self.kind == "mean" and n > 1 else None


Figures = dict[str, Figure]


class Judges(NamedTuple):
    """What judges pictures."""

    library: Library
    references: References
    judge: Judge

    def named(self, shown: Tensor, things: Sequence[Object]) -> list[int]:
        """The classifier's rank of the right object in each picture."""
        return classifier.ranks(self.judge, shown, [self.library.rows[thing.name] for thing in things])

    def matched(self, shown: Tensor, things: Sequence[Object]) -> list[int]:
        """The rank of the right object's nearest reference for each picture."""
        return [self.references.match(one, thing).rank for one, thing in zip(shown, things, strict=True)]


Tasks = Callable[[Generator, Sequence[Object], int], list[Task]]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """`tasks` makes questions from a generator, the objects and a number; `score` judges the answers."""

    title: str
    count: int | None  # how many questions; None: one for each object
    tasks: Tasks
    score: Callable[[Sequence[Task], Tensor, Judges], Figures]


def share(values: Sequence[bool]) -> Figure:
    return Figure("share", [float(value) for value in values])


def both(one: Sequence[bool], other: Sequence[bool]) -> list[bool]:
    return [a and b for a, b in zip(one, other, strict=True)]


def within(ranks: Sequence[int], limit: int) -> list[bool]:
    return [rank <= limit for rank in ranks]


# What is asked for ------------------------------------------------------------------------------------------


def _task(
    rng: Generator,
    seed: int,
    *groups: tuple[int, Object, str | None],
    kind: Kind = "single",
    said: str = "",
    style: str = STYLES[0],
    background: str = "white",
    synonym: bool = False,
) -> Task:
    scene = make_scene(groups, kind=kind, said=said, style=style, background=background, rng=rng, variety=FREE)
    words = replace(ASKED, synonym=1.0) if synonym else ASKED
    return Task(caption(scene, rng, words), scene, seed)


def _some(rng: Generator, objects: Sequence[Object], count: int) -> list[Object]:
    """Random objects, none twice before all were taken once."""
    rounds = -(-count // len(objects))
    order = [int(row) for _ in range(rounds) for row in rng.permutation(len(objects))]
    return [objects[row] for row in order[:count]]


def _plain(rng: Generator, objects: Sequence[Object], count: int) -> list[Task]:
    return [_task(rng, seed, (1, thing, None)) for seed, thing in enumerate(_some(rng, objects, count))]


def _synonyms(rng: Generator, objects: Sequence[Object], count: int) -> list[Task]:
    known = [thing for thing in objects if thing.synonyms]
    things = _some(rng, known, count)
    return [_task(rng, seed, (1, thing, None), synonym=True) for seed, thing in enumerate(things)]


def _backgrounds(held_out: bool) -> Tasks:
    def tasks(rng: Generator, objects: Sequence[Object], count: int) -> list[Task]:
        combos = [
            (thing, word)
            for thing in objects
            for word in BACKGROUNDS
            if word != "white"
            and held_out_background(thing, word) == held_out
            and not (thing.kind == "shape" and word.split()[-1] in thing.colours)  # it has to be seen
        ]
        chosen_rows = rng.permutation(len(combos))[:count]
        return [
            _task(rng, seed, (1, combos[row][0], None), background=combos[row][1])
            for seed, row in enumerate(chosen_rows)
        ]

    return tasks


def _colours(held_out: bool) -> Tasks:
    def tasks(rng: Generator, objects: Sequence[Object], count: int) -> list[Task]:
        combos = [
            (thing, colour)
            for thing in objects
            if thing.recolours
            for colour in COLOURS
            if colour not in thing.colours and held_out_colour(thing, colour) == held_out
        ]
        made: list[Task] = []
        for seed, row in enumerate(rng.permutation(len(combos))[:count]):
            thing, colour = combos[row]
            # A white object needs another background, one that training shows behind this object.
            others = [word for word in ("light blue", "blue", "teal", "green") if not held_out_background(thing, word)]
            background = others[0] if colour == "white" else "white"
            made.append(_task(rng, seed, (1, thing, colour), background=background))
        return made

    return tasks


def _pairs(rng: Generator, objects: Sequence[Object], count: int) -> list[Task]:
    """Pairs that training shows in neither order."""
    made: list[Task] = []
    while len(made) < count:
        first, second = (objects[int(row)] for row in rng.choice(len(objects), 2, replace=False))
        if held_out_pair(first, second) and held_out_pair(second, first):
            made.append(_task(rng, len(made), (1, first, None), (1, second, None), kind="pair"))
    return made


def _counts(rng: Generator, objects: Sequence[Object], count: int) -> list[Task]:
    """One to four of what is countable, in equal shares. What falls into parts by itself is left out."""
    whole = [thing for thing in objects if thing.plural and thing.name not in ("sparkles", "socks")]
    things = _some(rng, whole, count)
    return [
        _task(rng, seed, (seed % 4 + 1, thing, None), kind="count" if seed % 4 else "single")
        for seed, thing in enumerate(things)
    ]


def _said(kind: Kind, words: Sequence[str]) -> Tasks:
    """Sizes, places or relations, in equal shares."""

    def tasks(rng: Generator, objects: Sequence[Object], count: int) -> list[Task]:
        made: list[Task] = []
        while len(made) < count:
            first, second = (objects[int(row)] for row in rng.choice(len(objects), 2, replace=False))
            groups = ((1, first, None), (1, second, None)) if kind == "related" else ((1, first, None),)
            if kind != "related" or not held_out_pair(first, second):
                made.append(_task(rng, len(made), *groups, kind=kind, said=words[len(made) % len(words)]))
        return made

    return tasks


def _styles(rng: Generator, objects: Sequence[Object], count: int) -> list[Task]:
    things = _some(rng, objects, count)
    return [
        _task(rng, seed, (1, thing, None), style=STYLES[1 + seed % (len(STYLES) - 1)])
        for seed, thing in enumerate(things)
    ]


def _free(rng: Generator, objects: Sequence[Object], count: int) -> list[Task]:
    """The same prompt with several seeds, beside as many different scenes of which it is true."""
    made: list[Task] = []
    counted = [thing for thing in objects if thing.plural]
    for number, thing in enumerate(_some(rng, counted, max(len(LEFT_OPEN), count // SEEDS))):
        other = objects[int(rng.integers(len(objects)))]
        kind, said, many = LEFT_OPEN[number % len(LEFT_OPEN)]
        groups: list[tuple[int, Object, str | None]] = [(many, thing, None)]
        if kind == "pair" and other != thing:
            groups.append((1, other, None))
        asked = [_task(rng, seed, *groups, kind=kind, said=said) for seed in range(SEEDS)]
        # "and" says least of a pair, so it is true of each of the scenes.
        prompt = min((task.prompt for task in asked), key=lambda text: (" and " not in text, len(text)))
        made.extend(task._replace(prompt=prompt) for task in asked)
    return made


# What is looked at ------------------------------------------------------------------------------------------


def _objects(tasks: Sequence[Task], shown: Tensor, judges: Judges) -> Figures:
    things = [task.thing for task in tasks]
    matches = [judges.references.match(picture, thing) for picture, thing in zip(shown, things, strict=True)]
    ranks = [match.rank for match in matches]
    named = judges.named(shown, things)
    grounded = named_grounds(grounds(shown))
    return {
        "retrieval top-1": share(within(ranks, 1)),
        "retrieval top-5": share(within(ranks, 5)),
        "retrieval, median rank": Figure("median", [float(rank) for rank in ranks]),
        "classifier top-1": share(within(named, 1)),
        "classifier top-5": share(within(named, 5)),
        "background white, as nothing is said": share([word == "white" for word in grounded]),
        "distance to the nearest training picture, median": Figure("median", [match.nearest for match in matches]),
    }


def _named(tasks: Sequence[Task], shown: Tensor, judges: Judges) -> Figures:
    named = judges.named(shown, [task.thing for task in tasks])
    return {"object (classifier top-1)": share(within(named, 1))}


def _grounded(tasks: Sequence[Task], shown: Tensor, judges: Judges) -> Figures:
    named = within(judges.named(shown, [task.thing for task in tasks]), 1)
    seen = named_grounds(grounds(shown))
    right = [word == task.scene.background for word, task in zip(seen, tasks, strict=True)]
    return {
        "background": share(right),
        "object (classifier top-1)": share(named),
        "both": share(both(right, named)),
    }


def _coloured(tasks: Sequence[Task], shown: Tensor, judges: Judges) -> Figures:
    things, colours = [task.thing for task in tasks], [task.scene.groups[0][2] for task in tasks]
    named = within(judges.named(shown, things), 1)
    seen = [judges.references.colour(picture, thing) for picture, thing in zip(shown, things, strict=True)]
    right = [one == other for one, other in zip(seen, colours, strict=True)]
    return {
        "colour": share(right),
        "object (classifier top-1)": share(named),
        "both": share(both(right, named)),
    }


Ranks = Callable[[Tensor, Sequence[Object]], list[int]]


def _two(tasks: Sequence[Task], shown: Tensor, ranks: Ranks) -> list[tuple[int, int, bool]]:
    """The ranks of the first and the second thing, each in the part of the picture that suits both best.

    The last is true where the first thing is in the left or upper part.
    """
    parts = halves(shown, grounds(shown))
    first, second = ([task.scene.groups[row][1] for task in tasks] for row in (0, 1))
    straight = zip(ranks(parts[0], first), ranks(parts[1], second), strict=True)
    crossed = zip(ranks(parts[1], first), ranks(parts[0], second), strict=True)
    return [
        (*one, True) if sum(one) <= sum(other) else (*other, False)
        for one, other in zip(straight, crossed, strict=True)
    ]


def _paired(tasks: Sequence[Task], shown: Tensor, judges: Judges) -> Figures:
    figures: Figures = {}
    for name, ranks in (("classifier", judges.named), ("retrieval", judges.matched)):
        found = _two(tasks, shown, ranks)
        each = [rank for first, second, _ in found for rank in (first, second)]
        figures[f"each thing, {name} top-1"] = share(within(each, 1))
        figures[f"each thing, {name} top-5"] = share(within(each, 5))
        figures[f"both things, {name} top-1"] = share([first == second == 1 for first, second, _ in found])
    return figures


def _counted(tasks: Sequence[Task], shown: Tensor, judges: Judges) -> Figures:
    seen = numbers(shown, grounds(shown))
    right = [number == task.scene.groups[0][0] for number, task in zip(seen, tasks, strict=True)]
    figures: Figures = {"one to four": share(right)}
    for number, word in enumerate(("one", "two", "three", "four"), 1):
        some = [hit for hit, task in zip(right, tasks, strict=True) if task.scene.groups[0][0] == number]
        if some:
            figures[word] = share(some)
    return figures


def _sized(tasks: Sequence[Task], shown: Tensor, judges: Judges) -> Figures:
    seen = sized(boxes(visible(shown, grounds(shown))))
    return {"size": share([word == task.scene.said for word, task in zip(seen, tasks, strict=True)])}


def _placed(tasks: Sequence[Task], shown: Tensor, judges: Judges) -> Figures:
    seen = placed(boxes(visible(shown, grounds(shown))))
    return {"place": share([word == task.scene.said for word, task in zip(seen, tasks, strict=True)])}


def _related(tasks: Sequence[Task], shown: Tensor, judges: Judges) -> Figures:
    found = _two(tasks, shown, judges.named)
    first, second = (boxes(visible(part, grounds(shown))) for part in halves(shown, grounds(shown)))
    across = (second.x - first.x).abs() > (second.y - first.y).abs()
    named = [one == other == 1 for one, other, _ in found]
    right = [
        task.scene.said
        == (("to the left of", "to the right of") if beside else ("above", "below"))[0 if leading else 1]
        for task, beside, (_, _, leading) in zip(tasks, across.tolist(), found, strict=True)
    ]
    return {"both things (classifier top-1)": share(named), "both, and where they should be": share(both(named, right))}


def _styled(tasks: Sequence[Task], shown: Tensor, judges: Judges) -> Figures:
    matches = [judges.references.match(picture, task.thing) for picture, task in zip(shown, tasks, strict=True)]
    right = [match.style == task.scene.style for match, task in zip(matches, tasks, strict=True)]
    known = [match.rank == 1 for match in matches]
    return {"style": share(right), "object (retrieval top-1)": share(known), "both": share(both(right, known))}


def _varied(tasks: Sequence[Task], shown: Tensor, judges: Judges) -> Figures:
    """Mean absolute difference between pictures of one prompt, in 1/255."""
    differences = [
        float((one - other).abs().mean() * 255)
        for first in range(0, len(shown), SEEDS)
        for one, other in combinations(shown[first : first + SEEDS], 2)
    ]
    per_prompt = len(differences) * SEEDS // len(shown)
    means = [statistics.fmean(differences[k : k + per_prompt]) for k in range(0, len(differences), per_prompt)]
    return {"difference between two seeds, mean over prompts": Figure("mean", means)}


MEASURES = (
    Measure(title="Trained objects, alone", count=None, tasks=_plain, score=_objects),
    Measure(title="Trained objects by other words", count=100, tasks=_synonyms, score=_named),
    Measure(title="Trained object and background", count=100, tasks=_backgrounds(False), score=_grounded),
    Measure(title="Object and background never trained together", count=100, tasks=_backgrounds(True), score=_grounded),
    Measure(title="Trained object and its colour", count=100, tasks=_colours(False), score=_coloured),
    Measure(title="Object and its colour never trained together", count=100, tasks=_colours(True), score=_coloured),
    Measure(title="Two things, a pair never trained", count=100, tasks=_pairs, score=_paired),
    Measure(title="Counts", count=100, tasks=_counts, score=_counted),
    Measure(title="Sizes", count=100, tasks=_said("sized", tuple(SIZES)), score=_sized),
    Measure(title="Places", count=100, tasks=_said("placed", tuple(PLACES)), score=_placed),
    Measure(title="Left, right, above, below", count=100, tasks=_said("related", tuple(RELATIONS)), score=_related),
    Measure(title="Flat and sticker style", count=100, tasks=_styles, score=_styled),
    Measure(title="Seeds", count=72, tasks=_free, score=_varied),
)
