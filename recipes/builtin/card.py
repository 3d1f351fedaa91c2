"""Write the model card from measured figures.

    python -m recipes.builtin.card --figures figures.json --folder src/calotype/builtin --named 21 \\
        --trained "3,200 steps of 32 scenes, four hours on two CPU cores."

`--named` is how many of the 24 common prompts a person named at sight; that no command can measure.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from safetensors import safe_open

from recipes.builtin.draw import COMMON
from recipes.builtin.evaluate import table
from recipes.builtin.model import SCALES

ALONE, PAIRS = "Trained objects, alone", "Two things, a pair never trained"
TEMPLATE = Path(__file__).with_name("card.md.in")


class Gate(NamedTuple):
    """One thing the model has to reach: `title` and `figure` name the entry of the report."""

    words: str
    title: str
    figure: str
    wanted: float


GATES = (
    Gate("trained objects: retrieval top-5", ALONE, "retrieval top-5", 0.8),
    Gate(
        "object and its colour never trained together: both right",
        "Object and its colour never trained together",
        "both",
        0.8,
    ),
    Gate(
        "object and background never trained together: both right",
        "Object and background never trained together",
        "both",
        0.8,
    ),
    Gate(
        "pairs never trained: both things right",
        PAIRS,
        "both things, classifier top-1",
        0.5,
    ),
)
NAMED = 20  # of the common prompts

# What can be asked for, in words, and the figure that says how often it comes.
ABILITIES = (
    ("one object", ALONE, "classifier top-1"),
    ("an object by another of its names", "Trained objects by other words", "object (classifier top-1)"),
    ("a background colour", "Object and background never trained together", "background"),
    ("an object on a coloured background, both right", "Object and background never trained together", "both"),
    ("an object in another colour, both right", "Object and its colour never trained together", "both"),
    ("two objects at once, both right", PAIRS, "both things, classifier top-1"),
    ("the right number, one to four", "Counts", "one to four"),
    ("tiny, small or big", "Sizes", "size"),
    ("a place in the picture", "Places", "place"),
    (
        "one thing left of, right of, above or below another",
        "Left, right, above, below",
        "both, and where they should be",
    ),
    ("flat or sticker style", "Flat and sticker style", "both"),
)


def card(report: dict[str, Any], folder: Path, scale_name: str, named: int, trained: str) -> str:
    """The card's text. `folder` holds the weights as safetensors files."""
    scale = SCALES[scale_name]
    weights = sorted(folder.rglob("*.safetensors"))
    if not weights:
        raise FileNotFoundError(f"{folder}: no safetensors files; export the model there first")
    missed = missing(report, named)
    measures: dict[str, Any] = report["measures"]
    alone = measures[ALONE]["distance to the nearest training picture, median"]
    seeds = measures["Seeds"]["difference between two seeds, mean over prompts"]
    verdict = (
        "It reaches what was asked of it (the first table below)."
        if not missed
        else "A toy: it falls short of what was asked of it in: " + "; ".join(missed) + "."
    )
    threads = int(report["speed"]["threads"])
    return Template(TEMPLATE.read_text("utf-8")).substitute(
        megabytes=f"{sum(file.stat().st_size for file in weights) / 1e6:.0f}",
        parameters=f"{sum(map(_parameters, weights)) / 1e6:.1f}",
        pixels=scale.pixels,
        objects=report["objects"],
        seconds=f"{report['speed']['seconds']:.2g}",
        threads=threads,
        threads_word="thread" if threads == 1 else "threads",
        verdict=verdict,
        abilities=abilities(report),
        width=scale.transformer.width,
        joint=scale.transformer.joint_blocks,
        single=scale.transformer.single_blocks,
        t5_layers=scale.t5.layers,
        clip_layers=scale.clip.layers,
        pieces=f"{scale.t5.vocabulary:,}",
        channels=scale.vae.latent_channels,
        trained=trained,
        steps=report["settings"]["steps"],
        sampler=report["settings"]["sampler"],
        cfg_scale=f"{report['settings']['cfg_scale']:g}",
        gates=gates(report, named),
        table=table(report),
        judge_one=f"{100 * report['classifier on held-out degraded composites']['top-1']:.0f} %",
        copied=f"{alone['value']:.0f}",
        composed=f"{alone['real']['value']:.0f}",
        apart=f"{report['different objects, median distance to the nearest']:.0f}",
        varied=f"{seeds['value']:.0f}",
        varied_real=f"{seeds['real']['value']:.0f}",
    )


def reached(report: dict[str, Any], gate: Gate) -> float:
    return float(report["measures"][gate.title][gate.figure]["value"])


def missing(report: dict[str, Any], named: int) -> list[str]:
    """What was wanted and not reached, in words."""
    words = [gate.words for gate in GATES if reached(report, gate) < gate.wanted]
    return words if named >= NAMED else ["common prompts that a person names at sight", *words]


def gates(report: dict[str, Any], named: int) -> str:
    """What was wanted and what was reached, as a Markdown table."""
    lines = ["| | wanted | reached |", "|---|---|---|"]
    lines.append(f"| common prompts that a person names at sight | {NAMED} of {len(COMMON)} | {named} |")
    for gate in GATES:
        lines.append(f"| {gate.words} | {100 * gate.wanted:.0f} % | {100 * reached(report, gate):.1f} % |")
    return "\n".join(lines)


def abilities(report: dict[str, Any]) -> str:
    """What it does nearly always, often and seldom, as a Markdown list with percentages."""
    levels: dict[str, list[str]] = {"Nearly always": [], "Often": [], "Seldom": []}
    for words, title, figure in ABILITIES:
        value = float(report["measures"][title][figure]["value"])
        level = "Nearly always" if value >= 0.8 else "Often" if value >= 0.5 else "Seldom"
        levels[level].append(f"{words} ({100 * value:.0f} %)")
    return "\n".join(f"- {level}: {'; '.join(words)}." for level, words in levels.items() if words)


def _parameters(file: Path) -> int:
    total = 0
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a mapping)
            size = 1
            for side in tensors.get_slice(name).get_shape():
                size *= int(side)
            total += size
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, required=True, help="what evaluate wrote")
    parser.add_argument("--folder", type=Path, required=True, help="where the model is; README.md is written there")
    parser.add_argument("--scale", choices=sorted(SCALES), default="cpu")
    parser.add_argument("--named", type=int, required=True, help="common prompts a person named, of 24")
    parser.add_argument("--trained", required=True, help="how long, on what: a sentence or two")
    given = parser.parse_args()
    report: dict[str, Any] = json.loads(given.figures.read_text("utf-8"))
    file = given.folder / "README.md"
    file.write_text(card(report, given.folder, given.scale, given.named, given.trained), "utf-8")
    print(file)


if __name__ == "__main__":
    main()
