"""Processes, levels and schedules: the numbers of diffusers, BFL, ComfyUI, DiffSynth; what always holds."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from calotype.errors import RequestError
from calotype.sampling import (
    BETAS,
    FLOW_SCHEDULES,
    VP_SCHEDULES,
    Flow,
    Level,
    Levels,
    VariancePreserving,
    dynamic_shift,
    levels,
)

diffusers: Any = importlib.import_module("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # NumPy 2 inside diffusers
DATA = Path(__file__).parents[2] / "data" / "sampling"
SD = VariancePreserving.from_betas(BETAS["scaled_linear"](0.00085, 0.012, 1000))
KOLORS = VariancePreserving.from_betas(BETAS["scaled_linear"](0.00085, 0.014, 1100))
HUNYUAN = VariancePreserving.from_betas(BETAS["scaled_linear"](0.00085, 0.03, 1000))
ZERO_SNR = VariancePreserving.from_betas(BETAS["scaled_linear"](0.00085, 0.012, 1000), zero_snr=True)
SD_CONFIG: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def times(path: Levels) -> list[float]:
    return [level.time for level in path.path]


def ratios(path: Levels) -> list[float]:
    return [level.ratio for level in path.path]


def sigmas(path: Levels) -> list[float]:
    return [level.sigma for level in path.path]


# Processes


def test_alpha_bars_are_those_of_the_published_models() -> None:
    ends = [(SD, 0.0046601), (KOLORS, 0.0011827), (HUNYUAN, 5.672e-6)]
    for process, last in ends:
        assert process.alpha_bars[0] == pytest.approx(0.99915)
        assert process.alpha_bars[-1] == pytest.approx(last, rel=1e-4)


@pytest.mark.parametrize("schedule", sorted(BETAS))
@pytest.mark.parametrize("zero_snr", [False, True])
def test_alpha_bars_equal_diffusers(schedule: str, zero_snr: bool) -> None:
    reference = diffusers.DDIMScheduler(**{**SD_CONFIG, "beta_schedule": schedule}, rescale_betas_zero_snr=zero_snr)
    ours = VariancePreserving.from_betas(BETAS[schedule](0.00085, 0.012, 1000), zero_snr)
    np.testing.assert_allclose(ours.alpha_bars, reference.alphas_cumprod.double().numpy(), rtol=2e-4, atol=2e-6)
    assert (ours.alpha_bars[-1] == 0) == zero_snr


@given(ratio=some.floats(1e-6, 1e6))
def test_a_ratio_comes_back(ratio: float) -> None:
    for process in (Flow(), SD, ZERO_SNR):
        assert process.at_ratio(ratio).ratio == pytest.approx(ratio)
    assert Flow().at_ratio(ratio).alpha + Flow().at_ratio(ratio).sigma == pytest.approx(1)
    assert math.hypot(SD.at_ratio(ratio).alpha, SD.at_ratio(ratio).sigma) == pytest.approx(1)


def test_the_ends_of_a_process() -> None:
    assert Flow().at_ratio(math.inf) == Level(0, 1, 1)
    assert Flow().at_ratio(0) == Level(1, 0, 0)
    assert SD.at_ratio(math.inf) == ZERO_SNR.at_ratio(math.inf) == ZERO_SNR.at_time(999) == Level(0, 1, 999)
    assert SD.at_ratio(0) == Level(1, 0, 0)


@given(time=some.floats(0, 999))
def test_time_and_ratio_are_inverse(time: float) -> None:
    assert SD.at_ratio(SD.at_time(time).ratio).time == pytest.approx(time, abs=1e-6)


def test_time_is_interpolated_as_in_diffusers() -> None:
    """_sigma_to_t is k-diffusion's sigma_to_t."""
    reference = diffusers.EulerDiscreteScheduler(**SD_CONFIG)
    table = (((1 - reference.alphas_cumprod) / reference.alphas_cumprod) ** 0.5).double().numpy()
    for ratio in (0.01, 0.0292, 0.0335, 0.1, 1.0, 3.3, 14.0, 20.0):
        expected = float(reference._sigma_to_t(np.array([ratio]), np.log(table))[0])
        assert SD.at_ratio(ratio).time == pytest.approx(expected, abs=1e-2)


