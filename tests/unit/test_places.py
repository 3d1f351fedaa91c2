"""Pictures from pictures, by place: inpainting, outpainting, regions, tiles and passes at higher resolutions."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints
import tiny_stable
import torch
from PIL import Image, ImageDraw

import calotype
from calotype.errors import RequestError
from calotype.families.flux.network import FluxTrunk
from calotype.generate import Model, Picture, Progress, denoisers
from calotype.image import read_metadata, save
from calotype.nn.unet import UNet
from calotype.request import HighRes, Region, Request

SIDE = 128
FIELDS: dict[str, Any] = {"prompt": "a red apple", "seed": 3, "steps": 3}


@cache
def model() -> Model[Any]:
    return calotype.load()


@pytest.fixture(scope="module")
def apple() -> Image.Image:
    return one(**FIELDS)


def one(**fields: Any) -> Image.Image:
    drawn = model().generate(Request(**fields))
    assert isinstance(drawn, Image.Image)
    return drawn


def mask(*box: int, side: int = SIDE) -> Image.Image:
    made = Image.new("L", (side, side))
    ImageDraw.Draw(made).rectangle(box, fill=255)
    return made


def pixels(picture: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(picture, dtype=int)


def test_only_what_is_masked_is_drawn_anew(apple: Image.Image) -> None:
    left = mask(0, 0, SIDE // 2 - 1, SIDE)
    fields = FIELDS | {"prompt": "a blue car", "seed": 4, "input_image": apple, "mask_image": left}
    drawn = pixels(one(**fields))
    changed = abs(drawn - pixels(apple))
    again = abs(pixels(one(**FIELDS | {"input_image": apple, "denoising_strength": 0.001})) - pixels(apple))
    assert changed[:, : SIDE // 2].mean() > 10
    # Beyond what the decoder smears over the border, no more than going through the autoencoder changes.
    assert changed[:, SIDE * 3 // 4 :].mean() < 1.5 * again[:, SIDE * 3 // 4 :].mean() + 0.5
    kept = pixels(one(**fields, keep_unmasked=True))
    assert np.array_equal(kept[:, SIDE // 2 :], pixels(apple)[:, SIDE // 2 :])
    assert np.array_equal(kept[:, : SIDE // 2], drawn[:, : SIDE // 2])


def test_a_white_mask_is_no_mask_and_a_black_one_is_refused(apple: Image.Image) -> None:
    fields = FIELDS | {"seed": 4, "input_image": apple, "denoising_strength": 0.6}
    white = one(**fields, mask_image=Image.new("L", (SIDE, SIDE), 255))
    assert np.array_equal(pixels(white), pixels(one(**fields)))
    with pytest.raises(RequestError, match="mask_image: .*white in it"):
        one(**fields, mask_image=Image.new("L", (SIDE, SIDE)))


def test_nothing_is_left_of_what_a_mask_hides(apple: Image.Image) -> None:
    hidden = mask(32, 32, 95, 95)
    other = apple.copy()
    other.paste((0, 0, 255), (32, 32, 96, 96))
    fields = FIELDS | {"prompt": "a green apple", "mask_image": hidden}
    drawn = one(**fields, input_image=apple)
    assert np.array_equal(pixels(drawn), pixels(one(**fields, input_image=other)))
    weaker = [pixels(one(**fields, input_image=picture, denoising_strength=0.6)) for picture in (apple, other)]
    assert not np.array_equal(*weaker)  # there it is what is drawn over


def test_a_feathered_mask_goes_over_softly(apple: Image.Image) -> None:
    fields = FIELDS | {"prompt": "a blue car", "input_image": apple, "mask_image": mask(0, 0, 63, 128)}
    softly = pixels(one(**fields, keep_unmasked=True, mask_feather=16))
    hard = pixels(one(**fields, keep_unmasked=True))
    assert np.array_equal(softly[:, 96:], pixels(apple)[:, 96:])
    changed = abs(softly - pixels(apple))[:, 64:72].mean()
    assert changed > 0
    assert not np.array_equal(softly[:, :64], hard[:, :64])


def test_a_picture_is_extended_and_kept(apple: Image.Image) -> None:
    drawn = one(**FIELDS, input_image=apple, extend=(0, 0, 60, 0), keep_unmasked=True)
    assert drawn.size == (192, SIDE)  # the grain's next multiple
    assert np.array_equal(pixels(drawn)[:, :SIDE], pixels(apple))
    down = one(**FIELDS, input_image=apple, extend=[16, 32, 0, 0], keep_unmasked=True)
    assert down.size[0] % 16 == down.size[1] % 16 == 0
    assert np.array_equal(pixels(down)[32 : 32 + SIDE, 16 : 16 + SIDE], pixels(apple))


def test_metadata_repeats_what_was_asked(apple: Image.Image, tmp_path: Path) -> None:
    for name, picture in (("apple", apple), ("mask", mask(0, 0, 63, 128))):
        picture.save(tmp_path / f"{name}.png")
    fields = FIELDS | {
        "input_image": str(tmp_path / "apple.png"),
        "mask_image": str(tmp_path / "mask.png"),
        "mask_feather": 4,
        "extend": (0, 0, 64, 0),
        "keep_unmasked": True,
        "regions": [{"prompt": "a blue car", "mask": str(tmp_path / "mask.png"), "scale": 2.0}],
        "tiled": True,
    }
    drawn = one(**fields)
    save(drawn, tmp_path / "out.png")
    request, record = read_metadata(tmp_path / "out.png")
    assert record["job"]["regions"] == [{"prompt": "a blue car", "mask": str(tmp_path / "mask.png"), "scale": 2.0}]
    assert np.array_equal(pixels(one(**vars(request))), pixels(drawn))


def test_a_repeated_picture_may_have_other_margins_and_tiles(apple: Image.Image, tmp_path: Path) -> None:
    """What followed from them was never asked for."""
    apple.save(tmp_path / "apple.png")
    fields = FIELDS | {"steps": 1, "input_image": str(tmp_path / "apple.png"), "tiled": True}
    save(one(**fields, extend=(0, 0, 64, 0)), tmp_path / "out.png")
    old, record = read_metadata(tmp_path / "out.png")
    assert (record["job"]["width"], record["job"]["tile_size"]) == (192, SIDE)
    assert one(**vars(replace(old, extend=(64, 0, 64, 0), tiled=False))).size == (256, SIDE)


def test_what_is_kept_is_kept_beside_any_masks_edge_and_says_nothing(apple: Image.Image) -> None:
    noted = apple.copy()
    noted.info |= {"icc_profile": b"what the file said", "dpi": (300, 300)}
    small = mask(0, 0, 15, 31, side=32)
    drawn = one(**FIELDS | {"prompt": "a blue car"}, input_image=noted, mask_image=small, keep_unmasked=True)
    assert np.array_equal(pixels(drawn)[:, 68:], pixels(apple)[:, 68:])
    assert drawn.info.keys() == apple.info.keys()


def test_a_region_that_counts_for_everything_is_its_prompt(apple: Image.Image) -> None:
    everywhere = Image.new("L", (SIDE, SIDE), 255)
    drawn = one(
        **FIELDS | {"prompt": "a blue car"}, regions=[Region(prompt="a red apple", mask=everywhere, scale=1000)]
    )
    assert abs(pixels(drawn) - pixels(apple)).mean() < 1
    nowhere = one(**FIELDS, regions=[Region(prompt="a blue car", mask=everywhere, scale=0)])
    assert abs(pixels(nowhere) - pixels(apple)).max() <= 1


def test_regions_differ_by_place(apple: Image.Image) -> None:
    car = one(**FIELDS | {"prompt": "a blue car"})
    left = Region(prompt="a blue car", mask=mask(0, 0, 63, 128), scale=1000.0)
    drawn = pixels(one(**FIELDS, regions=(left,)))

    def apart(other: Image.Image, columns: slice) -> float:
        return float(abs(drawn - pixels(other))[:, columns].mean())

    assert apart(car, slice(0, 48)) < apart(apple, slice(0, 48))
    assert apart(apple, slice(80, 128)) < apart(car, slice(80, 128))


def test_a_tile_as_large_as_the_picture_is_the_picture(apple: Image.Image) -> None:
    assert np.array_equal(pixels(one(**FIELDS, tiled=True, tile_size=SIDE)), pixels(apple))
    wide = FIELDS | {"width": 256, "height": 128}
    plain = one(**wide)
    tiled = one(**wide, tiled=True, tile_size=128, tile_stride=64)
    assert tiled.size == (256, 128)
    assert not np.array_equal(pixels(tiled), pixels(plain))


def test_a_pass_at_a_higher_resolution_is_a_start_from_the_picture(apple: Image.Image) -> None:
    drawn = one(**FIELDS, high_res=[HighRes(width=192, height=192, strength=0.4, steps=2)])
    by_hand = one(**FIELDS | {"steps": 2, "width": 192, "height": 192, "input_image": apple, "denoising_strength": 0.4})
    assert drawn.size == (192, 192)
    assert np.array_equal(pixels(drawn), pixels(by_hand))
    latent = one(**FIELDS, high_res=[{"width": 192, "height": 192, "strength": 0.4, "upscaler": "latent"}])
    assert latent.size == (192, 192)
    assert not np.array_equal(pixels(latent), pixels(drawn))


def test_progress_counts_stages(apple: Image.Image) -> None:
    request = Request(
        **FIELDS, count=2, high_res=[{"width": 160, "height": 160, "steps": 1}, {"width": 192, "height": 192}]
    )
    events = list(model().stream(request))
    told = [(e.picture, e.stage, e.step, e.steps, e.stages) for e in events if isinstance(e, Progress)]
    first = [(0, 0, n, 3, 3) for n in (1, 2, 3)] + [(0, 1, 1, 1, 3)] + [(0, 2, n, 3, 3) for n in (1, 2, 3)]
    assert told == first + [(1, *rest) for _, *rest in first]
    pictures = [event.image for event in events if isinstance(event, Picture)]
    assert [picture.size for picture in pictures] == [(192, 192)] * 2
    second = one(**FIELDS | {"seed": 4}, high_res=request.high_res)
    assert np.array_equal(pixels(pictures[1]), pixels(second))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mask_image": "mask.png"}, "mask_image: .*without an input_image"),
        ({"extend": (0, 0, 8, 0)}, "extend: .*without an input_image"),
        ({"mask_feather": 4}, "mask_feather: .*without a mask_image"),
        ({"keep_unmasked": True}, "keep_unmasked: .*without a mask_image"),
        ({"input_image": "a.png", "extend": (0, 0, 0, 0)}, "extend: .*not all 0"),
        ({"input_image": "a.png", "extend": (0, -1, 0, 0)}, "extend: got -1"),
        ({"input_image": "a.png", "extend": "0,0,8,0"}, "extend: .*four whole numbers"),
        ({"input_image": "a.png", "mask_image": 5}, "mask_image: got 5"),
        ({"tile_size": 64}, "tile_size: .*nothing is tiled"),
        ({"tiled": 1}, "tiled: got 1"),
        ({"regions": "left"}, "regions: .*a list of Region"),
        ({"regions": [{"prompt": "a"}]}, r"regions\[0\]: .*all that Region needs"),
        ({"regions": [{"prompt": "a", "mask": 7}]}, r"regions\[0\]\.mask: got 7"),
        ({"regions": [{"prompt": "a", "mask": "m.png", "scale": -1}]}, r"regions\[0\]\.scale: got -1"),
        ({"regions": [{"prompt": "a", "mask": "m.png", "weight": 1}]}, r"regions\[0\]\.weight: .*one of the fields"),
        ({"high_res": [{"width": 64, "height": 64}, {"width": 64}]}, r"high_res\[1\]: "),
        ({"high_res": [{"width": 64, "height": 64, "strength": 0}]}, r"high_res\[0\]\.strength: got 0"),
        ({"high_res": [{"width": 64, "height": 64, "upscaler": "magic"}]}, r"upscaler: .*lanczos, latent"),
    ],
)
def test_what_means_nothing_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        Request(prompt="a fox", **fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tiled": True, "tile_size": 72}, "tile_size: .*multiples of 32"),
        ({"tiled": True, "tile_size": 64, "tile_stride": 96}, "tile_stride: .*gaps"),
        ({"high_res": [{"width": 100, "height": 128}]}, r"high_res\[0\]\.width: .*multiples"),
    ],
)
def test_what_the_family_cannot_draw_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        one(**FIELDS, **fields)


def test_steps_that_a_pass_cannot_take_are_refused_before_any_work() -> None:
    large: dict[str, Any] = {"width": 192, "height": 192, "strength": 0.04}
    model().prompts.clear()
    encoded: list[object] = []
    watching = model().family.encoders[0].register_forward_pre_hook(lambda *given: encoded.append(given))
    try:
        with pytest.raises(RequestError, match=r"^high_res\[1\]\.steps: got 50; allowed: at most 40"):
            next(
                model().stream(
                    Request(prompt="a fox", steps=50, schedule="simple", high_res=[large | {"steps": 3}, large])
                )
            )
    finally:
        watching.remove()
    assert not encoded


def test_an_extended_picture_has_its_own_size(apple: Image.Image) -> None:
    with pytest.raises(RequestError, match="width: got 256; allowed: None with extend: 192x128 follows"):
        one(**FIELDS, input_image=apple, extend=(0, 0, 64, 0), width=256)


def test_a_pass_may_draw_another_prompt() -> None:
    large: dict[str, Any] = {"width": 256, "height": 256, "tiled": True}
    passes = [HighRes(**large, strength=0.3, prompt=prompt) for prompt in (None, "")]
    plain, kept = (one(**FIELDS, high_res=[each]) for each in passes)
    small = one(**FIELDS)
    again = one(**FIELDS | {"prompt": "", "input_image": small, "denoising_strength": 0.3}, **large)
    assert np.array_equal(pixels(kept), pixels(again))
    enlarged = pixels(small.resize((256, 256), Image.Resampling.LANCZOS))
    assert abs(pixels(kept) - enlarged).mean() < 0.7 * abs(pixels(plain) - enlarged).mean()  # no apple in each tile


PLACED: dict[str, Any] = {
    "tiles": {"width": 256, "height": 192, "tiled": True},
    "guided tiles": {"width": 256, "height": 192, "tiled": True, "cfg_scale": 3.0, "cfg_rescale": 0.5},
    "regions": {"regions": [Region(prompt="a blue car", mask=mask(0, 0, 63, 127), scale=3)], "cfg_scale": 3.0},
    "regions in tiles": {
        "regions": [Region(prompt="a blue car", mask=mask(0, 0, 63, 127), scale=3)],
        "cfg_scale": 3.0,
        "width": 256,
        "tiled": True,
    },
    "a mask in tiles": {"width": 256, "tiled": True, "mask_image": mask(0, 0, 63, 127)},
}


@pytest.mark.parametrize("fields", PLACED.values(), ids=PLACED.keys())
def test_what_goes_through_together_is_what_goes_through_alone(
    fields: dict[str, Any], apple: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = FIELDS | fields | ({"input_image": apple} if "mask_image" in fields else {})
    rows: list[int] = []
    network = model().family.backbone
    watching = network.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    try:
        together, passes = one(**fields), rows.copy()
        monkeypatch.setattr(denoisers, "TOGETHER", 1)
        alone = one(**fields)
    finally:
        watching.remove()
    assert len(passes) == FIELDS["steps"]
    assert len(rows) - len(passes) >= 2 * len(passes)
    assert max(rows[len(passes) :]) <= 2
    assert abs(pixels(together) - pixels(alone)).max() <= 1


def test_a_pass_takes_no_more_than_a_large_picture_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoisers, "TOGETHER", 5 * 2 * 16 * 16)
    rows: list[int] = []
    watching = model().family.backbone.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    try:
        one(**FIELDS | {"width": 384, "height": 384, "tiled": True, "tile_stride": 64, "cfg_scale": 2.0})
    finally:
        watching.remove()
    assert sum(rows) == 2 * 25 * FIELDS["steps"]
    assert max(rows) == 10


@pytest.fixture
def sdxl(tmp_path: Path) -> Model[Any]:
    return calotype.load(
        tiny_checkpoints.save(tmp_path / "sdxl.safetensors", tiny_stable.sdxl()), *tiny_stable.tokenizers(tmp_path)
    )


def test_text_is_read_once_for_all_tiles(sdxl: Model[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where each tile is told where it was cut: its sizes are no part of what words mean."""
    passes: list[object] = []
    rows: list[int] = []
    for encoder in sdxl.family.encoders:
        encoder.register_forward_pre_hook(lambda *given: passes.append(given[0]))
    read = UNet.read

    def watched(self: UNet, texts: Any, **more: Any) -> Any:
        rows.extend(len(text) for text in texts)
        return read(self, texts, **more)

    monkeypatch.setattr(UNet, "read", watched)
    fields: dict[str, Any] = {"seed": 1, "steps": 1, "width": 192, "height": 192}
    tiles: dict[str, Any] = fields | {"tiled": True, "tile_size": 32, "tile_stride": 16}
    together = sdxl.generate("a fox", **tiles)
    assert len(passes) == 2 * 2  # prompt and negative prompt, not 121 times
    assert rows == [2]
    monkeypatch.setattr(denoisers, "TOGETHER", 1)
    assert isinstance(together, Image.Image)
    alone = sdxl.generate("a fox", **tiles)
    assert isinstance(alone, Image.Image)
    assert abs(pixels(together) - pixels(alone)).max() <= 1
    assert len(passes) == 2 * 2
    assert rows == [2, 2]


