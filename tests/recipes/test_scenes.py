"""Scenes hold what their captions say, and training never shows what evaluation asks for."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from recipes.builtin.colours import BACKGROUNDS, COLOURS
from recipes.builtin.library import STYLES, Library
from recipes.builtin.objects import Object, load_objects
from recipes.builtin.scenes import (
    FREE,
    NUMBERS,
    PLACES,
    SIZE_WORDS,
    STAGES,
    Scene,
    Variety,
    caption,
    compose,
    held_out_background,
    held_out_colour,
    held_out_pair,
    make_scene,
    sample_scenes,
)

OBJECTS = {thing.name: thing for thing in load_objects()}


def test_what_is_held_out_never_changes() -> None:
    """It is pinned by words: another choice would train on what earlier figures call unseen."""
    held = {
        name: (
            [colour for colour in COLOURS if held_out_colour(OBJECTS[name], colour)],
            [word for word in BACKGROUNDS if held_out_background(OBJECTS[name], word)],
        )
        for name in ("apple", "cat", "rocket")
    }
    assert held == {
        "apple": (["orange", "grey"], ["blue"]),
        "cat": (["brown"], ["black", "dark blue"]),
        "rocket": (["yellow"], ["light blue", "purple"]),
    }
    few = [OBJECTS[name] for name in ("apple", "cat", "rocket", "dog")]
    pairs = {(a.name, b.name) for a in few for b in few if held_out_pair(a, b)}
    assert pairs == {("apple", "cat"), ("cat", "rocket"), ("dog", "rocket")}


def test_shares_held_out() -> None:
    things = load_objects()
    colours = [held_out_colour(a, b) for a in things for b in COLOURS if b not in a.colours]
    backgrounds = [held_out_background(a, b) for a in things for b in BACKGROUNDS if b != "white"]
    pairs = [held_out_pair(a, b) for a in things for b in things if a != b]
    for found, share in ((colours, 0.1), (backgrounds, 0.1), (pairs, 0.3)):
        assert abs(float(np.mean(found)) - share) < 0.02


@pytest.mark.parametrize("variety", STAGES.values(), ids=STAGES)
def test_training_shows_nothing_held_out(variety: Variety) -> None:
    for scene in sample_scenes(np.random.default_rng(0), 1500, variety, load_objects()):
        for _, thing, colour in scene.groups:
            assert not held_out_background(thing, scene.background)
            assert colour is None or not held_out_colour(thing, colour)
        if len(scene.groups) == 2:
            assert not held_out_pair(scene.groups[0][1], scene.groups[1][1])


def _names(thing: Object) -> list[str]:
    return [thing.name, thing.plural or thing.name, *thing.synonyms]


def _said(words: str, text: str) -> bool:
    return re.search(rf"\b{re.escape(words)}\b", text) is not None


@pytest.mark.parametrize("variety", STAGES.values(), ids=STAGES)
def test_captions_are_true(variety: Variety) -> None:
    rng = np.random.default_rng(1)
    for scene in sample_scenes(rng, 1500, variety, load_objects()):
        text = caption(scene, rng, variety)
        assert text == text.lower() and "  " not in text
        assert len(scene.items) == sum(number for number, _, _ in scene.groups)
        for number, thing, colour in scene.groups:
            assert any(_said(name, text) for name in _names(thing)), text
            assert colour is None or _said(colour, text), text
            if number > 1:
                assert any(_said(word, text) for word in NUMBERS[number]), text
                assert _said(thing.plural, text), text
        _check_setting(scene, text)


def _check_setting(scene: Scene, text: str) -> None:
    grounds = re.findall(r"(?:an?|,) ([a-z ]+) background", text)
    assert all(words.endswith(scene.background) for words in grounds), text
    if scene.background != "white":
        assert _said(scene.background, text), text
    spoken = [style for style in STYLES if _said(f"{style} style", text)]
    assert spoken in ([], [scene.style]), text
    if scene.kind == "sized":
        assert any(_said(word, text) for word in SIZE_WORDS[scene.said]), text
    if scene.kind == "placed":
        assert _said(scene.said, text) or _said(scene.said.replace(" corner", ""), text), text


def test_places_and_sizes_are_kept() -> None:
    rng = np.random.default_rng(2)
    for scene in sample_scenes(rng, 1500, FREE, load_objects()):
        for item in scene.items:
            assert item.size / 2 <= min(item.x, item.y, 1 - item.x, 1 - item.y) + 0.02
        if scene.kind == "placed":
            x, y = PLACES[scene.said]
            assert np.hypot(scene.items[0].x - x, scene.items[0].y - y) < 0.15
        if scene.kind == "related":
            first, second = scene.items
            ahead = {
                "to the left of": second.x - first.x,
                "to the right of": first.x - second.x,
                "above": second.y - first.y,
                "below": first.y - second.y,
            }[scene.said]
            assert ahead > 0.3


def test_composites_repeat(library: Library) -> None:
    """The same generator, the same pictures; a batch draws what single pictures do."""
    scenes = sample_scenes(np.random.default_rng(3), 12, FREE, library.objects)
    again = sample_scenes(np.random.default_rng(3), 12, FREE, library.objects)
    assert scenes == again
    together = compose(scenes, library, 64)
    assert together.shape == (12, 3, 64, 64) and together.dtype == torch.float32
    assert_close(together, torch.cat([compose([scene], library, 64) for scene in again]), atol=1e-5, rtol=0)


def test_mirrored_objects(library: Library) -> None:
    thing = library.objects[0]
    scene = make_scene([(1, thing, None)], kind="single")
    mirrored = scene._replace(items=(scene.items[0]._replace(flip=True),))
    straight, flipped = compose([scene], library, 64), compose([mirrored], library, 64)
    assert_close(flipped, straight.flip(-1), atol=1e-4, rtol=0)
