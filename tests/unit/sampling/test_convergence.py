"""How fast samplers converge, on data whose exact denoiser is known: a Gaussian, or a mixture of two.

For clean data N(m, d^2) the best estimate is m + a d^2 (x - a m) / (a^2 d^2 + s^2) at the level (a, s), and
the flow of probability keeps (x - a m) / sqrt(a^2 d^2 + s^2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from calotype.sampling import (
    BETAS,
    SAMPLERS,
    Denoise,
    Flow,
    Level,
    Levels,
    Process,
    VariancePreserving,
    levels,
)

SD = VariancePreserving.from_betas(BETAS["scaled_linear"](0.00085, 0.012, 1000))
ZERO_SNR = VariancePreserving.from_betas(BETAS["scaled_linear"](0.00085, 0.012, 1000), zero_snr=True)
X = torch.tensor([[-1.3, 0.2, 2.1]], dtype=torch.float64)
MEAN, SPREAD = 0.7, 0.5
STOCHASTIC = ["euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "dpmpp_3m_sde"]
PATHS: dict[str, Callable[[int], Levels]] = {
    "flow": levels.linear,
    "flow shifted": lambda steps: levels.linear(steps, 3.0),
    "vp": lambda steps: levels.trailing(SD, steps),
    "vp karras": lambda steps: levels.karras(SD, steps),
    "vp from pure noise": lambda steps: levels.trailing(ZERO_SNR, steps),
}


def spread(level: Level, data: float) -> float:
    return math.hypot(level.alpha * data, level.sigma)


def gaussian(x: Tensor, level: Level) -> Tensor:
    share = level.alpha * SPREAD**2 / spread(level, SPREAD) ** 2
    return MEAN + share * (x - level.alpha * MEAN)


def mixture(x: Tensor, level: Level) -> Tensor:
    estimates: list[Tensor] = []
    likely: list[Tensor] = []
    for weight, mean, data in ((0.4, -1.0, 0.3), (0.6, 0.8, 0.45)):
        total = spread(level, data) ** 2
        likely.append(math.log(weight) - math.log(total) / 2 - (x - level.alpha * mean) ** 2 / (2 * total))
        estimates.append(mean + level.alpha * data**2 / total * (x - level.alpha * mean))
    return (torch.softmax(torch.stack(likely), 0) * torch.stack(estimates)).sum(0)


def carried(x: Tensor, now: Level, then: Level) -> Tensor:
    """Where the flow of probability of the Gaussian takes x."""
    return then.alpha * MEAN + (x - now.alpha * MEAN) * spread(then, SPREAD) / spread(now, SPREAD)


def last(name: str, denoise: Denoise, path: Levels) -> Tensor:
    *_, step = SAMPLERS[name](denoise, X, path, lambda: torch.zeros_like(X))
    return step.x


@cache
def nearly_exact(denoise: Denoise) -> Tensor:
    return last("heun", denoise, levels.linear(700))


def even(process: Process, steps: int) -> Levels:
    """From ratio 20 to 0.05, lambda in even steps."""
    ratios = [20 * 400 ** (-i / steps) for i in range(steps + 1)]
    return Levels(process, tuple(process.at_ratio(ratio) for ratio in ratios))


def order(errors: list[float]) -> float:
    """The exponent at which errors fall as the steps double, on the average."""
    return math.log2(errors[0] / errors[-1]) / (len(errors) - 1)


@pytest.mark.parametrize("process", [Flow(), SD], ids=["flow", "vp"])
@pytest.mark.parametrize(("name", "expected"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 2)])
def test_order(name: str, expected: int, process: Process) -> None:
    errors: list[float] = []
    for steps in (20, 40, 80, 160):
        path = even(process, steps)
        errors.append(float((last(name, gaussian, path) - carried(X, path.path[0], path.path[-1])).abs().max()))
    assert expected - 0.15 < order(errors) < expected + 1.5
    assert errors[-1] < (0.05 if expected == 1 else 2e-3)


@pytest.mark.parametrize(("name", "expected"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 1.6), ("unipc", 2)])
@pytest.mark.parametrize("denoise", [gaussian, mixture])
def test_order_of_flow_from_pure_noise_to_the_picture(name: str, expected: float, denoise: Denoise) -> None:
    """Both ends are infinite in lambda. (There dpmpp_2m comes to 2 slowly: its first steps are uneven.)"""
    truth = nearly_exact(denoise)
    if denoise is gaussian:
        torch.testing.assert_close(truth, carried(X, Level(0, 1, 1), Level(1, 0, 0)), rtol=0, atol=5e-6)
    errors = [float((last(name, denoise, levels.linear(n)) - truth).abs().max()) for n in (40, 80, 160)]
    assert order(errors) > expected - 0.1


def exact_spread(name: str, path: Levels, data: float) -> float:
    """The standard deviation that a sampler ends at for data N(0, data^2), over the data's own.

    The denoiser is linear, so x stays a sum of the independent normals that were drawn; x is followed as the
    vector of their weights, and no sample is needed.
    """
    normals = iter(torch.eye(2 * path.steps + 1, dtype=torch.float64))

    def denoise(x: Tensor, level: Level) -> Tensor:
        return level.alpha * data**2 / spread(level, data) ** 2 * x

    x = spread(path.path[0], data) * next(normals)
    *_, step = SAMPLERS[name](denoise, x, path, lambda: next(normals))
    return float(step.x.square().sum().sqrt()) / data


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("path", sorted(PATHS))
@pytest.mark.parametrize("data", [1.0, 0.5])
def test_noise_keeps_the_spread(name: str, path: str, data: float) -> None:
    few, many = (exact_spread(name, PATHS[path](steps), data) for steps in (100, 400))
    assert many == pytest.approx(1, abs=0.025)
    assert abs(many - 1) < max(abs(few - 1), 0.007)  # below that, the end of training's levels decides


def test_ancestral_noise_on_flow() -> None:
    """k-diffusion's own step ends at 1.55, 1.75, 1.85 here: its noise is that of alpha = 1."""
    found = [exact_spread("euler_ancestral", levels.linear(steps), 1.0) for steps in (30, 100, 400)]
    assert found == pytest.approx([0.924, 0.975, 0.994], abs=1e-3)


def test_the_second_order_of_stochastic_samplers_shows() -> None:
    for path in PATHS.values():
        plain = abs(exact_spread("euler_ancestral", path(100), 1.0) - 1)
        for name in ("dpmpp_2m_sde", "dpmpp_sde", "dpmpp_3m_sde"):
            assert abs(exact_spread(name, path(100), 1.0) - 1) < plain / 4


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"lcm"}))  # lcm is for models distilled to jump
def test_samples_have_the_shape_of_the_data(name: str) -> None:
    """Not only the spread: the two humps of a mixture, from many samples at once."""
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(1, 10_000, generator=generator, dtype=torch.float64)

    *_, step = SAMPLERS[name](mixture, noise(), levels.linear(60), noise)
    assert float((step.x < -0.2).double().mean()) == pytest.approx(0.4, abs=0.03)
    assert float(step.x.mean()) == pytest.approx(0.4 * -1.0 + 0.6 * 0.8, abs=0.05)
