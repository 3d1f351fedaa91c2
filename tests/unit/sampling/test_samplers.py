"""Each sampler against its reference: k-diffusion (stored), diffusers (live), BFL's loop (as a formula)."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from calotype.sampling import (
    BETAS,
    FLOW_SCHEDULES,
    SAMPLERS,
    VP_SCHEDULES,
    Denoise,
    Flow,
    Level,
    Levels,
    Noise,
    Process,
    Step,
    VariancePreserving,
    evaluated,
    levels,
)

diffusers: Any = importlib.import_module("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # NumPy 2 inside diffusers
K: dict[str, Any] = json.loads((Path(__file__).parents[2] / "data" / "sampling" / "k_diffusion.json").read_text())
SD_CONFIG: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD = VariancePreserving.from_betas(BETAS["scaled_linear"](0.00085, 0.012, 1000))
ZERO_SNR = VariancePreserving.from_betas(BETAS["scaled_linear"](0.00085, 0.012, 1000), zero_snr=True)
SHAPE = (2, 3, 4)
K_NAMES = ["euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "dpmpp_3m_sde"]


def toy(x: Tensor, level: Level) -> Tensor:
    """The denoiser of tests/parity/make_sampling_references.py."""
    size = math.hypot(level.alpha, level.sigma)
    phase = torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape)
    return 0.5 * torch.tanh(1.3 * x / size + phase) + 0.4 * x / size * level.alpha / size


def network(x: Tensor, time: float) -> Tensor:
    """A made-up network, curved in x and time."""
    phase = torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape)
    return 0.6 * x + 0.5 * torch.sin(1.7 * x + phase + time / 400)


def from_noise(x: Tensor, level: Level) -> Tensor:
    return (x - level.sigma * network(x, level.time)) / level.alpha


def from_v(x: Tensor, level: Level) -> Tensor:
    return level.alpha * x - level.sigma * network(x, level.time)


def from_flow(x: Tensor, level: Level) -> Tensor:
    return x - level.sigma * network(x, level.time)


def normals(seed: int, count: int = 100) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, *SHAPE), generator=generator, dtype=torch.float64)


def drawn(values: Tensor) -> Noise:
    source = iter(values)
    return lambda: next(source)


def silent() -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def run(name: str, denoise: Denoise, x: Tensor, path: Levels, noise: Noise = silent) -> list[Step]:
    return list(SAMPLERS[name](denoise, x, path, noise))


def stored(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(K["shape"])


def close(ours: Tensor, reference: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, reference.to(ours.dtype), rtol=tolerance, atol=tolerance)


# k-diffusion


@pytest.mark.parametrize(
    ("name", "process"),  # Heun depends on the scale of x: for flow it is compared below
    [(name, process) for name in K_NAMES for process in (SD, Flow()) if (name, process) != ("heun", Flow())],
)
def test_equals_k_diffusion_at_every_step(name: str, process: Process) -> None:
    """k-diffusion knows alpha = 1 only; divided by alpha, every process is of that kind."""
    path = Levels(process, tuple(process.at_ratio(ratio) for ratio in K["ratios"]))
    noise = drawn(torch.stack([stored(values) for values in K["noises"]]))
    steps = run(name, toy, stored(K["x"]) * path.path[0].sigma, path, noise)
    for step, then, expected in zip(steps, path.path[1:], K[name], strict=True):
        close(step.x / then.alpha, stored(expected), 1e-10)


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_equals_k_diffusion_on_flow_sigmas(name: str) -> None:
    """From sigma = 1, x not divided by alpha: as ComfyUI and sd3.5 run them. Sound for these two."""
    path = Levels(Flow(), tuple(Flow().at_time(sigma) for sigma in K["flow_sigmas"]))
    steps = run(name, toy, stored(K["x"]), path)
    for step, expected in zip(steps, K[f"flow {name}"], strict=True):
        close(step.x, stored(expected), 1e-10)


# BFL


def test_euler_equals_the_loop_of_bfl() -> None:
    path = levels.linear(7, 2.3)
    expected = x = normals(0, 1)[0]
    for now, then in path.pairs():
        expected = expected + (then.time - now.time) * network(expected, now.time)
    close(run("euler", from_flow, x, path)[-1].x, expected, 1e-12)


# diffusers. Its tables are float32: they are made float64, and our levels are made from them, so that what is
# compared is the sampler alone.


def in_float64(scheduler: Any, steps: int) -> Any:  # noqa: ANN401
    scheduler.set_timesteps(steps)
    for table in ("alphas_cumprod", "final_alpha_cumprod", "sigmas"):
        if hasattr(scheduler, table):
            setattr(scheduler, table, getattr(scheduler, table).double())
    return scheduler


def reference_run(
    scheduler: Any,  # noqa: ANN401
    x: Tensor,
    options: Callable[[], dict[str, Any]] = dict,
) -> list[Tensor]:
    seen: list[Tensor] = []
    for time in scheduler.timesteps:
        x = scheduler.step(network(x, float(time)), time, x, **options()).prev_sample
        seen.append(x)
    return seen


def same(steps: list[Step], reference: list[Tensor], tolerance: float) -> None:
    for step, expected in zip(steps, reference, strict=True):
        close(step.x, expected, tolerance)


def process_of(scheduler: Any) -> VariancePreserving:  # noqa: ANN401
    return VariancePreserving(tuple(scheduler.alphas_cumprod.tolist()))


def path_of(scheduler: Any) -> Levels:  # noqa: ANN401
    """The levels that the scheduler's `sigmas` are the ratios of."""
    path = levels.at_ratios(process_of(scheduler), scheduler.sigmas.tolist()[:-1])
    times = [*scheduler.timesteps.tolist(), 0]
    told = (level._replace(time=float(time)) for level, time in zip(path.path, times, strict=True))
    return Levels(path.process, tuple(told))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_equals_diffusers(prediction: str, to_one: bool) -> None:
    options = {"timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False}
    scheduler = diffusers.DDIMScheduler(**SD_CONFIG, **options, set_alpha_to_one=to_one, prediction_type=prediction)
    scheduler = in_float64(scheduler, 10)
    process = process_of(scheduler)
    path = levels.leading(process, 10)
    path = path if to_one else path.ending(process.at_time(0))
    x = normals(1, 1)[0]
    denoise = from_noise if prediction == "epsilon" else from_v
    same(run("ddim", denoise, x, path), reference_run(scheduler, x), 1e-12)
    same(run("euler", denoise, x, path), reference_run(scheduler, x), 1e-12)


def test_ddim_from_pure_noise_equals_diffusers() -> None:
    options = {"timestep_spacing": "trailing", "clip_sample": False, "rescale_betas_zero_snr": True}
    scheduler = diffusers.DDIMScheduler(**SD_CONFIG, **options, prediction_type="v_prediction")
    scheduler = in_float64(scheduler, 10)
    path = levels.trailing(process_of(scheduler), 10)
    assert path.path[0].alpha == 0
    x = normals(2, 1)[0]
    same(run("ddim", from_v, x, path), reference_run(scheduler, x), 1e-12)


def test_euler_ancestral_is_ddim_with_eta_1() -> None:
    options = {"timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False}
    scheduler = in_float64(diffusers.DDIMScheduler(**SD_CONFIG, **options), 10)
    noises, again = drawn(normals(3)), drawn(normals(3))
    x = normals(4, 1)[0]
    reference = reference_run(scheduler, x, lambda: {"eta": 1.0, "variance_noise": again()})
    path = levels.leading(process_of(scheduler), 10)
    same(run("euler_ancestral", from_noise, x, path, noises), reference, 1e-12)


@pytest.mark.parametrize("steps", [1, 2, 10, 20])
def test_dpmpp_2m_equals_diffusers(steps: int) -> None:
    scheduler = in_float64(diffusers.DPMSolverMultistepScheduler(**SD_CONFIG), steps)
    path = path_of(scheduler)
    x = normals(5, 1)[0]
    same(run("dpmpp_2m", from_noise, x, path), reference_run(scheduler, x), 1e-6)  # it steps in float32


def test_dpmpp_2m_sde_equals_diffusers() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD_CONFIG, algorithm_type="sde-dpmsolver++")
    scheduler = in_float64(scheduler, 10)
    path = path_of(scheduler)
    x = normals(6, 1)[0]
    noises, again = drawn(normals(7)), drawn(normals(7))
    reference = reference_run(scheduler, x, lambda: {"variance_noise": again()})
    same(run("dpmpp_2m_sde", from_noise, x, path, noises), reference, 1e-6)  # it steps in float32


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20])
def test_unipc_equals_diffusers(steps: int) -> None:
    scheduler = in_float64(diffusers.UniPCMultistepScheduler(**SD_CONFIG), steps)
    path = path_of(scheduler)
    x = normals(8, 1)[0]
    same(run("unipc", from_noise, x, path), reference_run(scheduler, x), 1e-9)


