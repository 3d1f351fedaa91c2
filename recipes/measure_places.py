"""Measure what inpainting, regions and passes at higher resolutions do with the built-in model.

    python -m recipes.builtin.fetch --data DATA         once: the pictures
    python -m recipes.builtin.classifier --data DATA    once, nine minutes: the judge
    python -m recipes.measure_places --data DATA [--count 50] [--only regions ...] [--save]

The judge names one of 218 things at a place; chance is 1 in 218. `--save` keeps the result in
benchmarks/results/builtin-places-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import calotype
from calotype.image import to_tensor
from recipes.builtin.classifier import Judge, load_judge, ranks
from recipes.builtin.fetch import DATA
from recipes.builtin.library import Library, load_library
from recipes.figures import measured_by
from recipes.places import EMPTY, SIDE, alone, changes, layouts, phrase, regions

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "builtin-places-cpu.json"
Draw = Callable[..., Image.Image]
STRENGTHS = (0.15, 0.3, 0.6)


def share(hits: Sequence[bool]) -> dict[str, float]:
    """A share with its binomial standard error."""
    value = sum(hits) / len(hits)
    return {
        "share": round(value, 3),
        "error": round((value * (1 - value) / len(hits)) ** 0.5, 3),
        "n": len(hits),
    }


def right(judge: Judge, picture: Image.Image, boxes: Sequence[tuple[int, int, int, int]], row: int) -> bool:
    """Whether the judge names that thing, at first guess, in every box."""
    shown = torch.stack([to_tensor(alone(picture, box)) for box in boxes])
    return all(rank == 1 for rank in ranks(judge, shown, [row] * len(boxes)))


def difference(first: Image.Image, second: Image.Image, mask: Image.Image) -> tuple[int, float]:
    """Largest and mean difference outside a mask, in levels of 255."""
    apart = np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int))[np.asarray(mask) == 0]
    return int(apart.max()), float(apart.mean())


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Peak signal to noise ratio of the second, scaled to the first's size, in dB."""
    scaled = np.asarray(second.resize(first.size, Image.Resampling.LANCZOS), dtype=float)
    error = float(((np.asarray(first, dtype=float) - scaled) ** 2).mean())
    return 10 * float(np.log10(255**2 / max(error, 1e-9)))


def inpainting(draw: Draw, judge: Judge, library: Library, count: int) -> dict[str, Any]:
    """Pairs of which one is changed: what became of the mask, and of all else."""
    kept: list[int] = []
    loose: list[tuple[int, float]] = []
    hits: dict[str, list[bool]] = {"before": [], "asked with a mask": [], "asked anew, without the picture": []}
    apart: list[float] = []
    for task in changes(library.objects, count):
        row, box, mask = library.rows[task.wanted.name], task.box(), task.mask()
        before = draw(task.prompt(), seed=task.seed)
        own: dict[str, Any] = {"input_image": before, "mask_image": mask, "seed": task.seed + 1000}
        after = draw(task.asked(), keep_unmasked=True, **own)
        without = draw(task.asked(), seed=task.seed + 1000)
        kept.append(difference(before, after, mask)[0])
        loose.append(difference(before, draw(task.asked(), **own), mask))
        apart.append(difference(before, without, mask)[1])
        for name, picture in zip(hits, (before, after, without), strict=True):
            hits[name].append(right(judge, picture, [box], row))
    return {
        "largest difference outside the mask, kept": max(kept),
        "largest difference outside the mask, not kept": max(most for most, _ in loose),
        "mean difference outside the mask, not kept": round(float(np.mean([mean for _, mean in loose])), 2),
        "mean difference outside the mask, drawn anew": round(float(np.mean(apart)), 2),
        "the asked thing is there": {name: share(values) for name, values in hits.items()},
    }


