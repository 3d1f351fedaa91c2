"""Random layouts are what they say, the judge looks where it should, and grids hold their pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from recipes.builtin.classifier import Judge
from recipes.builtin.library import Library
from recipes.gallery import Cell, grid, save
from recipes.measure_places import difference, inpainting, placing, psnr
from recipes.places import SIDE, alone, changes, layouts


def test_places_are_apart_and_every_kind_comes(library: Library) -> None:
    made = layouts(library.objects, 30)
    assert {layout.name for layout in made} == {"left and right", "top and bottom", "boxes"}
    assert made == layouts(library.objects, 30)
    for layout in made:
        first, second = (np.asarray(place.mask(), dtype=bool) for place in layout.places)
        assert first.any()
        assert second.any()
        assert not (first & second).any()
        assert layout.things[0] != layout.things[1]


def test_a_change_masks_the_side_that_its_prompt_changes(library: Library) -> None:
    for task in changes(library.objects, 10):
        words = task.asked().split(" and ")
        assert words[task.side].endswith(task.wanted.name)
        assert words[1 - task.side] == task.prompt().split(" and ")[1 - task.side]
        assert np.asarray(task.mask())[:, task.side * SIDE // 2 + 5].min() == 255
        assert np.asarray(task.mask()).mean() == 255 / 2


def test_what_stands_in_a_box_is_shown_alone() -> None:
    picture = Image.new("RGB", (SIDE, SIDE), (250, 250, 250))
    picture.paste((255, 0, 0), (20, 50, 40, 80))
    picture.paste((0, 0, 255), (80, 50, 100, 80))
    shown = np.asarray(alone(picture, (0, 0, 64, 128)))
    assert ((shown == (255, 0, 0)).all(-1)).sum() == 600
    assert not ((shown == (0, 0, 255)).all(-1)).any()


def test_differences_count_outside_the_mask_only() -> None:
    first = Image.new("RGB", (8, 8))
    second, mask = first.copy(), Image.new("L", (8, 8))
    second.putpixel((1, 1), (9, 0, 0))
    assert difference(first, second, mask)[0] == 9
    mask.putpixel((1, 1), 255)
    assert difference(first, second, mask) == (0, 0.0)
    assert psnr(first, first) > 100
    assert psnr(first, second) < 60


def test_measuring_runs_and_sees_what_was_kept(library: Library) -> None:
    """A stand-in that leaves the known part alone, and a judge that guesses."""

    def draw(prompt: str, *, seed: int, **fields: object) -> Image.Image:
        rng = np.random.default_rng(seed + len(prompt))
        drawn = Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))
        begun, mask = fields.get("input_image"), fields.get("mask_image")
        if not fields.get("keep_unmasked"):
            return drawn
        assert isinstance(begun, Image.Image)
        assert isinstance(mask, Image.Image)
        return Image.composite(drawn, begun, mask)

    torch.manual_seed(0)
    judge = Judge(len(library.objects)).eval()
    changed = inpainting(draw, judge, library, 2)
    assert changed["largest difference outside the mask, kept"] == 0
    assert changed["largest difference outside the mask, not kept"] > 100
    found = placing(draw, judge, library, 3)
    assert found["each thing in its place"]["one prompt, no regions"]["n"] == 6


def test_a_grid_holds_its_pictures_and_stays_small(tmp_path: Path) -> None:
    red, wide = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (128, 32), "blue")
    sheet = grid([[Cell(red, "a red square with many, many words below it")], [Cell(wide, "wide")]], "Title", side=64)
    assert sheet.getpixel((12 + 32, 48 + 32)) == (255, 0, 0)
    assert sheet.width == 256 + 24
    file = tmp_path / "made" / "grid.png"
    save(sheet, file)
    with Image.open(file) as read:
        assert read.size == sheet.size