@pytest.mark.parametrize("steps", [2, 3, 10])
def test_unipc_equals_diffusers_on_flow(steps: int) -> None:
    scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0
    )
    scheduler = in_float64(scheduler, steps)
    path = Levels(Flow(), tuple(Flow().at_time(sigma) for sigma in scheduler.sigmas.tolist()))
    times = iter(scheduler.timesteps.tolist())
    x = normals(9, 1)[0]

    def denoise(x: Tensor, level: Level) -> Tensor:
        return x - level.sigma * network(x, next(times))

    same(run("unipc", denoise, x, path), reference_run(scheduler, x), 1e-9)


def test_heun_equals_diffusers_on_flow() -> None:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(6)
    sigmas = [*scheduler.sigmas.tolist()[:-1][::2], 0.0]
    path = Levels(Flow(), tuple(Flow().at_time(sigma) for sigma in sigmas))
    x = normals(10, 1)[0]
    reference = reference_run(scheduler, x)  # the scheduler works in float32, and tells every half step

    def denoise(x: Tensor, level: Level) -> Tensor:
        return x - level.sigma * network(x, 1000 * level.sigma)

    ours = run("heun", denoise, x, path)
    same(ours, [*reference[1::2], reference[-1]], 1e-6)


def test_heun_equals_diffusers_on_vp() -> None:
    scheduler = in_float64(diffusers.HeunDiscreteScheduler(**SD_CONFIG, use_karras_sigmas=True), 8)
    ratios = [*scheduler.sigmas.tolist()[:-1][::2], 0.0]
    process = process_of(scheduler)
    path = levels.at_ratios(process, ratios[:-1])
    x = normals(11, 1)[0]
    time_of = dict(zip(scheduler.sigmas.tolist(), scheduler.timesteps.tolist(), strict=False))
    y = x * ratios[0]  # the scheduler's sample is x / alpha
    seen: list[Tensor] = []
    for i, time in enumerate(scheduler.timesteps):
        scaled = y / math.hypot(1, float(scheduler.sigmas[i]))
        y = scheduler.step(network(scaled, time_of[float(scheduler.sigmas[i])]), time, y).prev_sample
        seen.append(y)

    def denoise(x: Tensor, level: Level) -> Tensor:
        nearest = min(time_of, key=lambda ratio: abs(ratio - level.ratio))
        return (x - level.sigma * network(x, time_of[nearest])) / level.alpha

    steps = run("heun", denoise, x * path.path[0].sigma, path)
    for step, then, expected in zip(steps, path.path[1:], [*seen[1::2], seen[-1]], strict=True):
        close(step.x / then.alpha, expected, 1e-9)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_equals_diffusers(steps: int) -> None:
    """Up to its boundary condition, which differs from ours by less than 1e-6 (0.125 / (10 t)^2)."""
    scheduler = in_float64(diffusers.LCMScheduler(**SD_CONFIG), steps)
    path = levels.at_times(process_of(scheduler), scheduler.timesteps.tolist())
    x = normals(12, 1)[0]
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    reference = reference_run(scheduler, x, lambda: {"generator": theirs})
    noise: Noise = lambda: torch.randn(SHAPE, generator=ours, dtype=torch.float64)  # noqa: E731
    same(run("lcm", from_noise, x, path, noise), reference, 1e-6)


