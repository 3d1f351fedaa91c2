"""Guidance: its algebra, and its rescaling against diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from calotype.sampling import BETAS, Flow, Level, Prediction, VariancePreserving, guided, guided_both

SD = VariancePreserving.from_betas(BETAS["scaled_linear"](0.00085, 0.012, 1000))
LEVELS = {"noise": SD.at_time(731), "v": SD.at_time(731), "flow": Flow().at_time(0.83)}
PREDICTIONS: list[Prediction] = ["noise", "v", "flow"]
X = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(x: Tensor, phase: float) -> Tensor:
    return 0.7 * x + torch.sin(1.3 * x + phase)


def clean(predicted: Tensor, x: Tensor, level: Level, prediction: Prediction) -> Tensor:
    """The clean estimate that a prediction means."""
    if prediction == "noise":
        return (x - level.sigma * predicted) / level.alpha
    if prediction == "v":
        return level.alpha * x - level.sigma * predicted
    return x - level.sigma * predicted


def positive(x: Tensor, level: Level) -> Tensor:
    return network(x, 0.0)


def negative(x: Tensor, level: Level) -> Tensor:
    return network(x, 2.0)


def both(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    return positive(x, level), negative(x, level)


def rescale_noise_cfg(guided: Tensor, positive: Tensor, rescale: float) -> Tensor:
    """diffusers' function of that name, written out: importing it means importing a whole pipeline."""
    spreads = [x.std(dim=(1, 2, 3), keepdim=True) for x in (positive, guided)]
    return rescale * guided * (spreads[0] / spreads[1]) + (1 - rescale) * guided


def test_guidance_moves_away_from_the_negative() -> None:
    level = LEVELS["noise"]
    p, n = positive(X, level), negative(X, level)
    assert torch.equal(guided(positive, negative, 7.5)(X, level), n + 7.5 * (p - n))
    torch.testing.assert_close(guided(positive, negative, 0.0)(X, level), n)


def test_scale_1_is_the_positive_denoiser_itself() -> None:
    def never(x: Tensor, level: Level) -> Tensor:
        raise AssertionError("the negative pass was not skipped")

    assert guided(positive, never, 1.0) is positive
    assert guided(positive, never, 1.0, 0.7) is positive  # where nothing is guided, nothing is to be rescaled


@given(scale=some.floats(0, 20), rescale=some.floats(0, 1), prediction=some.sampled_from(PREDICTIONS))
@settings(deadline=None, max_examples=30)
def test_one_pass_or_two_is_the_same(scale: float, rescale: float, prediction: Prediction) -> None:
    level = LEVELS[prediction]
    two = guided(positive, negative, scale, rescale, prediction)(X, level)
    torch.testing.assert_close(guided_both(both, scale, rescale, prediction)(X, level), two)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescaling_equals_diffusers(prediction: Prediction, rescale: float) -> None:
    """diffusers guides and rescales what the network predicts; we do both on clean estimates."""
    level = LEVELS[prediction]
    p, n = network(X, 0.0), network(X, 2.0)
    expected = clean(rescale_noise_cfg(n + 7.5 * (p - n), p, rescale), X, level, prediction)

    def estimate(phase: float) -> Any:  # noqa: ANN401
        return lambda x, level: clean(network(x, phase), x, level, prediction)  # pyright: ignore

    ours = guided(estimate(0.0), estimate(2.0), 7.5, rescale, prediction)(X, level)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_full_rescaling_restores_the_spread_of_the_prediction() -> None:
    level = LEVELS["v"]
    estimate = guided(positive, negative, 9.0, 1.0, "v")(X, level)
    spread = (level.alpha * X - estimate).std(dim=(1, 2, 3))
    torch.testing.assert_close(spread, (level.alpha * X - positive(X, level)).std(dim=(1, 2, 3)))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_pure_noise_is_rescaled_to_finite_numbers(prediction: Prediction) -> None:
    for level in (Level(0.0, 1.0, 999.0), SD.at_ratio(4096.0)):
        ours = guided(positive, negative, 7.5, 0.7, prediction)(X.float(), level)
        assert torch.isfinite(ours).all()
        assert float(ours.std()) < float(guided(positive, negative, 7.5)(X.float(), level).std()) * 1.01


def test_rows_are_rescaled_apart() -> None:
    guide = guided(positive, negative, 7.5, 0.7)
    together = guide(X, LEVELS["noise"])
    for row in range(3):
        alone = guide(X[row : row + 1], LEVELS["noise"])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-12, atol=1e-12)
