"""Measures are right on composites, where the truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from recipes.builtin.colours import BACKGROUNDS, COLOURS
from recipes.builtin.library import STYLES, Library
from recipes.builtin.measure import (
    References,
    boxes,
    compose_all,
    crops,
    grounds,
    halves,
    named_grounds,
    numbers,
    placed,
    sized,
    visible,
)
from recipes.builtin.scenes import FREE, PLACES, SIZES, Kind, Scene, make_scene


@pytest.fixture(scope="module")
def references(library: Library) -> References:
    return References(library)


def _scene(library: Library, row: int, number: int = 1, *, kind: Kind = "single", said: str = "") -> Scene:
    rng = np.random.default_rng(row)
    return make_scene([(number, library.objects[row], None)], kind=kind, said=said, rng=rng, variety=FREE)


def test_backgrounds(library: Library) -> None:
    scenes = [make_scene([(1, library.objects[0], None)], kind="single", background=word) for word in BACKGROUNDS]
    assert named_grounds(grounds(compose_all(scenes, library))) == list(BACKGROUNDS)


def test_background_survives_stray_corner_pixels() -> None:
    picture = torch.full((1, 3, 64, 64), 0.5)
    picture[..., :1, :] = 0.0
    assert_close(grounds(picture), torch.full((1, 3), 0.5))


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_numbers(library: Library, number: int) -> None:
    kind: Kind = "count" if number > 1 else "single"
    scenes = [_scene(library, row, number, kind=kind) for row in range(len(library.objects))]
    shown = compose_all(scenes, library)
    assert numbers(shown, grounds(shown)) == [number] * len(scenes)


def test_nothing_is_no_object() -> None:
    blank = torch.ones(2, 3, 64, 64)
    assert numbers(blank, grounds(blank)) == [0, 0]
    assert boxes(visible(blank, grounds(blank))).side.tolist() == [1.0, 1.0]


def test_fragments_do_not_count() -> None:
    picture = torch.ones(1, 3, 64, 64)
    picture[..., 10:40, 10:40] = 0.0
    picture[..., 55:59, 55:59] = 0.0  # 16 pixels beside 900
    assert numbers(picture, grounds(picture)) == [1]


def test_places_and_sizes(library: Library) -> None:
    for kind, words, read in (("placed", PLACES, placed), ("sized", SIZES, sized)):
        scenes = [_scene(library, row % 12, kind=kind, said=word) for row, word in enumerate(words)]
        shown = compose_all(scenes, library)
        assert read(boxes(visible(shown, grounds(shown)))) == list(words)
    usual = compose_all([_scene(library, row) for row in range(12)], library)
    found = boxes(visible(usual, grounds(usual)))
    assert placed(found) == sized(found) == [""] * 12


def test_crops_forget_place_and_size(library: Library) -> None:
    large, another = (make_scene([(1, thing, None)], kind="single") for thing in library.objects[3:5])
    moved = large._replace(items=(large.items[0]._replace(x=0.3, y=0.6, size=0.5),))
    shown = compose_all([large, moved, another], library)
    one, same, other = crops(shown, grounds(shown), 16)
    assert 3 * (one - same).abs().mean() < (one - other).abs().mean()


def test_halves_hold_one_thing_each(library: Library, references: References) -> None:
    rng, variety = np.random.default_rng(0), replace(FREE, scale=(0.95, 1.0))  # 64 pixels are few
    pairs = [(library.objects[a], library.objects[b]) for a, b in ((0, 1), (2, 5), (7, 3), (9, 10))]
    for relation, leading in (("to the left of", 0), ("to the right of", 1), ("above", 0), ("below", 1)):
        scenes = [
            make_scene([(1, a, None), (1, b, None)], kind="related", said=relation, rng=rng, variety=variety)
            for a, b in pairs
        ]
        shown = compose_all(scenes, library)
        first, second = halves(shown, grounds(shown))
        for row, pair in enumerate(pairs):
            assert references.match(first[row], pair[leading]).rank == 1
            assert references.match(second[row], pair[1 - leading]).rank == 1


def test_references_know_their_own(library: Library, references: References) -> None:
    for row, thing in enumerate(library.objects):
        for style in STYLES:
            scene = make_scene([(1, thing, None)], kind="single", style=style, background="teal")
            match = references.match(compose_all([scene], library)[0], thing)
            assert match.rank == 1 and match.style == style and match.distance < 1
        moved = references.match(compose_all([_scene(library, row)], library)[0], thing)
        assert moved.rank == 1 and moved.nearest == moved.distance < float(references.apart()[row])


def test_a_wrong_object_ranks_low(library: Library, references: References) -> None:
    shown = compose_all([_scene(library, 0)], library)[0]
    assert references.match(shown, library.objects[5]).rank > 1


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_of_objects(library: Library, references: References, colour: str) -> None:
    background = "teal" if colour == "white" else "white"
    for thing in library.objects:
        if thing.recolours:
            scene = make_scene([(1, thing, colour)], kind="single", background=background)
            assert references.colour(compose_all([scene], library)[0], thing) == colour
