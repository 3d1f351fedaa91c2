"""The path from request to picture, on a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import flux_model

from calotype.control.hints import Hint
from calotype.errors import NonFiniteImage, RequestError
from calotype.families.flux import FluxModel
from calotype.families.model import Prepared
from calotype.generate import Model, Picture, Progress, stream
from calotype.request import Job, Request
from calotype.sampling.levels import Level
from calotype.sampling.samplers import SAMPLERS, Denoise


@pytest.fixture(scope="module")
def family() -> FluxModel:
    return flux_model()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=int)


def draw(family: FluxModel, batched: bool = True, **fields: object) -> list[Image.Image]:
    request = Request.from_dict({"prompt": "a red fox", "seed": 5, **fields})
    events = stream(family, request, batched_guidance=batched)
    return [event.image for event in events if isinstance(event, Picture)]


def test_events_come_in_order(family: FluxModel) -> None:
    events = list(stream(family, Request(prompt="a red fox", seed=5, steps=3, count=2)))
    shown = [(e.picture, e.step, e.steps) if isinstance(e, Progress) else e.seed for e in events]
    assert shown == [(0, 1, 3), (0, 2, 3), (0, 3, 3), 5, (1, 1, 3), (1, 2, 3), (1, 3, 3), 6]


def test_a_picture_is_the_same_alone_and_in_any_place_of_a_request(family: FluxModel) -> None:
    three = draw(family, count=3, sampler="euler_ancestral")
    for k, picture in enumerate(three):
        assert (pixels(picture) == pixels(draw(family, seed=5 + k, sampler="euler_ancestral")[0])).all()
    assert (pixels(three[0]) != pixels(three[1])).any()


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_in_one_batched_pass_or_two_draws_the_same(family: FluxModel, rescale: float) -> None:
    fields = {"cfg_scale": 4.0, "negative_prompt": "blue cat", "cfg_rescale": rescale}
    one, two = draw(family, **fields)[0], draw(family, batched=False, **fields)[0]
    assert abs(pixels(one) - pixels(two)).max() <= 1
    assert (pixels(one) != pixels(draw(family, cfg_scale=1.0)[0])).any()


def test_both_guidances_matter_alone_and_together(family: FluxModel) -> None:
    made = [
        draw(family, cfg_scale=cfg, embedded_guidance=embedded)[0].tobytes()
        for cfg in (1.0, 3.0)
        for embedded in (1.0, 9.0)
    ]
    assert len(set(made)) == 4


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_draws_with_prepared_levels_only(family: FluxModel, sampler: str) -> None:
    assert draw(family, sampler=sampler, steps=5)[0].size == (32, 32)


def test_prepared_levels_equal_the_plain_form(family: FluxModel) -> None:
    """All levels in one pass, or each by itself: equal to 1e-5."""
    request = Request(prompt="a red fox", seed=1, steps=6)
    job = request.complete(family.defaults, seed=1)
    conditioning = family.condition(job.prompt, job, negative=False)
    path = family.levels(job).path[:-1]
    with torch.inference_mode():
        together = family.denoiser(conditioning, path, [job])
        x = torch.randn(1, *family.noise_shape(job), generator=torch.Generator().manual_seed(0))
        for level in path:
            alone = family.denoiser(conditioning, [level], [job])(x, level)
            assert torch.allclose(together(x, level), alone, atol=1e-5, rtol=1e-5)


def test_closing_early_frees_everything(family: FluxModel) -> None:
    import gc
    import weakref

    alive: list[weakref.ref[torch.Tensor]] = []
    prepared = family.prepared

    def watched(*arguments: Any) -> Prepared:
        def placed(jobs: Sequence[Job], hints: Sequence[Hint]) -> Denoise:
            denoise = prepared(*arguments)(jobs, hints)

            def watching(x: torch.Tensor, level: Level) -> torch.Tensor:
                clean = denoise(x, level)
                alive.append(weakref.ref(clean))
                return clean

            return watching

        return placed

    family.prepared = watched  # type: ignore[method-assign]
    try:
        with closing(stream(family, Request(prompt="a fox", seed=1, steps=4))) as events:
            event = next(events)
            assert isinstance(event, Progress)
            assert event.preview().size == (32, 32)
            assert alive[0]() is not None
            del event
        gc.collect()
        assert len(alive) == 1
        assert alive[0]() is None
    finally:
        del family.prepared  # type: ignore[misc]


def test_a_non_finite_picture_is_an_error() -> None:
    family = flux_model()
    with torch.no_grad():
        family.transformer.out.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteImage, match="float32"):
        draw(family)


def test_an_unsuitable_request_fails_before_any_work(family: FluxModel) -> None:
    with pytest.raises(RequestError, match="nearest valid size is 32x48"):
        next(stream(family, Request(prompt="a fox", width=33, height=47)))
    with pytest.raises(RequestError, match="sampler.*euler_ancestral"):
        next(stream(family, Request(prompt="a fox", sampler="eular")))
    with pytest.raises(RequestError, match="schedule"):
        next(stream(family, Request(prompt="a fox", schedule="karras")))
    with pytest.raises(RequestError, match="no guidance input"):
        next(stream(flux_model(guidance=False), Request(prompt="a fox", embedded_guidance=3.5)))


def test_generate_returns_one_picture_or_a_list(family: FluxModel) -> None:
    model = Model(family)
    one = model.generate("a red fox", seed=5)
    assert isinstance(one, Image.Image)
    many = model.generate("a red fox", seed=5, count=2)
    assert isinstance(many, list)
    assert (pixels(one) == pixels(many[0])).all()
    assert model.name == "flux/tiny"
    again = model.generate(Request(prompt="a red fox"), seed=5)
    assert isinstance(again, Image.Image)
    assert (pixels(again) == pixels(one)).all()


def test_a_picture_tells_what_made_it_and_can_be_drawn_again(family: FluxModel) -> None:
    first = draw(family, seed=11, count=2, cfg_scale=3.0, negative_prompt="snow", sampler="dpmpp_2m_sde")[1]
    job = json.loads(first.info["calotype"])["job"]
    assert (job["seed"], job["count"]) == (12, 1)
    again = draw(family, **{name: value for name, value in job.items() if value is not None})[0]
    assert (pixels(again) == pixels(first)).all()
    assert "Negative prompt: snow" in first.info["parameters"]


def test_a_seed_is_drawn_when_none_is_given(family: FluxModel) -> None:
    request = Request(prompt="a fox", steps=1)
    seeds = {event.seed for _ in range(3) for event in stream(family, request) if isinstance(event, Picture)}
    assert len(seeds) == 3


def test_dynamic_shift_grows_with_the_picture_and_gives_way_to_the_request(family: FluxModel) -> None:
    def shift(**fields: int | float) -> float:
        return family.shift(Request.from_dict({"prompt": "", **fields}).complete(family.defaults, seed=0))

    assert shift(width=256, height=256) == pytest.approx(np.exp(0.5))
    assert shift(width=1024, height=1024) == pytest.approx(np.exp(1.15))
    assert shift(width=1024, height=1024, shift=2.0) == 2.0
