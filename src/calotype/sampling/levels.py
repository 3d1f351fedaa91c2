"""Noise levels: how much picture and how much noise a latent holds, and the schedules that choose them.

Everything runs along a process x = alpha * clean + sigma * noise, from pure noise to the clean picture. Two
measures of a level do not depend on how x is scaled: its ratio = sigma / alpha (what k-diffusion calls sigma)
and lambda = log(alpha / sigma) (DPM-Solver's).

A schedule returns `steps` + 1 levels, noisiest first, the last one clean. Its `start` is the denoising
strength of image-to-image: `steps` steps over the part of the process from that fraction of its time on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from calotype.errors import RequestError

Floats = npt.NDArray[np.float64]

# Where the last training step is pure noise, the ratio has no largest value. diffusers puts alpha^2 = 2^-24
# there; so does here whatever must start from a number.
FARTHEST = math.sqrt((1 - 2**-24) / 2**-24)


class Level(NamedTuple):
    """One noise level: x = alpha * clean + sigma * noise; `time` is what the network is told."""

    alpha: float
    sigma: float
    time: float

    @property
    def ratio(self) -> float:
        """sigma / alpha, infinite for pure noise."""
        return self.sigma / self.alpha if self.alpha > 0 else math.inf

    @property
    def lam(self) -> float:
        """lambda = log(alpha / sigma): -inf for pure noise, inf for a clean picture."""
        if self.alpha == 0:
            return -math.inf
        return math.log(self.alpha / self.sigma) if self.sigma > 0 else math.inf


class Process(Protocol):
    """A path of levels from a clean picture to noise."""

    def at_ratio(self, ratio: float) -> Level:
        """The level whose sigma / alpha is `ratio`, from 0 (clean) to infinity (pure noise)."""
        ...

    def scale(self, level: Level) -> float:
        """The factor to divide out of x for methods (Heun) whose result depends on how x is scaled."""
        ...


@dataclass(frozen=True)
class Flow:
    """Rectified flow (Liu et al. 2022; Lipman et al. 2022): alpha = 1 - sigma, time = sigma in 0..1."""

    def at_time(self, time: float) -> Level:
        """The level at `time`, from 0 (clean) to 1 (pure noise)."""
        return Level(1.0 - time, time, time)

    def at_ratio(self, ratio: float) -> Level:
        return Level(0.0, 1.0, 1.0) if math.isinf(ratio) else self.at_time(ratio / (1.0 + ratio))

    def scale(self, level: Level) -> float:
        """1: the path is straight as it is."""
        return 1.0


def _scaled_linear(first: float, last: float, steps: int) -> Floats:
    return np.linspace(math.sqrt(first), math.sqrt(last), steps) ** 2


def _linear(first: float, last: float, steps: int) -> Floats:
    return np.linspace(first, last, steps)


def _cosine(first: float, last: float, steps: int) -> Floats:
    bars = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - bars[1:] / bars[:-1], 0.999)


# (beta_start, beta_end, train steps) -> betas, by the names of `beta_schedule` in scheduler_config.json. The
# last one, the cosine of Nichol and Dhariwal 2021, has no ends to choose.
BETAS: dict[str, Callable[[float, float, int], Floats]] = {
    "scaled_linear": _scaled_linear,
    "linear": _linear,
    "squaredcos_cap_v2": _cosine,
}


@dataclass(frozen=True)
class VariancePreserving:
    """DDPM's discrete process (Ho et al. 2020): alpha^2 + sigma^2 = 1, time counted in training steps from 0.

    `alpha_bars` holds alpha^2 of each training step, decreasing (`alphas_cumprod` elsewhere). Between
    training steps lambda is linear in time, as in k-diffusion.
    """

    alpha_bars: tuple[float, ...] = field(repr=False)

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Floats, zero_snr: bool = False) -> VariancePreserving:
        """From the variance added at each training step: alpha^2 is the running product of 1 - beta.

        `zero_snr` moves the last step to pure noise (Lin et al. 2023, algorithm 1): alpha is shifted so that
        it ends at 0, then stretched so that it begins where it did.
        """
        alphas = np.sqrt(np.cumprod(1 - np.asarray(betas, dtype=np.float64)))
        if zero_snr:
            alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
        return cls(tuple(float(alpha) for alpha in alphas**2))

    @property
    def train_steps(self) -> int:
        return len(self.alpha_bars)

    @cached_property
    def _log_ratios(self) -> Floats:
        bars = np.maximum(np.asarray(self.alpha_bars, dtype=np.float64), 2**-24)
        return np.log((1 - bars) / bars) / 2

    def at_time(self, time: float) -> Level:
        """The level at a training step, whole or not, from 0 to train_steps - 1."""
        assert 0 <= time <= self.train_steps - 1, time
        if time == int(time):
            bar = self.alpha_bars[int(time)]
            return Level(math.sqrt(bar), math.sqrt(1 - bar), float(time))
        log_ratio = float(np.interp(time, np.arange(self.train_steps), self._log_ratios))
        return self._at(math.exp(log_ratio), float(time))

    def at_ratio(self, ratio: float) -> Level:
        """As in Process; `time` stays within the training steps where the ratio is beyond them."""
        log_ratio = math.log(ratio) if ratio > 0 else -math.inf
        return self._at(ratio, float(np.interp(log_ratio, self._log_ratios, np.arange(self.train_steps))))

    def scale(self, level: Level) -> float:
        """alpha: x / alpha has the straight trajectories of Karras et al. 2022."""
        return level.alpha

    def _at(self, ratio: float, time: float) -> Level:
        if math.isinf(ratio):
            return Level(0.0, 1.0, time)
        return Level(1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio), time)


@dataclass(frozen=True)
class Levels:
    """The levels that one job passes through, noisiest first: one more than its steps.

    `reached`, where each step leads, is the next level of the path unless given. (DDIM in diffusers counts back a fixed
    number of training steps, whatever its spacing.)
    """

    process: Process
    path: tuple[Level, ...]
    reached: tuple[Level, ...] | None = None

    def __post_init__(self) -> None:
        assert len(self.path) > 1, self.path
        assert all(now.ratio > then.ratio for now, then in self.pairs()), self.path

    @property
    def steps(self) -> int:
        return len(self.path) - 1

    def pairs(self) -> Iterator[tuple[Level, Level]]:
        """(now, then) of each step."""
        return pairwise(self.path) if self.reached is None else zip(self.path[:-1], self.reached, strict=True)

    def between(self, now: Level, then: Level, fraction: float) -> Level:
        """The level `fraction` of the way from `now` to `then` in lambda.

        Where lambda is infinite (pure noise, a clean picture) there is no such way: alpha and sigma are each
        taken at that fraction instead, and the level of the process that has their ratio is returned.
        """
        if math.isfinite(now.lam) and math.isfinite(then.lam):
            return self.process.at_ratio(now.ratio ** (1 - fraction) * then.ratio**fraction)
        sigma = (1 - fraction) * now.sigma + fraction * then.sigma
        alpha = (1 - fraction) * now.alpha + fraction * then.alpha
        return self.process.at_ratio(sigma / alpha)

    def ending(self, last: Level) -> Levels:
        """The same path with another last level, for processes that do not end at a clean picture.

        `ending(process.at_time(0))` is what diffusers calls final_sigmas_type "sigma_min" and, in DDIM,
        set_alpha_to_one false. A step that this leaves without a way to go is dropped.
        """
        kept = [(now, then if then.sigma > 0 else last) for now, then in self.pairs() if now.ratio > last.ratio]
        reached = None if self.reached is None else tuple(then for _, then in kept)
        return replace(self, path=(*(now for now, _ in kept), last), reached=reached)


class FlowSchedule(Protocol):
    def __call__(self, steps: int, shift: float = 1.0, start: float = 1.0) -> Levels: ...


def dynamic_shift(tokens: int, first: tuple[int, float] = (256, 0.5), last: tuple[int, float] = (4096, 1.15)) -> float:
    """FLUX.1 dev's shift for a picture of so many image tokens: exp(mu), mu linear through two (tokens, mu).

    Its form exp(mu) / (exp(mu) + 1/t - 1) is the static k t / (1 + (k - 1) t) with k = exp(mu).
    """
    slope = (last[1] - first[1]) / (last[0] - first[0])
    return math.exp(first[1] + slope * (tokens - first[0]))


def shifted(time: float, shift: float) -> float:
    """k t / (1 + (k - 1) t), the time of k = `shift` times the ratio (Esser et al. 2024, eq. 23)."""
    return shift * time / (1 + (shift - 1) * time)


def _flow(times: Sequence[float], shift: float) -> Levels:
    process = Flow()
    return Levels(process, (*(process.at_time(shifted(time, shift)) for time in times), process.at_time(0.0)))


def linear(steps: int, shift: float = 1.0, start: float = 1.0) -> Levels:
    """t = 1, 1 - 1/n, ..., 1/n, shifted: BFL's get_schedule, and diffusers' FluxPipeline."""
    return _flow([start * (1 - i / steps) for i in range(steps)], shift)


def simple(steps: int, shift: float = 1.0, start: float = 1.0) -> Levels:
    """ComfyUI's `simple`: every (1000/n)-th entry, rounded towards noise, of a table of 1000 shifted times.

    The same as `linear` where n divides 1000. (ComfyUI's table for FLUX alone has 10,000 entries.)
    """
    entries = _whole("simple", steps, 1000, start)
    return _flow([(entries - int(i * (entries / steps))) / 1000 for i in range(steps)], shift)


def normal(steps: int, shift: float = 1.0, start: float = 1.0) -> Levels:
    """From 1 to the shifted 1/1000 in even steps, then shifted again.

    SD3 in diffusers (FlowMatchEulerDiscreteScheduler on its own), ComfyUI's `normal`, DiffSynth-Studio.
    """
    least = shifted(1 / 1000, shift)
    return _flow(np.linspace(least + (1 - least) * start, least, steps).tolist(), shift)


def beta(steps: int, shift: float = 1.0, start: float = 1.0) -> Levels:
    """Times at the quantiles of a Beta(0.6, 0.6) distribution, dense at both ends (Lee et al. 2024), shifted.

    ComfyUI's `beta` without its rounding to a table of 1000, which drops steps that round to the same entry. The last
    time is 1/1000, or half of a start that is nearer to the picture.
    """
    least = min(1 / 1000, start / 2)
    return _flow([least + (start - least) * beta_quantile(1 - i / steps) for i in range(steps)], shift)


def beta_quantile(p: float, shape: float = 0.6) -> float:
    """The x at which the distribution function of Beta(shape, shape) is `p`, by Newton's method."""
    if p > 0.5:
        return 1.0 - beta_quantile(1.0 - p, shape)
    if p == 0:
        return 0.0
    norm = math.gamma(shape) ** 2 / math.gamma(2 * shape)
    x = (p * shape * norm) ** (1 / shape)  # the first term of the series, which is all that counts near 0
    for _ in range(8):
        term, total = 1.0, 0.0
        for k in range(60):  # x <= 1/2: the terms fall faster than 2^-k
            total += term / (shape + k)
            term *= (k + 1 - shape) / (k + 1) * x
        x -= (x**shape * total / norm - p) / (x ** (shape - 1) * (1 - x) ** (shape - 1) / norm)
    return x


FLOW_SCHEDULES: dict[str, FlowSchedule] = {"linear": linear, "simple": simple, "normal": normal, "beta": beta}


class VPSchedule(Protocol):
    def __call__(self, process: VariancePreserving, steps: int, start: float = 1.0) -> Levels: ...


def _reach(process: VariancePreserving, start: float) -> int:
    """How many training steps the part of the process that begins at `start` covers."""
    assert 0 < start <= 1, start
    return max(round(process.train_steps * start), 2)


def _whole(schedule: str, steps: int, train_steps: int, start: float, offset: int = 0) -> int:
    """How many whole training steps there are from `start` on; RequestError if fewer than `steps`."""
    reach = round(train_steps * start)
    if steps > reach - offset:
        why = f"the schedule {schedule} takes whole training steps, at a denoising strength of {start:g}"
        raise RequestError("steps", steps, f"at most {reach - offset:,}: {why}")
    return reach


def at_times(process: VariancePreserving, times: Sequence[float]) -> Levels:
    """The levels at these training steps, whole or not, noisiest first, and the clean picture."""
    return Levels(process, (*(process.at_time(time) for time in times), process.at_ratio(0.0)))


def at_ratios(process: Process, ratios: Sequence[float]) -> Levels:
    """The levels with these ratios sigma / alpha, largest first, and the clean picture."""
    return Levels(process, (*(process.at_ratio(ratio) for ratio in ratios), process.at_ratio(0.0)))


def _range(process: VariancePreserving, start: float) -> tuple[float, float]:
    """The largest and the smallest ratio of the part of the process that begins at `start`."""
    most = process.at_time(_reach(process, start) - 1).ratio
    return min(most, FARTHEST), process.at_time(0).ratio


def leading(process: VariancePreserving, steps: int, start: float = 1.0, offset: int = 1) -> Levels:
    """t = offset + i (T // n): Stable Diffusion's own spacing (`steps_offset` 1 in its published folders)."""
    reach = _whole("leading", steps, process.train_steps, start, offset)
    return at_times(process, [offset + i * (reach // steps) for i in reversed(range(steps))])


def trailing(process: VariancePreserving, steps: int, start: float = 1.0) -> Levels:
    """t = round(T - i T/n) - 1: begins at the last training step (Lin et al. 2023)."""
    reach = _whole("trailing", steps, process.train_steps, start)
    return at_times(process, [round(reach - i * (reach / steps)) - 1 for i in range(steps)])


def linspace(process: VariancePreserving, steps: int, start: float = 1.0) -> Levels:
    """Whole steps from the last to the first: DDIM's "linspace" in diffusers, and DiffSynth-Studio.

    One step takes the last, as in DiffSynth-Studio (diffusers takes the first, which is nearly clean).
    """
    reach = _whole("linspace", steps, process.train_steps, start)
    return at_times(process, [round(time) for time in np.linspace(reach - 1, 0, steps).tolist()])


def vp_normal(process: VariancePreserving, steps: int, start: float = 1.0) -> Levels:
    """As linspace, without rounding: k-diffusion, ComfyUI's `normal`, and Euler's "linspace" in diffusers."""
    return at_times(process, np.linspace(_reach(process, start) - 1, 0, steps).tolist())


def sgm_uniform(process: VariancePreserving, steps: int, start: float = 1.0) -> Levels:
    """n + 1 even times from the last to the first training step, without the first (ComfyUI's name)."""
    return at_times(process, np.linspace(_reach(process, start) - 1, 0, steps + 1).tolist()[:-1])


def karras(process: VariancePreserving, steps: int, start: float = 1.0) -> Levels:
    """Even in ratio^(1/7), between the process's own ends (Karras et al. 2022, eq. 5)."""
    most, least = _range(process, start)
    roots: list[float] = np.linspace(math.pow(most, 1 / 7), math.pow(least, 1 / 7), steps).tolist()
    return at_ratios(process, [root**7 for root in roots])


def exponential(process: VariancePreserving, steps: int, start: float = 1.0) -> Levels:
    """Even in lambda, between the process's own ends."""
    most, least = _range(process, start)
    return at_ratios(process, np.exp(np.linspace(math.log(most), math.log(least), steps)).tolist())


def vp_beta(process: VariancePreserving, steps: int, start: float = 1.0) -> Levels:
    """As `beta` for flows, on training steps."""
    last = _reach(process, start) - 1
    return at_times(process, [last * beta_quantile(1 - i / steps) for i in range(steps)])


# Training steps of 1000 at the ends of ten optimal steps (Sabour et al. 2024, "Align Your Steps").
AYS_SD1 = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0)
AYS_SDXL = (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0)


def align_your_steps(
    process: VariancePreserving, steps: int, start: float = 1.0, table: Sequence[int] = AYS_SD1
) -> Levels:
    """The published table, interpolated to `steps` steps with lambda linear between its entries.

    As in its authors' notes, the last entry gives way to the clean picture. For another number of training
    steps than 1000 the table is stretched.
    """
    times = [time * (process.train_steps - 1) / 999 for time in reversed(table)]
    logs = [math.log(min(process.at_time(time).ratio, FARTHEST)) for time in times]
    begin = float(np.interp(math.log(_range(process, start)[0]), logs, np.arange(len(logs))))
    ratios = np.exp(np.interp(np.linspace(begin, 0, steps + 1), np.arange(len(logs)), logs))
    return at_ratios(process, ratios.tolist()[:-1])


def align_your_steps_sdxl(process: VariancePreserving, steps: int, start: float = 1.0) -> Levels:
    """align_your_steps with the table for SDXL."""
    return align_your_steps(process, steps, start, AYS_SDXL)


VP_SCHEDULES: dict[str, VPSchedule] = {
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
    "normal": vp_normal,
    "sgm_uniform": sgm_uniform,
    "karras": karras,
    "exponential": exponential,
    "beta": vp_beta,
    "align_your_steps": align_your_steps,
    "align_your_steps_sdxl": align_your_steps_sdxl,
}
