"""What comes before the steps: a start from a picture, prompts that are remembered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import calotype
from calotype.control.hints import Hint
from calotype.families.flux import FluxModel
from calotype.families.flux.conditioning import FluxConditioning
from calotype.families.model import Prepared
from calotype.generate import Model, PromptCache, stream
from calotype.request import Job, Request
from calotype.sampling.levels import Level
from calotype.sampling.samplers import Denoise


@pytest.fixture(scope="module")
def family() -> FluxModel:
    return tiny.flux_model()


def drawn(family: FluxModel, **fields: Any) -> Image.Image:  # noqa: ANN401
    picture = Model(family).generate("a red fox", seed=3, **fields)
    assert isinstance(picture, Image.Image)
    return picture


def gradient(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def distance(a: Image.Image, b: Image.Image) -> float:
    return float(abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean())


def test_a_weak_start_keeps_the_picture_and_a_strong_one_does_not(family: FluxModel) -> None:
    picture = drawn(family)
    near, middle, far = (
        drawn(family, input_image=picture, denoising_strength=strength, steps=4) for strength in (0.05, 0.5, 1.0)
    )
    through = family.decode(family.encode(calotype.image.to_tensor(picture)[None]))[0]  # what the autoencoder leaves
    kept = calotype.image.to_pil(through)
    assert distance(near, kept) < distance(middle, kept) < distance(far, kept)


def test_all_steps_are_taken_from_the_level_of_the_strength(family: FluxModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """x = (1 - t) picture + t noise at t = strength shifted, and as many steps as asked for."""
    seen: list[tuple[Level, torch.Tensor]] = []
    plain = FluxModel.prepared

    def watched(self: FluxModel, *given: Any) -> Prepared:
        def placed(jobs: Sequence[Job], hints: Sequence[Hint]) -> Denoise:
            inner = plain(self, *given)(jobs, hints)

            def denoise(x: torch.Tensor, level: Level) -> torch.Tensor:
                seen.append((level, x))
                return inner(x, level)

            return denoise

        return placed

    monkeypatch.setattr(FluxModel, "prepared", watched)
    picture = gradient(32, 32)
    drawn(family, input_image=picture, denoising_strength=0.6, steps=5, shift=1.0)
    assert len(seen) == 5
    level, x = seen[0]
    assert level.sigma == pytest.approx(0.6)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        clean = family.encode(calotype.image.to_tensor(picture)[None])
        torch.testing.assert_close(x, 0.4 * clean + 0.6 * noise)


def test_a_picture_is_resized_to_the_job(family: FluxModel) -> None:
    assert drawn(family, input_image=gradient(50, 50), width=48, height=32).size == (48, 32)
    # Without a size: the picture's proportions, the family's usual area.
    assert drawn(family, input_image=gradient(200, 50)).size == (64, 16)


def test_each_picture_of_a_request_has_its_own_noise(family: FluxModel) -> None:
    start = gradient(32, 32)
    both = Model(family).generate("a red fox", seed=3, count=2, input_image=start)
    assert isinstance(both, list)
    assert distance(both[0], both[1]) > 0
    assert distance(both[0], drawn(family, input_image=start)) == 0


class Counting:
    """A family's `condition`, counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompts: list[str] = []
        plain = FluxModel.condition

        def condition(model: FluxModel, prompt: str, job: Job, *, negative: bool) -> FluxConditioning:
            self.prompts.append(prompt)
            return plain(model, prompt, job, negative=negative)

        monkeypatch.setattr(FluxModel, "condition", condition)


def test_a_prompt_is_encoded_once(family: FluxModel, monkeypatch: pytest.MonkeyPatch) -> None:
    counting, model = Counting(monkeypatch), Model(family)
    first = model.generate("a red fox", seed=1, steps=1, cfg_scale=2.0, negative_prompt="a cat")
    again = model.generate("a red fox", seed=1, steps=1, cfg_scale=2.0, negative_prompt="a cat")
    assert counting.prompts == ["a red fox", "a cat"]
    assert first == again
    model.generate("a red fox", seed=2, steps=2, width=48)  # neither seed, steps nor size change what words mean
    assert counting.prompts == ["a red fox", "a cat"]
    model.generate("a red fox", seed=1, steps=1, text_tokens=12)
    assert counting.prompts == ["a red fox", "a cat", "a red fox"]


def test_remembered_prompts_draw_the_same_picture(family: FluxModel) -> None:
    cache: PromptCache[FluxConditioning] = PromptCache()
    request = Request(prompt="a red fox", seed=1, steps=2)
    fresh, kept = ([event for event in stream(family, request, cache=cache)][-1] for _ in range(2))
    assert isinstance(fresh, calotype.Picture)
    assert isinstance(kept, calotype.Picture)
    assert fresh.image == kept.image


def test_the_cache_forgets_what_was_used_longest_ago() -> None:
    cache: PromptCache[int] = PromptCache(room=2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (1, None, 3)
