"""What a request accepts, and how a family completes it."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from calotype.errors import RequestError
from calotype.request import MAX_PROMPT, MAX_SEED, MAX_STEPS, Defaults, Request, Size

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
)
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
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        Request.from_dict({"prompt": "a fox", field: value})
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
    }
    assert asdict(Request.from_dict(said).complete(DEFAULTS, seed=9)) == said


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
