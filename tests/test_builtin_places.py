"""What the built-in model makes of masks, regions, extensions and passes: seen in the picture, without a judge."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import calotype
from calotype import HighRes, Region

THINGS = ("pizza", "penguin", "apple", "car")
CORNERS = ((0, 0), (64, 0), (0, 64), (64, 64))


@pytest.fixture(scope="module")
def model() -> calotype.Model[object]:
    return calotype.load()


@pytest.fixture(scope="module")
def fours(model: calotype.Model[object]) -> dict[str, np.ndarray]:
    """Four of each thing, one in each corner."""
    return {thing: drawn(model, f"four {thing}s", seed=11) for thing in THINGS}


def drawn(model: calotype.Model[object], prompt: str, **fields: object) -> np.ndarray:
    picture = model.generate(prompt, **fields)
    assert isinstance(picture, Image.Image)
    return np.asarray(picture, dtype=float)


def nearest(picture: np.ndarray, corner: int, fours: dict[str, np.ndarray]) -> str:
    """The thing whose own picture is most like this one in a corner."""
    x, y = CORNERS[corner]
    place = np.s_[y : y + 64, x : x + 64]
    return min(fours, key=lambda thing: abs(picture[place] - fours[thing][place]).mean())


def masked(*corners: int) -> Image.Image:
    mask = Image.new("L", (128, 128), 0)
    for corner in corners:
        x, y = CORNERS[corner]
        mask.paste(255, (x, y, x + 64, y + 64))
    return mask


def test_regions_put_things_in_their_places(model: calotype.Model[object], fours: dict[str, np.ndarray]) -> None:
    layouts = (
        ("pizza", (0,), "penguin", (3,)),
        ("apple", (1,), "car", (2,)),
        ("penguin", (0, 1), "apple", (2, 3)),
        ("car", (0, 2), "pizza", (1, 3)),
        ("apple", (0, 3), "penguin", (1, 2)),
        ("pizza", (2,), "car", (0, 1)),
    )
    right = 0
    for number, (first, there, second, elsewhere) in enumerate(layouts):
        regions = [
            Region(prompt=f"four {first}s", mask=masked(*there), scale=20),
            Region(prompt=f"four {second}s", mask=masked(*elsewhere), scale=20),
        ]
        picture = drawn(model, "a tiny circle on a white background", seed=number, regions=regions)
        found = [nearest(picture, corner, fours) == first for corner in there]
        found += [nearest(picture, corner, fours) == second for corner in elsewhere]
        right += all(found)
    assert right >= 5


def test_inpainting_changes_the_mask_and_nothing_else(
    model: calotype.Model[object], fours: dict[str, np.ndarray]
) -> None:
    before = Image.fromarray(fours["apple"].astype(np.uint8))
    mask = masked(3)
    own = {"input_image": before, "mask_image": mask, "seed": 2}
    after = drawn(model, "four cars", keep_unmasked=True, **own)
    outside = np.asarray(mask) == 0
    assert (after[outside] == fours["apple"][outside]).all()
    assert nearest(after, 3, fours) == "car"
    through = drawn(model, "four cars", **own)
    assert abs(through - fours["apple"])[outside].mean() < 8


def test_extending_draws_on_what_is_there(model: calotype.Model[object]) -> None:
    whole = model.generate("a pizza and a penguin", seed=1)
    assert isinstance(whole, Image.Image)
    half = whole.crop((0, 0, 64, 128))
    picture = drawn(model, "a pizza and a penguin", seed=2, input_image=half, extend=(0, 0, 64, 0), keep_unmasked=True)
    assert picture.shape == (128, 128, 3)
    assert (picture[:, :64] == np.asarray(half)).all()
    assert abs(picture[:, 64:] - np.asarray(whole, dtype=float)[:, 64:]).mean() < 16


def test_passes_at_higher_resolutions_keep_the_picture(model: calotype.Model[object]) -> None:
    first = model.generate("a penguin", seed=1, cfg_scale=1.0)
    assert isinstance(first, Image.Image)
    large = model.generate(
        "a penguin",
        seed=1,
        cfg_scale=1.0,
        high_res=(HighRes(width=256, height=256, strength=0.1, steps=2, tiled=True, tile_size=128),),
    )
    assert isinstance(large, Image.Image)
    assert large.size == (256, 256)
    small = np.asarray(large.resize((128, 128), Image.Resampling.LANCZOS), dtype=float)
    same, other = (
        abs(small - np.asarray(picture, dtype=float)).mean()
        for picture in (first, model.generate("a castle", seed=1, cfg_scale=1.0))
    )
    assert same < 12
    assert same < other / 2
