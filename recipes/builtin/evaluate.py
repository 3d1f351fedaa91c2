"""Measure what the built-in model draws: `python -m recipes.builtin.evaluate --scale cpu --out figures.json`.

Every measure (see `questions`) is applied twice: to what the model draws from captions, and to the captions' own
scenes, composed from the library with the usual jitter. The second figure says how far the measure can be trusted.
Shares come with their binomial standard error. Out come a JSON file and the same as a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calotype.families.flux import FluxModel
from recipes.builtin import classifier
from recipes.builtin.classifier import load_judge
from recipes.builtin.draw import Settings, add_arguments, batch, chosen, pictures
from recipes.builtin.library import load_library
from recipes.builtin.measure import References, compose_all
from recipes.builtin.model import SCALES
from recipes.builtin.questions import MEASURES, Figure, Judges


def speed(model: FluxModel, settings: Settings, count: int = 5) -> dict[str, float]:
    """Seconds for one picture by the engine's ordinary path, prompt to pixels: the median of `count`."""
    list(pictures(model, settings.request("a red apple", 0)))
    spent: list[float] = []
    for seed in range(count):
        began = time.perf_counter()
        pictures(model, settings.request("a red apple", seed))
        spent.append(time.perf_counter() - began)
    return {"seconds": statistics.median(spent), "threads": torch.get_num_threads(), "n": count}


def evaluate(
    model: FluxModel | None, judges: Judges, settings: Settings, limit: int | None, *, calibrate: bool
) -> dict[str, Any]:
    """All measures, of at most `limit` questions each: title -> figure -> value, error, n, and under `real` the same of
    real composites.

    Without a model only real composites are measured; without `calibrate` only the model.
    """
    found: dict[str, Any] = {}
    for number, measure in enumerate(MEASURES):
        objects = judges.library.objects
        count = measure.count or len(objects)
        tasks = measure.tasks(np.random.default_rng(number), objects, min(count, limit or count))
        entry: dict[str, Any] = {}
        if model is not None:
            drawn = batch(model, [task.prompt for task in tasks], [task.seed for task in tasks], settings)
            for name, figure in measure.score(tasks, drawn, judges).items():
                entry[name] = _entry(figure)
        if calibrate:
            real = compose_all([task.scene for task in tasks], judges.library)
            for name, figure in measure.score(tasks, real, judges).items():
                entry.setdefault(name, {})["real"] = _entry(figure)
        found[measure.title] = entry
        print(f"{number + 1} of {len(MEASURES)}: {measure.title}", flush=True)
    return found


def _entry(figure: Figure) -> dict[str, Any]:
    error = figure.error()
    return {
        "kind": figure.kind,
        "value": round(figure.value(), 4),
        "error": None if error is None else round(error, 4),
        "n": len(figure.values),
    }


def table(report: dict[str, Any]) -> str:
    """The report's measures as Markdown."""
    lines = ["| | model | n | real composites |", "|---|---|---|---|"]
    for title, figures in report["measures"].items():
        lines.append(f"| **{title}** | | | |")
        for name, entry in figures.items():
            real = entry.get("real")
            of = entry.get("n") or (real or {}).get("n", "")
            lines.append(f"| {name} | {_cell(entry)} | {of} | {_cell(real or {})} |")
    return "\n".join(lines) + "\n"


def _cell(entry: dict[str, Any]) -> str:
    if "value" not in entry:
        return ""
    if entry["kind"] == "share":
        return f"{100 * entry['value']:.1f} ± {100 * entry['error']:.1f} %"
    error = "" if entry["error"] is None else f" ± {entry['error']:.1f}"
    return f"{entry['value']:.1f}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--count", type=int, help="at most this many questions for each measure")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the table goes beside it as .md")
    parser.add_argument("--real", action="store_true", help="only the calibration, without a model")
    parser.add_argument("--uncalibrated", action="store_true", help="only the model, for a quick look")
    given = parser.parse_args()
    scale = SCALES[given.scale]
    library = load_library(given.data, size=scale.pixels, large=scale.large)
    judges = Judges(library, References(library), load_judge(given.data, library))
    settings = Settings(given.steps, given.cfg_scale)
    model, name = (None, "none") if given.real else chosen(given)
    first, five = classifier.held_out(judges.judge, library)
    report: dict[str, Any] = {
        "model": name,
        "objects": len(library.objects),
        "classifier on held-out degraded composites": {"top-1": round(first, 4), "top-5": round(five, 4)},
        "different objects, median distance to the nearest": round(float(judges.references.apart().median()), 1),
    }
    if model is not None:
        job = settings.request("", 0).complete(model.defaults, seed=0)
        report["settings"] = {
            "steps": job.steps,
            "cfg_scale": job.cfg_scale,
            "sampler": job.sampler,
            "size": str(job.size),
        }
        report["speed"] = speed(model, settings)
    report["measures"] = evaluate(model, judges, settings, given.count, calibrate=not given.uncalibrated)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    given.out.with_suffix(".md").write_text(table(report), "utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