# What always holds


def all_paths(steps: int) -> Iterator[Levels]:
    yield levels.linear(steps)
    yield levels.beta(steps, 3.0)
    yield levels.karras(SD, steps)
    yield levels.leading(SD, steps).ending(SD.at_time(0))
    yield levels.trailing(ZERO_SNR, steps)
    yield levels.align_your_steps(ZERO_SNR, steps)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@settings(deadline=None, max_examples=8)
@given(steps=some.one_of(some.integers(1, 4), some.integers(5, 30)))
def test_all_numbers_are_finite(name: str, steps: int) -> None:
    for path in all_paths(steps):
        draw = drawn(normals(13, 2 * steps).float())
        done = run(name, toy, normals(14, 1)[0].float(), path, draw)
        assert [step.number for step in done] == list(range(1, path.steps + 1))
        assert all(step.total == path.steps for step in done)
        assert all(torch.isfinite(step.x).all() and torch.isfinite(step.clean).all() for step in done)
        assert all(step.x.dtype == torch.float32 for step in done)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_perfect_denoiser_is_believed(name: str) -> None:
    """Where the denoiser always answers with the same picture, every sampler ends at that picture."""
    picture = normals(15, 1)[0]
    for path in all_paths(5):
        if path.path[-1].sigma == 0:
            last = run(name, lambda x, level: picture, normals(16, 1)[0], path, drawn(normals(17)))[-1]
            close(last.x, picture, 1e-12)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_x_is_left_as_it_was(name: str) -> None:
    x = normals(18, 1)[0]
    run(name, toy, x, levels.linear(4), drawn(normals(19)))
    assert torch.equal(x, normals(18, 1)[0])


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_evaluated_tells_what_will_be_asked(name: str) -> None:
    for path in all_paths(6):
        asked: list[Level] = []

        def denoise(x: Tensor, level: Level, asked: list[Level] = asked) -> Tensor:
            asked.append(level)
            return toy(x, level)

        run(name, denoise, normals(20, 1)[0], path, drawn(normals(21)))
        told = evaluated(SAMPLERS[name], path)
        assert told == tuple(dict.fromkeys(asked))
        assert set(path.path[:-1]) <= set(told)
        assert all(level.sigma > 0 for level in told)


def test_stopping_early_costs_nothing() -> None:
    asked: list[Level] = []

    def denoise(x: Tensor, level: Level) -> Tensor:
        asked.append(level)
        return x

    stream = SAMPLERS["euler"](denoise, normals(22, 1)[0], levels.linear(50), silent)
    next(stream)
    assert len(asked) == 1


def test_every_schedule_runs_with_every_sampler() -> None:
    for name in SAMPLERS:
        for schedule in FLOW_SCHEDULES.values():
            run(name, toy, normals(23, 1)[0], schedule(3, 1.5, 0.6), drawn(normals(24)))
        for schedule in VP_SCHEDULES.values():
            run(name, toy, normals(23, 1)[0], schedule(SD, 3, 0.6), drawn(normals(24)))
