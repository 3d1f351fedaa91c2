"""The example recipes for large pictures: every family takes its own, and they say what the seed system's did."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from calotype.families import FAMILIES
from calotype.request import Defaults, Request

EXAMPLE = Path(__file__).parents[2] / "examples" / "high_resolution.py"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("high_resolution", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECIPES: dict[str, dict[str, Any]] = example().RECIPES
# Side, strength, steps, tiles: DiffSynth-Studio's README of 2024.
SHOWN: dict[str, tuple[int, int, list[tuple[int, float, int, bool]]]] = {
    "sd1": (512, 80, [(1024, 0.7, 40, False), (2048, 0.7, 20, False), (4096, 0.5, 10, True)]),
    "sdxl": (1024, 60, [(2048, 0.5, 60, False)]),
    "sd3": (1024, 50, [(2048, 0.5, 50, True)]),
    "kolors": (1024, 50, [(2048, 0.4, 50, False)]),
    "hunyuan_dit": (1024, 50, [(2048, 0.4, 50, True)]),
    "flux": (1024, 30, [(2048, 0.6, 30, True)]),
    "turbo": (512, 1, []),
}


def defaults(recipe: str) -> Defaults:
    family, variant = {"turbo": ("sdxl", "turbo"), "flux": ("flux", "dev"), "hunyuan_dit": ("hunyuan_dit", "1.2")}.get(
        recipe, (recipe, None)
    )
    variants = next(each.variants for each in FAMILIES if each.name == family)
    return next(iter(variants.values())) if variant is None else variants[variant]


@pytest.mark.parametrize("name", SHOWN)
def test_a_recipe_is_the_one_that_was_shown_and_its_family_takes_it(name: str) -> None:
    job = Request(prompt="a lighthouse", **RECIPES[name]).complete(defaults(name), seed=1)
    side, steps, passes = SHOWN[name]
    assert (job.width, job.height, job.steps) == (side, side, steps)
    stages = [job.at(number) for number in range(len(job.high_res))]
    assert [(each.width, each.denoising_strength, each.steps, each.tiled) for each in stages] == passes
    assert all(each.height == each.width for each in stages)


def test_values_that_are_not_the_families_own() -> None:
    assert RECIPES.keys() == SHOWN.keys()
    jobs = {name: Request(prompt="", **RECIPES[name]).complete(defaults(name), seed=1) for name in SHOWN}
    assert (jobs["kolors"].cfg_scale, jobs["turbo"].cfg_scale, jobs["flux"].embedded_guidance) == (4, 1, 3.5)
    assert (jobs["sd1"].at(2).tile_size, jobs["sd1"].at(2).tile_stride) == (1024, 512)  # latents: 128 and 64


@pytest.mark.parametrize("name", SHOWN)
def test_a_recipe_at_a_fraction_of_its_sizes_is_taken_too(name: str) -> None:
    known = defaults(name)
    small: dict[str, Any] = example().scaled(RECIPES[name], 0.25, known.grain)
    assert Request(prompt="a lighthouse", **small).complete(known, seed=1).width == SHOWN[name][0] // 4
