"""What a request accepts, and how a family completes it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from PIL import Image

from calotype.errors import RequestError
from calotype.request import MAX_PROMPT, MAX_SEED, MAX_STEPS, SIZES, Control, Defaults, Job, Request, Size, fingerprint
from calotype.request.pictures import resized_mask

DEFAULTS = Defaults(
    width=1024,
    height=768,
    grain=16,
    steps=28,
    cfg_scale=1.0,
    embedded_guidance=3.5,
    sampler="euler",
    schedule="linear",
    shift=None,
    text_tokens=512,
    samplers=("euler", "heun"),
    schedules=("linear", "beta"),
    shifts=True,
)
TOLD = replace(DEFAULTS, clip_skip=2, sizes=True, width=512, height=512, grain=8)
NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", None),
        ("prompt", 5),
        ("prompt", b"a fox"),
        ("prompt", "x" * (MAX_PROMPT + 1)),
        ("prompt", "x" * 100_000),
        ("prompt", "caf\udce9"),
        ("negative_prompt", None),
        ("width", 0),
        ("width", -16),
        ("width", 512.0),
        ("width", "512"),
        ("width", 10**9),
        ("height", True),
        ("steps", 0),
        ("steps", MAX_STEPS + 1),
        ("steps", 2.5),
        ("cfg_scale", NAN),
        ("cfg_scale", INFINITY),
        ("cfg_scale", -1),
        ("cfg_scale", 10**400),
        ("cfg_scale", "7"),
        ("cfg_scale", False),
        ("cfg_rescale", None),
        ("cfg_rescale", 1.5),
        ("cfg_rescale", NAN),
        ("embedded_guidance", -INFINITY),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("seed", 1e6),
        ("count", 0),
        ("count", 1001),
        ("count", None),
        ("shift", 0),
        ("shift", NAN),
        ("text_tokens", 0),
        ("text_tokens", 5000),
        ("clip_skip", 0),
        ("clip_skip", 33),
        ("clip_skip", 1.0),
        ("input_image", 5),
        ("input_image", b"picture.png"),
        ("input_image", np.zeros((8, 8, 3))),
        ("input_image", True),
        ("denoising_strength", 0),
        ("denoising_strength", 0.0),
        ("denoising_strength", -0.5),
        ("denoising_strength", 1.01),
        ("denoising_strength", NAN),
        ("denoising_strength", True),
        ("denoising_strength", "0.5"),
        ("original_width", 0),
        ("original_width", 16_385),
        ("original_height", 0),
        ("original_height", 1024.0),
        ("crop_left", -1),
        ("crop_left", 16_385),
        ("crop_top", -1),
        ("crop_top", False),
        ("target_width", 0),
        ("target_height", 0),
        ("target_height", "1024"),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        Request.from_dict(
            {"prompt": "a fox", **({"input_image": "x.png"} if "strength" in field else {}), field: value}
        )
    assert caught.value.field == field
    assert caught.value.value is value
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ""},
        {"prompt": "x" * MAX_PROMPT},
        {"prompt": "狐 🦊\0\n"},
        {"seed": 0},
        {"seed": MAX_SEED},
        {"cfg_scale": 0},
        {"cfg_scale": 100.0},
        {"cfg_rescale": 1},
        {"steps": MAX_STEPS},
        {"count": 1000},
        {"clip_skip": 1},
        {"clip_skip": 32},
        {"input_image": "x.png", "denoising_strength": 1},
        {"input_image": "x.png", "denoising_strength": 1e-9},
        {"crop_left": 0, "crop_top": 16_384},
        {"original_width": 1, "target_height": 16_384},
    ],
)
def test_the_edges_are_accepted(fields: dict[str, Any]) -> None:
    assert Request.from_dict({"prompt": "a fox", **fields}).to_dict().items() >= fields.items()


def test_replacing_a_field_checks_again() -> None:
    with pytest.raises(RequestError, match="steps"):
        replace(Request(prompt="a fox"), steps=0)


def test_unknown_fields_and_a_missing_prompt_are_refused() -> None:
    with pytest.raises(RequestError, match="stepz.*one of the fields.*steps"):
        Request.from_dict({"prompt": "a fox", "stepz": 3})
    with pytest.raises(RequestError, match="prompt"):
        Request.from_dict({"steps": 3})


def test_plain_values_leave_out_what_the_family_decides() -> None:
    request = Request(prompt="a fox", steps=3)
    assert request.to_dict() == {"prompt": "a fox", "negative_prompt": "", "steps": 3, "cfg_rescale": 0.0, "count": 1}
    assert Request.from_dict(request.to_dict()) == request


def test_silence_means_the_familys_default() -> None:
    job = Request(prompt="a fox").complete(DEFAULTS, seed=9)
    assert asdict(job) == {
        "prompt": "a fox",
        "negative_prompt": "",
        "width": 1024,
        "height": 768,
        "steps": 28,
        "cfg_scale": 1.0,
        "cfg_rescale": 0.0,
        "embedded_guidance": 3.5,
        "seed": 9,
        "count": 1,
        "sampler": "euler",
        "schedule": "linear",
        "shift": None,
        "text_tokens": 512,
        **dict.fromkeys(("clip_skip", "input_image", "input_name", "denoising_strength", *SIZES)),
        **dict.fromkeys(("mask_image", "mask_name", "extend", "tile_size", "tile_stride")),
        **dict.fromkeys(("loras", "regions", "region_masks", "controls", "control_images", "high_res"), ()),
        **dict.fromkeys(("image_prompts", "prompt_images", "pass_images", "pass_tiles", "fingerprints", "follows"), ()),
        **dict.fromkeys(("keep_unmasked", "tiled"), False),
        "mask_feather": 0,
    }
    assert job.size == Size(1024, 768)


def test_what_is_said_stands() -> None:
    said: dict[str, Any] = {
        "prompt": "a fox",
        "negative_prompt": "snow",
        "width": 64,
        "height": 32,
        "steps": 1,
        "cfg_scale": 0.0,
        "cfg_rescale": 0.5,
        "embedded_guidance": 0.0,
        "seed": 0,
        "count": 2,
        "sampler": "heun",
        "schedule": "beta",
        "shift": 3.0,
        "text_tokens": 7,
        "clip_skip": 1,
        "original_width": 1001,
        "original_height": 1002,
        "crop_left": 3,
        "crop_top": 4,
        "target_width": 1005,
        "target_height": 1006,
    }
    unused = {"input_image": None, "denoising_strength": None}
    assert Request.from_dict(said).complete(TOLD, seed=9).to_dict() == {**said, **unused}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 33}, "width: got 33; allowed: multiples of 16; the nearest valid size is 32x768"),
        ({"width": 1030, "height": 1}, "the nearest valid size is 1024x16"),
        ({"height": 1000}, "height: got 1000.*1024x1008"),
        ({"sampler": "eular"}, "sampler: got 'eular'; allowed: one of euler, heun"),
        ({"sampler": ""}, "sampler: got ''; allowed: one of euler, heun"),
        ({"schedule": "karras"}, "schedule: got 'karras'; allowed: one of linear, beta"),
        ({"schedule": ""}, "schedule: got ''; allowed: one of linear, beta"),
    ],
)
def test_what_the_family_cannot_do_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Request.from_dict({"prompt": "a fox", **fields}).complete(DEFAULTS, seed=0)


def test_guidance_without_an_input_for_it_is_refused() -> None:
    plain = replace(DEFAULTS, embedded_guidance=None)
    with pytest.raises(RequestError, match="no guidance input; use cfg_scale"):
        Request(prompt="a fox", embedded_guidance=3.5).complete(plain, seed=0)
    assert Request(prompt="a fox").complete(plain, seed=0).embedded_guidance is None


@pytest.mark.parametrize(
    ("fields", "without", "message"),
    [
        ({"clip_skip": 1}, {"clip_skip": None}, "clip_skip: got 1; allowed: None: this model leaves no choice there"),
        ({"text_tokens": 9}, {"text_tokens": None}, "text_tokens: got 9; allowed: None: this model leaves no choice"),
        ({"shift": 3}, {"shifts": False}, "shift: got 3; allowed: None: this model's schedules have no shift"),
        *(({name: 512}, {"sizes": False}, f"{name}: got 512; .*: this model is not told sizes") for name in SIZES),
    ],
)
def test_what_a_model_has_no_use_for_is_refused(fields: dict[str, Any], without: dict[str, Any], message: str) -> None:
    request = Request.from_dict({"prompt": "a fox", **fields})
    with pytest.raises(RequestError, match=message):
        request.complete(replace(TOLD, **without), seed=0)
    (name,) = fields
    assert getattr(request.complete(TOLD, seed=0), name) == fields[name]


def test_families_have_use_for_what_their_networks_take() -> None:
    from calotype.families import flux, kolors, sd1, sdxl

    sizes = set(SIZES)
    for defaults, useless in (
        (flux.DEV_DEFAULTS, {"clip_skip", *sizes}),
        (flux.SCHNELL_DEFAULTS, {"clip_skip", "embedded_guidance", *sizes}),
        (sd1.DEFAULTS, {"text_tokens", "embedded_guidance", "shift", *sizes}),
        (sdxl.DEFAULTS, {"text_tokens", "embedded_guidance", "shift"}),
        (sdxl.TURBO_DEFAULTS, {"text_tokens", "embedded_guidance", "shift"}),
        (kolors.DEFAULTS, {"clip_skip", "embedded_guidance", "shift"}),
    ):
        assert set(defaults.useless) == useless


def test_sizes_that_are_told_follow_the_picture_and_the_request() -> None:
    def told(**said: int) -> list[int | None]:
        job = Request.from_dict({"prompt": "a fox", "width": 640, "height": 384, **said}).complete(TOLD, seed=0)
        return [getattr(job, name) for name in SIZES]

    assert told() == [640, 384, 0, 0, 640, 384]
    assert told(original_height=100, crop_left=7) == [640, 100, 7, 0, 640, 384]
    assert told(crop_top=0, target_width=9) == [640, 384, 0, 0, 9, 384]


def test_a_pass_is_told_what_the_same_job_by_hand_is() -> None:
    def told(defaults: Defaults, **said: Any) -> tuple[list[int | None], list[int | None]]:
        there: dict[str, Any] = {"width": 1280, "height": 1280}
        first = Request.from_dict({"prompt": "", "width": 1024, "height": 1024, "high_res": [there], **said})
        by_hand = Request.from_dict({"prompt": "", **there, **said}).complete(defaults, seed=0)
        at = first.complete(defaults, seed=0).at(0)
        return [getattr(at, name) for name in SIZES], [getattr(by_hand, name) for name in SIZES]

    for defaults in (TOLD, replace(TOLD, original_size=(1024, 1024))):
        for said in ({}, {"original_width": 1024}, {"target_height": 1024}, {"crop_top": 64}):
            at, by_hand = told(defaults, **said)
            assert at == by_hand


def tiles_of(*passes: dict[str, Any], **said: Any) -> tuple[tuple[int, int] | None, ...]:
    high_res = [{"width": 2048, "height": 2048, **each} for each in passes]
    return Request.from_dict({"prompt": "", "high_res": high_res, **said}).complete(DEFAULTS, seed=0).pass_tiles


def test_what_a_pass_does_not_say_of_its_tiles_is_the_requests() -> None:
    tiled: dict[str, Any] = {"tiled": True, "tile_size": 512, "tile_stride": 128}
    assert tiles_of({}, {"tile_size": 256}, {"tile_stride": 64}, **tiled) == ((512, 128), (256, 128), (512, 64))
    assert tiles_of({"tile_size": 256}, tiled=True) == ((256, 192),)
    with pytest.raises(RequestError, match=r"^high_res\[0\]\.tile_stride: got 64"):
        tiles_of({"tile_stride": 64})


def test_a_pass_is_no_smaller_than_what_it_begins_with() -> None:
    there: list[dict[str, int]] = [{"width": 1024, "height": 1024}, {"width": 1280, "height": 1008}]
    with pytest.raises(RequestError, match=r"high_res\[1\]: .*at least 1024x1024"):
        Request.from_dict({"prompt": "", "high_res": there}).complete(DEFAULTS, seed=0)


def test_null_is_no_parts() -> None:
    """As JSON has it."""
    nothing = dict.fromkeys(("loras", "regions", "controls", "image_prompts", "high_res"))
    assert Request.from_dict({"prompt": "a fox", **nothing}) == Request(prompt="a fox")


@pytest.mark.parametrize("size", [(64, 64), (1024, 1024), (100, 200), (2048, 90)])
def test_a_hard_mask_stays_hard_away_from_its_edge(size: tuple[int, int]) -> None:
    """No filter that rings: what is black with nothing white near it is black."""
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    made = np.asarray(resized_mask(mask, Size(256, 256)))
    grown = max(256 // min(size), 1)
    assert (made[:, : 127 - grown] == 255).all()
    assert (made[:, 128 + grown :] == 0).all()


def test_a_fingerprint_knows_what_is_clear() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    assert fingerprint(clear) != fingerprint(Image.new("RGBA", (4, 4), "white"))
    assert fingerprint(Image.new("RGB", (4, 4), "white")) == fingerprint(Image.new("L", (4, 4), 255))


# ---- a picture to start from


def started(size: tuple[int, int], **said: Any) -> Job:  # noqa: ANN401
    picture = Image.new("RGB", size)
    request = Request.from_dict({"prompt": "", "input_image": picture, **said})
    return request.complete(TOLD, seed=0, opened={"input_image": picture})


@pytest.mark.parametrize(
    ("picture", "said", "size"),
    [
        ((512, 512), {}, "512x512"),
        ((1024, 1024), {}, "512x512"),
        ((30, 40), {}, "440x592"),
        ((3000, 1500), {}, "728x360"),
        ((1, 16), {}, "128x2048"),
        ((30, 40), {"width": 64, "height": 24}, "64x24"),
        ((100, 50), {"width": 256}, "256x128"),
        ((100, 50), {"height": 64}, "128x64"),
        ((50, 100), {"width": 512}, "512x1024"),
        ((9000, 10), {"width": 64}, "64x8"),
    ],
)
def test_a_size_follows_the_input_image(picture: tuple[int, int], said: dict[str, int], size: str) -> None:
    job = started(picture, **said)
    assert str(job.size) == size
    assert job.input_image is not None
    assert job.input_image.size == (job.width, job.height)
    assert (job.target_width, job.target_height) == (job.width, job.height)


def test_a_size_that_is_said_with_a_picture_is_on_the_grid_too() -> None:
    with pytest.raises(RequestError, match="width: got 60.*nearest valid size is 64x"):
        started((100, 50), width=60)
    for said in ({}, {"width": 16_384}):
        with pytest.raises(RequestError, match="input_image: got .*milder proportions: .* give width and height"):
            started((2, 9000) if said else (9000, 2), **said)
    assert started((9000, 2), width=64, height=64).size == Size(64, 64)


def test_the_strength_is_the_familys_unless_said() -> None:
    assert started((8, 8)).denoising_strength == TOLD.denoising_strength == 0.7
    assert started((8, 8), denoising_strength=1).denoising_strength == 1.0
    with pytest.raises(RequestError, match="denoising_strength: got 0.5; allowed: None without an input_image"):
        Request(prompt="a fox", denoising_strength=0.5)
    with pytest.raises(RequestError, match="denoising_strength: got 0; allowed: more than 0: nothing .* would change"):
        Request(prompt="a fox", input_image="x.png", denoising_strength=0)


@pytest.mark.parametrize("given", ["a/b.png", Path("a") / "b.png"])
def test_a_picture_from_a_file_is_named_by_its_path(given: str | Path) -> None:
    request = Request(prompt="", input_image=given)
    assert request.to_dict()["input_image"] == str(Path("a/b.png"))
    job = request.complete(TOLD, seed=0, opened={"input_image": Image.new("RGB", (9, 9))})
    assert job.to_dict()["input_image"] == str(Path("a/b.png"))


def test_a_picture_from_memory_is_named_by_what_it_shows() -> None:
    red, blue = (Image.new("RGB", (9, 9), colour) for colour in ("red", "blue"))
    names = [Request(prompt="", input_image=picture).to_dict()["input_image"] for picture in (red, red.copy(), blue)]
    assert names[0] == names[1] != names[2]
    assert all(name.startswith("sha256:") and len(name) == 71 for name in names)
    job = Request(prompt="", input_image=red).complete(TOLD, seed=0, opened={"input_image": red})
    assert job.input_image != red  # resized
    assert job.to_dict()["input_image"] == names[0]
    assert json.dumps(job.to_dict())


@settings(deadline=None)
@given(some.integers(1, 20_000), some.integers(1, 20_000), some.sampled_from([8, 16, 32, 64]))
def test_the_nearest_size_is_on_the_grid_and_near(width: int, height: int, grain: int) -> None:
    near = Size(width, height).nearest(grain)
    for side, asked in ((near.width, width), (near.height, height)):
        assert side % grain == 0
        assert side >= grain
        assert abs(side - asked) <= max(grain // 2, grain - asked)
    assert near.nearest(grain) == near


def test_a_size_counts_its_tokens() -> None:
    assert Size(1024, 512).tokens(16) == 64 * 32
    assert str(Size(1024, 512)) == "1024x512"


anything = some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=20)


@settings(deadline=None)
@given(some.dictionaries(some.sampled_from([*asdict(Request(prompt=""))]), anything, max_size=6))
def test_any_values_make_a_request_or_a_request_error(values: dict[str, Any]) -> None:
    try:
        request = Request.from_dict(values)
    except RequestError:
        return
    assert Request.from_dict(request.to_dict()) == request


# ---- controls


def test_a_controls_settings_are_plain_values() -> None:
    given = {"low": 50, "high": 120.5, "hands": True, "weights": "org/name"}
    control = Control(kind="canny", model=Path("net.pth"), image="a.png", settings=given)
    assert control.source == control.model == str(Path("net.pth"))
    request = Request(prompt="a fox", controls=(control,))
    assert Request.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    assert request.to_dict()["controls"][0]["settings"] == given
    given["low"] = 1
    assert control.settings is not None
    assert control.settings["low"] == 50
    assert "settings" not in Control(kind="canny", model="net.pth", settings={}).to_dict()


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"settings": [1]}, "settings"),
        ({"settings": {"low": None}}, "settings"),
        ({"settings": {1: 2}}, "settings"),
        ({"model": 3}, "model"),
        ({"model": ""}, "model"),
        ({"start": 0.5, "end": 0.5}, "end"),
    ],
)
def test_a_control_checks_itself(values: dict[str, Any], field: str) -> None:
    led = {"kind": "canny", "model": "net.pth", "image": "a.png", **values}
    with pytest.raises(RequestError) as caught:
        Request.from_dict({"prompt": "x", "controls": [led]})
    assert caught.value.field == f"controls[0].{field}"