# Between


@pytest.mark.parametrize("process", [Flow(), SD])
def test_half_way_is_half_way_in_lambda(process: Flow | VariancePreserving) -> None:
    now, then = process.at_ratio(8.0), process.at_ratio(0.5)
    half = Levels(process, (now, then)).between(now, then, 0.5)
    assert half.lam == pytest.approx((now.lam + then.lam) / 2)
    assert half == pytest.approx(process.at_ratio(2.0))


@given(
    now=some.one_of(some.just(math.inf), some.floats(1e-4, 1e4)),
    shrink=some.one_of(some.just(0.0), some.floats(1e-6, 0.9)),
    fraction=some.floats(0.01, 0.99),
)
def test_between_lies_between(now: float, shrink: float, fraction: float) -> None:
    for process in (Flow(), SD, ZERO_SNR):
        first = process.at_ratio(now)
        last = process.at_ratio(shrink * now if math.isfinite(now) else shrink)
        middle = Levels(process, (first, last)).between(first, last, fraction)
        assert last.ratio < middle.ratio < first.ratio


# Flow schedules


def bfl_schedule(steps: int, tokens: int, shift: bool) -> list[float]:
    """get_schedule of black-forest-labs/flux, in float64."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if shift:
        mu = (1.15 - 0.5) / (4096 - 256) * (tokens - 256) + 0.5
        times = math.exp(mu) / (math.exp(mu) + (1 / times - 1))
    return times.tolist()  # pyright: ignore


@pytest.mark.parametrize("steps", [1, 4, 7, 28, 50])
@pytest.mark.parametrize("tokens", [256, 1024, 4096, 16384])
def test_linear_equals_bfl_and_diffusers_flux(steps: int, tokens: int) -> None:
    shift = dynamic_shift(tokens)
    ours = sigmas(levels.linear(steps, shift))
    np.testing.assert_allclose(ours, bfl_schedule(steps, tokens, True), atol=1e-14)
    np.testing.assert_allclose(sigmas(levels.linear(steps)), bfl_schedule(steps, tokens, False), atol=1e-14)

    mu = math.log(shift)
    reference = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    reference.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)  # as FluxPipeline does
    np.testing.assert_allclose(ours, reference.sigmas, atol=2e-7)
    np.testing.assert_allclose(np.array(ours[:-1]) * 1000, reference.timesteps, atol=2e-4)
    reference = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    reference.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    np.testing.assert_allclose(sigmas(levels.linear(steps)), reference.sigmas, atol=2e-7)


@pytest.mark.parametrize("steps", [2, 4, 20, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_normal_equals_diffusers_sd3(steps: int, shift: float) -> None:
    reference = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    reference.set_timesteps(steps)
    np.testing.assert_allclose(sigmas(levels.normal(steps, shift)), reference.sigmas, atol=2e-7)


def test_normal_equals_diffsynth() -> None:
    expected = [1, 0.85769, 0.60215, 0.00893, 0]
    assert sigmas(levels.normal(4, 3.0)) == pytest.approx(expected, abs=1e-5)
    expected = [0.81892, 0.66833, 0.43223, 0.00893, 0]
    assert sigmas(levels.normal(4, 3.0, start=0.6)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("steps", [1, 3, 4, 7, 20, 30, 999])
def test_simple_equals_comfyui(steps: int) -> None:
    table = [3 * t / (1 + 2 * t) for t in (np.arange(1000) + 1) / 1000]
    expected = [table[-(1 + int(i * (len(table) / steps)))] for i in range(steps)]
    assert sigmas(levels.simple(steps, 3.0)) == pytest.approx([*expected, 0.0])


def test_simple_is_linear_where_steps_divide_the_table() -> None:
    for steps in (1, 2, 4, 5, 8, 20, 25, 50):
        assert sigmas(levels.simple(steps, 1.7)) == pytest.approx(sigmas(levels.linear(steps, 1.7)))


def test_beta_quantiles_equal_scipy() -> None:
    stored = json.loads((DATA / "beta_quantiles.json").read_text())
    for shape in (0.6, 0.3):
        ours = [levels.beta_quantile(p, shape) for p in stored["p"]]
        assert ours == pytest.approx(stored[f"beta {shape}"], rel=1e-9, abs=1e-12)


# Variance-preserving schedules


@pytest.mark.parametrize("steps", [1, 4, 20, 25, 30, 50, 333])
@pytest.mark.parametrize("offset", [0, 1])
def test_leading_equals_diffusers(steps: int, offset: int) -> None:
    reference = diffusers.DDIMScheduler(**SD_CONFIG, timestep_spacing="leading", steps_offset=offset)
    reference.set_timesteps(steps)
    assert times(levels.leading(SD, steps, offset=offset))[:-1] == reference.timesteps.tolist()


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("steps", [2, 3, 4, 10, 17, 20, 30, 50, 333])
def test_spacings_equal_diffusers(spacing: str, steps: int) -> None:
    reference = diffusers.DDIMScheduler(**SD_CONFIG, timestep_spacing=spacing)
    reference.set_timesteps(steps)
    assert times(VP_SCHEDULES[spacing](SD, steps, 1.0))[:-1] == reference.timesteps.tolist()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("normal", {"timestep_spacing": "linspace"}),
        ("leading", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("trailing", {"timestep_spacing": "trailing"}),
        ("karras", {"timestep_spacing": "linspace", "use_karras_sigmas": True}),
        ("exponential", {"timestep_spacing": "linspace", "use_exponential_sigmas": True}),
    ],
)
@pytest.mark.parametrize("steps", [2, 5, 20, 30])
def test_ratios_equal_diffusers_euler(name: str, options: dict[str, Any], steps: int) -> None:
    reference = diffusers.EulerDiscreteScheduler(**SD_CONFIG, **options)
    reference.set_timesteps(steps)
    ours = VP_SCHEDULES[name](SD, steps, 1.0)
    # at times between training steps diffusers interpolates the ratio linearly, we its logarithm
    np.testing.assert_allclose(ratios(ours), reference.sigmas, rtol=1e-4 if name == "normal" else 2e-5)
    np.testing.assert_allclose(times(ours)[:-1], reference.timesteps, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("name", ["karras", "exponential"])
def test_zero_snr_starts_where_diffusers_does(name: str) -> None:
    options = {f"use_{name}_sigmas": True, "rescale_betas_zero_snr": True}
    reference = diffusers.UniPCMultistepScheduler(**SD_CONFIG, **options)
    reference.set_timesteps(12)
    np.testing.assert_allclose(ratios(VP_SCHEDULES[name](ZERO_SNR, 12, 1.0)), reference.sigmas, rtol=2e-5)


def test_zero_snr_trailing_begins_with_pure_noise() -> None:
    reference = diffusers.DDIMScheduler(**SD_CONFIG, timestep_spacing="trailing", rescale_betas_zero_snr=True)
    reference.set_timesteps(10)
    ours = levels.trailing(ZERO_SNR, 10)
    assert ours.path[0] == Level(0, 1, 999)
    bars = reference.alphas_cumprod[reference.timesteps]
    np.testing.assert_allclose([level.alpha**2 for level in ours.path[:-1]], bars, atol=1e-6)


def test_linspace_equals_diffsynth() -> None:
    twenty = times(levels.linspace(SD, 20))
    assert twenty[:5] == [999, 946, 894, 841, 789]
    assert twenty[-3:] == [53, 0, 0]
    assert times(levels.linspace(SD, 4)) == [999, 666, 333, 0, 0]
    assert times(levels.linspace(SD, 1, start=0.7)) == [699, 0]


def test_sgm_uniform_leaves_out_the_last_of_even_times() -> None:
    assert times(levels.sgm_uniform(SD, 4)) == [999, 749.25, 499.5, 249.75, 0]


def test_align_your_steps_equals_the_published_tables() -> None:
    tables = importlib.import_module("diffusers.schedulers.scheduling_utils").AysSchedules
    for function, name in (
        (levels.align_your_steps, "StableDiffusion"),
        (levels.align_your_steps_sdxl, "StableDiffusionXL"),
    ):
        ten = function(SD, 10)
        assert times(ten)[:-1] == pytest.approx(tables[f"{name}Timesteps"], abs=1e-6)
        assert ratios(ten) == pytest.approx(tables[f"{name}Sigmas"], rel=2e-2)  # published roughly
    more_digits = [14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092]
    assert ratios(levels.align_your_steps(SD, 10))[:6] == pytest.approx(more_digits, rel=1e-10)


@pytest.mark.parametrize("steps", [1, 5, 7, 20])
def test_align_your_steps_is_interpolated_as_its_authors_do(steps: int) -> None:
    table = [SD.at_time(time).ratio for time in levels.AYS_SD1]
    logs = np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, 11), np.log(table[::-1]))
    expected = np.exp(logs)[::-1]
    assert ratios(levels.align_your_steps(SD, steps))[:-1] == pytest.approx(list(expected[:-1]))


def test_align_your_steps_fits_other_numbers_of_training_steps() -> None:
    assert times(levels.align_your_steps(KOLORS, 10))[0] == pytest.approx(1099)


# What always holds


@settings(deadline=None, max_examples=60)
@given(
    steps=some.integers(1, 200),
    start=some.floats(0.25, 1.0),
    shift=some.floats(0.05, 50),
    name=some.sampled_from(sorted(FLOW_SCHEDULES)),
)
def test_flow_schedules_fall_from_start_to_zero(steps: int, start: float, shift: float, name: str) -> None:
    path = FLOW_SCHEDULES[name](steps, shift, start)
    values = sigmas(path)
    assert path.steps == steps
    assert all(a > b for a, b in zip(values, values[1:], strict=False))
    assert values[-1] == 0
    assert path.path[-1] == Level(1, 0, 0)
    if name != "normal":
        assert levels.shifted(start - 1e-3, shift) <= values[0] <= levels.shifted(start + 1e-3, shift)


@settings(deadline=None, max_examples=100)
@given(
    steps=some.integers(1, 200),
    start=some.floats(0.25, 1.0),
    process=some.sampled_from([SD, KOLORS, HUNYUAN, ZERO_SNR]),
    name=some.sampled_from(sorted(VP_SCHEDULES)),
)
def test_vp_schedules_fall_from_start_to_zero(steps: int, start: float, process: VariancePreserving, name: str) -> None:
    path = VP_SCHEDULES[name](process, steps, start)
    assert path.steps == steps
    assert path.path[-1] == Level(1, 0, 0)
    assert all(now.sigma > then.sigma and now.alpha < then.alpha for now, then in path.pairs())
    assert all(now.time >= then.time for now, then in path.pairs())
    assert all(math.isfinite(value) for level in path.path for value in level)
    if name != "leading":
        assert path.path[0].time == pytest.approx(round(process.train_steps * start) - 1, abs=1.1)


@pytest.mark.parametrize("name", ["leading", "trailing", "linspace"])
def test_too_many_whole_steps_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match=rf"steps: got 200; allowed: at most .* schedule {name}"):
        VP_SCHEDULES[name](SD, 200, 0.1)
    with pytest.raises(RequestError, match="at most 100: the schedule simple"):
        levels.simple(200, 1.0, 0.1)


@pytest.mark.parametrize("start", [1e-9, 5e-4, 1e-3, 0.0011])
@pytest.mark.parametrize("name", sorted({*FLOW_SCHEDULES} - {"simple"}))
def test_the_smallest_starts_have_levels_too(name: str, start: float) -> None:
    path = FLOW_SCHEDULES[name](8, 3.0, start)
    assert path.steps == 8
    assert path.path[0].time <= levels.shifted(start, 3.0) + levels.shifted(1e-3, 3.0) * 3


def test_ending_replaces_the_clean_picture() -> None:
    path = levels.leading(SD, 10)
    ended = path.ending(SD.at_time(0))
    assert ended.path[:-1] == path.path[:-1]
    assert ended.path[-1] == SD.at_time(0)
    assert ended.path[-1].sigma > 0
    assert levels.leading(SD, 10, offset=0).ending(SD.at_time(0)).steps == 9
