"""The evaluation asks for what it says it does, counts rightly, and reports what it counted."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from recipes.builtin import card, classifier, evaluate
from recipes.builtin.classifier import Judge, UntrainedJudgeError
from recipes.builtin.library import Library
from recipes.builtin.measure import References, crops, grounds
from recipes.builtin.objects import load_objects
from recipes.builtin.questions import MEASURES, SEEDS, Figure, Judges, Task, share
from recipes.builtin.scenes import held_out_background, held_out_colour, held_out_pair

PLAIN, SYNONYMS, SEEN_GROUND, NEW_GROUND, SEEN_COLOUR, NEW_COLOUR, PAIRS, COUNTS = MEASURES[:8]


def _asked(number: int, count: int = 40) -> list[Task]:
    return MEASURES[number].tasks(np.random.default_rng(number), load_objects(), count)


def test_questions_repeat() -> None:
    for number in range(len(MEASURES)):
        assert _asked(number) == _asked(number)


def test_every_object_is_asked_for_once() -> None:
    objects = load_objects()
    asked = PLAIN.tasks(np.random.default_rng(0), objects, len(objects))
    assert Counter(task.thing.name for task in asked) == Counter(thing.name for thing in objects)


def test_held_out_questions_are_held_out() -> None:
    for number, held in ((2, False), (3, True)):
        assert all(held_out_background(task.thing, task.scene.background) == held for task in _asked(number))
    for number, held in ((4, False), (5, True)):
        for task in _asked(number, 200):
            colour = task.scene.groups[0][2]
            assert colour is not None and held_out_colour(task.thing, colour) == held
            assert task.scene.background.split()[-1] != colour
            assert not held_out_background(task.thing, task.scene.background)  # only one thing is new at a time
            assert colour in task.prompt
    for task in _asked(6):
        first, second = (thing for _, thing, _ in task.scene.groups)
        assert held_out_pair(first, second) and held_out_pair(second, first)


def test_counts_are_asked_in_equal_shares() -> None:
    assert Counter(task.scene.groups[0][0] for task in _asked(7)) == {1: 10, 2: 10, 3: 10, 4: 10}


def test_seeds_share_a_prompt() -> None:
    asked = _asked(len(MEASURES) - 1, 48)
    assert len(asked) == 48
    for first in range(0, 48, SEEDS):
        same = asked[first : first + SEEDS]
        assert len({task.prompt for task in same}) == 1
        assert [task.seed for task in same] == list(range(SEEDS))
        assert len({task.scene for task in same}) == SEEDS


def test_other_words_avoid_the_name() -> None:
    asked = _asked(1)
    assert all(any(word in task.prompt for word in task.thing.synonyms) for task in asked)


def test_figures() -> None:
    half = share([True, True, False, False])
    assert half.value() == 0.5 and half.error() == 0.25
    assert share([True] * 9).error() == 0.0
    assert Figure("median", [1.0, 9.0, 2.0]).value() == 2.0
    mean = Figure("mean", [1.0, 3.0])
    assert mean.value() == 2.0 and math.isclose(mean.error() or 0, 1.0)


@pytest.fixture(scope="module")
def report(library: Library) -> dict[str, Any]:
    """What the evaluation says of real composites of the tiny library, taken for a model's too."""
    torch.manual_seed(0)
    judges = Judges(library, References(library), Judge(len(library.objects)).eval())
    measures = evaluate.evaluate(None, judges, evaluate.Settings(), 12, calibrate=True)
    drawn = {
        title: {name: {**entry["real"], "real": entry["real"]} for name, entry in figures.items()}
        for title, figures in measures.items()
    }
    return {
        "model": "real composites",
        "objects": len(library.objects),
        "classifier on held-out degraded composites": {"top-1": 0.97, "top-5": 1.0},
        "different objects, median distance to the nearest": 40.0,
        "settings": {"steps": 12, "cfg_scale": 2.0, "sampler": "euler", "size": "64x64"},
        "speed": {"seconds": 0.123, "threads": 1, "n": 5},
        "measures": drawn,
    }


def test_real_composites_score_full_marks(report: dict[str, Any]) -> None:
    measures = report["measures"]
    assert set(measures) == {measure.title for measure in MEASURES}
    for title, figure in (
        (PLAIN.title, "retrieval top-1"),
        (PLAIN.title, "background white, as nothing is said"),
        (NEW_GROUND.title, "background"),
        (NEW_COLOUR.title, "colour"),
        (PAIRS.title, "both things, retrieval top-1"),
        (COUNTS.title, "one to four"),
        ("Sizes", "size"),
        ("Places", "place"),
        ("Flat and sticker style", "style"),
    ):
        assert measures[title][figure]["value"] >= 0.9, (title, figure)
    assert measures["Seeds"]["difference between two seeds, mean over prompts"]["value"] > 5


def test_the_table_holds_every_figure(report: dict[str, Any]) -> None:
    text = evaluate.table(report)
    for title, figures in report["measures"].items():
        assert f"**{title}**" in text
        assert all(f"| {name} |" in text for name in figures)


def test_the_card_is_filled_in(report: dict[str, Any], tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1000, 300)}, tmp_path / "model.safetensors")
    text = card.card(report, tmp_path, "cpu", named=24, trained="Not at all.")
    assert "$" not in text
    assert "0.3 million weights" in text and "Not at all." in text
    assert "both things right | 50 % |" in text


def test_what_falls_short_is_called_a_toy(report: dict[str, Any], tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    # The judge is untrained here, so that the gates that ask it are missed.
    text = card.card(report, tmp_path, "cpu", named=3, trained="")
    assert "**A toy" in text and "a person names at sight" in text


def test_a_card_needs_weights(report: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="export the model"):
        card.card(report, tmp_path, "cpu", named=24, trained="")


def test_the_classifier_learns_and_resumes(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(library, objects=library.objects[:3], full=library.full[:, :3], half=library.half[:, :3])
    with pytest.raises(UntrainedJudgeError, match="classifier"):
        classifier.load_judge(tmp_path, small)
    monkeypatch.setattr(classifier, "STEPS", 20)
    assert classifier.train(tmp_path, small, minutes=0.0) == 0
    assert classifier.train(tmp_path, small, minutes=5.0) == 20
    judge = classifier.load_judge(tmp_path, small)
    first, five = classifier.held_out(judge, small, 60)
    assert first > 0.5 and five == 1.0  # three objects


def test_ranks_begin_at_one(library: Library) -> None:
    judge = Judge(len(library.objects)).eval()
    shown = torch.rand(2, 3, 64, 64)
    best = judge(crops(shown, grounds(shown), classifier.SIDE)).argmax(1)
    assert classifier.ranks(judge, shown, [int(row) for row in best]) == [1, 1]