def test_what_is_prepared_does_not_grow_with_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of modulation for each prompt, however many tiles have regions."""
    rows: list[int] = []
    prepare = FluxTrunk.prepare

    def watched(self: FluxTrunk, text: torch.Tensor, *given: Any) -> Any:
        rows.append(len(text))
        return prepare(self, text, *given)

    monkeypatch.setattr(FluxTrunk, "prepare", watched)
    monkeypatch.setattr(denoisers, "TOGETHER", 8 * 16 * 16)
    everywhere = Region(prompt="a blue car", mask=Image.new("L", (8, 8), 255))
    one(**FIELDS | {"steps": 1, "width": 512, "height": 512, "tiled": True, "cfg_scale": 1.0}, regions=[everywhere])
    assert rows == [2]


def test_a_region_costs_nothing_where_it_is_not() -> None:
    rows: list[int] = []
    watching = model().family.backbone.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    corner = Region(prompt="a blue car", mask=mask(0, 0, 15, 15))
    nowhere = Region(prompt="a blue car", mask=mask(0, 0, SIDE, SIDE), scale=0)
    fields: dict[str, Any] = FIELDS | {"steps": 1, "width": 320, "height": 320, "tiled": True, "cfg_scale": 1.0}
    try:
        one(**fields, regions=[corner, nowhere])
    finally:
        watching.remove()
    assert sum(rows) == 9 + 1  # tiles, and the one that holds the corner once more