def placing(draw: Draw, judge: Judge, library: Library, count: int) -> dict[str, Any]:
    """Two things in two places: each where it should be, both, and by the kind of layout."""
    ways = ("regions, as many as stand there", "regions, one thing each", "one prompt, no regions")
    each: dict[str, list[bool]] = {way: [] for way in ways}
    both: dict[str, list[bool]] = {way: [] for way in ways}
    kinds: dict[str, list[bool]] = {}
    failed: list[str] = []
    for layout in layouts(library.objects, count):
        drawn = (
            draw(EMPTY, seed=layout.seed, regions=regions(layout)),
            draw(EMPTY, seed=layout.seed, regions=regions(layout, counted=False)),
            draw(layout.together(), seed=layout.seed),
        )
        for way, picture in zip(ways, drawn, strict=True):
            found = [
                right(judge, picture, place.boxes, library.rows[thing.name])
                for thing, place in zip(layout.things, layout.places, strict=True)
            ]
            each[way] += found
            both[way].append(all(found))
            if way == ways[0]:
                kinds.setdefault(layout.name, []).extend(found)
                names = zip(layout.things, found, strict=True)
                failed += [f"{thing.plural}, {layout.name}" for thing, hit in names if not hit]
    return {
        "chance": round(1 / len(library.objects), 4),
        "each thing in its place": {way: share(values) for way, values in each.items()},
        "both in their places": {way: share(values) for way, values in both.items()},
        "each, by layout": {kind: share(values) for kind, values in kinds.items()},
        "not there": failed,
    }


def enlarged(
    draw: Draw,
    prompt: str,
    seed: int,
    strength: float,
    side: int = 1024,
    *,
    again: str | None = "",
    led: Path | None = None,
) -> Image.Image:
    """128 to 256, 512, ... `side`, in tiles of the model's own size; `again` is what they draw, None for the prompt.

    `led` is the folder of a ControlNet that sees the picture that is there.
    """
    sides = [256 << k for k in range((side // 256).bit_length())]
    own: dict[str, Any] = {"strength": strength, "steps": 3, "tiled": True, "prompt": again}
    if led is not None:
        own |= {"controls": [{"kind": "tile", "model": str(led)}]}
    passes = [{"width": n, "height": n, **own} for n in sides]
    tiles = {"tile_size": SIDE, "tile_stride": 96}
    return draw(prompt, seed=seed, cfg_scale=1.0, high_res=passes, **tiles)


def identity(
    draw: Draw, judge: Judge, library: Library, names: Sequence[str], side: int, led: Path | None
) -> dict[str, Any]:
    """Whether a picture that was enlarged and drawn over is still the first one, by strength; and lanczos alone.

    Also led by the ControlNet for tiles, where its folder is given.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for name in names:
        row = library.rows[name]
        thing = library.objects[row]
        first = draw(phrase(thing), seed=1, cfg_scale=1.0)
        ways: list[tuple[str, str | None, Path | None]] = [("no prompt", "", None), ("the same prompt", None, None)]
        if led is not None:
            ways.append(("the same prompt, led by the tile ControlNet", None, led))
        made = {
            f"strength {value}, {said}": enlarged(draw, phrase(thing), 1, value, side, again=again, led=leader)
            for said, again, leader in ways
            for value in STRENGTHS
        }
        made["lanczos"] = first.resize((side, side), Image.Resampling.LANCZOS)
        for way, picture in made.items():
            entry = found.setdefault(way, {"psnr": [], "named": []})
            entry["psnr"].append(psnr(first, picture))
            small = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            entry["named"].append(float(right(judge, small, [(0, 0, SIDE, SIDE)], row)))
    return {
        way: {"psnr dB": round(float(np.mean(entry["psnr"])), 1), "named as before": round(np.mean(entry["named"]), 2)}
        for way, entry in found.items()
    } | {"n": len(names), "side": side}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the recipe of the built-in model")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--side", type=int, default=1024, help="of the passes at higher resolutions")
    parser.add_argument("--only", nargs="*", choices=("inpainting", "regions", "high_res"))
    parser.add_argument("--save", action="store_true", help="keep the result, and what it says of other parts")
    given = parser.parse_args()
    library = load_library(given.data, size=SIDE, large=False)
    judge = load_judge(given.data, library)
    draw: Any = calotype.load().generate
    wanted = given.only or ("inpainting", "regions", "high_res")
    named = ("apple", "penguin", "car", "crown")
    tile: Path = given.data / "adapters" / "tile"  # made by `python -m recipes.adapters.controlnet tile`
    led = tile if tile.exists() else None
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "inpainting": lambda: inpainting(draw, judge, library, given.count),
        "regions": lambda: placing(draw, judge, library, given.count),
        "high_res": lambda: identity(draw, judge, library, named, given.side, led),
    }
    result: dict[str, Any] = json.loads(RESULT.read_text("utf-8")) if given.save and RESULT.exists() else {}
    for part in wanted:
        began = time.perf_counter()
        result[part] = {
            **measured_by(f"python -m recipes.measure_places --only {part} --count {given.count} --side {given.side}"),
            **parts[part](),
            "seconds": round(time.perf_counter() - began),
        }
        print(json.dumps({part: result[part]}, indent=1), flush=True)
        if given.save:
            RESULT.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
