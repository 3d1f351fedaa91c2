"""Samplers: from noise to a picture, one generator function each.

Notation in the docstrings: a step goes from level (a, s) to (a', s'); c = denoise(x) is the estimate of the
clean picture and n = (x - a c) / s that of the noise, so that x = a c + s n; h = lambda' - lambda where
lambda = log(a / s); z is fresh standard-normal noise. The formulas hold for flow and variance-preserving
processes alike. Where a = 0 (pure noise) or s' = 0 (the clean picture), h is infinite, and their limits hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from calotype.sampling.levels import Level, Levels

Denoise = Callable[[Tensor, Level], Tensor]
"""Noisy x at a level -> estimate of the clean x."""

Noise = Callable[[], Tensor]
"""A fresh standard-normal tensor of x's shape."""


class Step(NamedTuple):
    """What a sampler tells after each step.

    `number` (1 to `total`) counts the steps done, x is the latent after this one, `clean` the estimate of the
    finished picture that it began with.
    """

    number: int
    total: int
    x: Tensor
    clean: Tensor


Sampler = Callable[[Denoise, Tensor, Levels, Noise], Iterator[Step]]


def _towards(x: Tensor, clean: Tensor, now: Level, then: Level, keep: float = 1.0) -> Tensor:
    """a' c + keep s' n"""
    part = keep * then.sigma / now.sigma
    return part * x + (then.alpha - part * now.alpha) * clean


def _renewed(x: Tensor, clean: Tensor, now: Level, then: Level, noise: Tensor) -> Tensor:
    """a' c + s' (e^-h n + sqrt(1 - e^-2h) z): the reverse SDE with c held. Old and new noise add up to s'."""
    kept = math.exp(-_gap(now, then))
    return _towards(x, clean, now, then, kept) + then.sigma * _new(now, then) * noise


def _gap(now: Level, then: Level) -> float:
    """h = lambda' - lambda"""
    return then.lam - now.lam


def _new(now: Level, then: Level) -> float:
    """sqrt(1 - e^-2h), the share of new noise in a step of the SDE"""
    return math.sqrt(-math.expm1(-2 * _gap(now, then)))


def _extrapolated(clean: Tensor, last: tuple[Level, Tensor] | None, now: Level, then: Level) -> Tensor:
    """c + (c - c_last) h / 2 h_last: c in the middle of the step, from this one and the last (level, c)."""
    if last is None or then.sigma == 0:  # first order: no history, or a step of infinite h
        return clean
    return clean + (clean - last[1]) * (_gap(now, then) / (2 * _gap(last[0], now)))


def euler(denoise: Denoise, x: Tensor, levels: Levels, noise: Noise) -> Iterator[Step]:
    """x' = a' c + s' n. Euler on x / a (Karras et al. 2022), x + (s' - s) v of rectified flow. Order 1."""
    for number, (now, then) in enumerate(levels.pairs(), 1):
        clean = denoise(x, now)
        x = _towards(x, clean, now, then)
        yield Step(number, levels.steps, x, clean)


def ddim(denoise: Denoise, x: Tensor, levels: Levels, noise: Noise) -> Iterator[Step]:
    """x' = a' c + s' n (Song et al. 2020, eta = 0): `euler`, under the name that it has for VP models."""
    return euler(denoise, x, levels, noise)


def euler_ancestral(denoise: Denoise, x: Tensor, levels: Levels, noise: Noise) -> Iterator[Step]:
    """x' = a' c + s' (e^-h n + sqrt(1 - e^-2h) z). DDPM's step (Ho et al. 2020), DDIM's with eta = 1."""
    for number, (now, then) in enumerate(levels.pairs(), 1):
        clean = denoise(x, now)
        x = clean if then.sigma == 0 else _renewed(x, clean, now, then, noise())
        yield Step(number, levels.steps, x, clean)


def heun(denoise: Denoise, x: Tensor, levels: Levels, noise: Noise) -> Iterator[Step]:
    """y' = y + d(a/m) (c + c_2)/2 + d(s/m) (n + n_2)/2, y = x / m, c_2 and n_2 at Euler's x'. Order 2.

    Karras et al. 2022, algorithm 2. m is the process's scale: Heun on x / a for VP, as in k-diffusion,
    and on x for flow, as in diffusers. The code takes Euler's x' and adds what c_2 changes.
    Two evaluations a step but the last.
    """
    for number, (now, then) in enumerate(levels.pairs(), 1):
        clean = denoise(x, now)
        x, scale = _towards(x, clean, now, then), levels.process.scale(now)
        if then.sigma > 0 and scale > 0:
            growth = levels.process.scale(then) / scale
            weight = growth * (now.sigma * then.alpha - now.alpha * then.sigma) / (2 * then.sigma)
            x = x + weight * (denoise(x, then) - clean)
        yield Step(number, levels.steps, x, clean)


def dpmpp_2m(denoise: Denoise, x: Tensor, levels: Levels, noise: Noise) -> Iterator[Step]:
    """x' = a' d + s' (x - a d) / s, d = c + (c - c_last) h / 2 h_last.

    DPM-Solver++(2M), Lu et al. 2022. Order 2.
    """
    last: tuple[Level, Tensor] | None = None
    for number, (now, then) in enumerate(levels.pairs(), 1):
        clean = denoise(x, now)
        x = _towards(x, _extrapolated(clean, last, now, then), now, then)
        last = now, clean
        yield Step(number, levels.steps, x, clean)


def dpmpp_2m_sde(denoise: Denoise, x: Tensor, levels: Levels, noise: Noise) -> Iterator[Step]:
    """euler_ancestral with d = c + (c - c_last) h / 2 h_last for c. SDE-DPM-Solver++(2M), Lu et al. 2022."""
    last: tuple[Level, Tensor] | None = None
    for number, (now, then) in enumerate(levels.pairs(), 1):
        clean = denoise(x, now)
        middle = _extrapolated(clean, last, now, then)
        x = clean if then.sigma == 0 else _renewed(x, middle, now, then, noise())
        last = now, clean
        yield Step(number, levels.steps, x, clean)


def dpmpp_sde(denoise: Denoise, x: Tensor, levels: Levels, noise: Noise) -> Iterator[Step]:
    """euler_ancestral with c from half way (in lambda), where a step of euler_ancestral leads.

    DPM-Solver++ SDE of k-diffusion with r = 1/2, after Lu et al. 2022. The noise of the half step is part of
    that of the whole, as on one Brownian path: with unrelated noises it is no better than euler_ancestral.
    Two evaluations a step but the last.
    """
    for number, (now, then) in enumerate(levels.pairs(), 1):
        clean = denoise(x, now)
        if then.sigma == 0:
            x = clean
        else:
            half, early = levels.between(now, then, 0.5), noise()
            middle = denoise(_renewed(x, clean, now, half, early), half)
            share = math.exp(-_gap(half, then)) * _new(now, half) / _new(now, then)
            x = _renewed(x, middle, now, then, share * early + math.sqrt(1 - share**2) * noise())
        yield Step(number, levels.steps, x, clean)


def dpmpp_3m_sde(denoise: Denoise, x: Tensor, levels: Levels, noise: Noise) -> Iterator[Step]:
    """x' = a' c + s' (e^-h n + sqrt(1 - e^-2h) z) + a' (f_2 c_1 - f_3 c_2).

    DPM-Solver++(3M) SDE of k-diffusion, after Lu et al. 2022. c_1 and c_2 are h dc/dlambda and h^2/2 times
    the second derivative, by divided differences; f_2 = 1 - (1 - e^-2h) / 2h, f_3 = f_2 / 2h - 1/2.
    """
    last: list[tuple[float, Tensor]] = []  # (h, c) of the last two steps, newest first
    for number, (now, then) in enumerate(levels.pairs(), 1):
        clean = denoise(x, now)
        if then.sigma == 0:
            x = clean
        else:
            h = _gap(now, then)
            x = _renewed(x, clean, now, then, noise())
            f2 = math.expm1(-2 * h) / (2 * h) + 1
            if len(last) == 1:
                x = x + (then.alpha * f2 * h / last[0][0]) * (clean - last[0][1])
            elif len(last) == 2:
                r0, r1 = last[0][0] / h, last[1][0] / h
                near, far = (clean - last[0][1]) / r0, (last[0][1] - last[1][1]) / r1
                second = (near - far) / (r0 + r1)
                x = x + then.alpha * (f2 * (near + r0 * second) - (f2 / (2 * h) - 0.5) * second)
            last = [(h, clean), *last[:1]]
        yield Step(number, levels.steps, x, clean)


def unipc(denoise: Denoise, x: Tensor, levels: Levels, noise: Noise) -> Iterator[Step]:
    """dpmpp_2m, whose every step is taken again, with c' from its end, before the next begins.

    x' = a' d + s' (x - a d) / s, d = c + w (c' - c) + v (c_last - c) / r, r = -h_last / h, w = b_1 - v,
    v = (b_1 - b_2) / (1 - r), b_1 = 1 / (1 - e^-h) - 1 / h, b_2 = 1 / (1 - e^-h) - 2 b_1 / h.

    UniPC-2 with B_2(h), Zhao et al. 2023. As in diffusers, the first step is taken again with w = 1/2 and
    v = 0, and the last is of first order.
    """
    begun = x  # where the step that led to x began
    last: tuple[Level, Tensor] | None = None
    before: tuple[Level, Tensor] | None = None  # (level, c) of the step before the last
    for number, (now, then) in enumerate(levels.pairs(), 1):
        clean = denoise(x, now)
        if last is not None:
            mixed = (last[1] + clean) / 2
            if before is not None:
                h, r = _gap(last[0], now), -_gap(before[0], last[0]) / _gap(last[0], now)
                b1 = -1 / math.expm1(-h) - 1 / h
                v = (b1 + 1 / math.expm1(-h) + 2 * b1 / h) / (1 - r)
                mixed = last[1] + (b1 - v) * (clean - last[1]) + (v / r) * (before[1] - last[1])
            x = _towards(begun, mixed, last[0], now)
        begun = x
        middle = clean if number == levels.steps else _extrapolated(clean, last, now, then)
        x = _towards(x, middle, now, then)
        before, last = last, (now, clean)
        yield Step(number, levels.steps, x, clean)


def lcm(denoise: Denoise, x: Tensor, levels: Levels, noise: Noise) -> Iterator[Step]:
    """x' = a' c + s' z. Consistency sampling (Song et al. 2023; Luo et al. 2023), for distilled models."""
    for number, (now, then) in enumerate(levels.pairs(), 1):
        clean = denoise(x, now)
        x = clean if number == levels.steps else then.alpha * clean + then.sigma * noise()
        yield Step(number, levels.steps, x, clean)


def plms(denoise: Denoise, x: Tensor, levels: Levels, noise: Noise) -> Iterator[Step]:
    """x' = a' (x - s n*) / a + s' n*, n* of the last four n by Adams and Bashforth's formulas, each of an order more.

    Pseudo linear multistep, Liu et al. 2022, as Stable Diffusion's authors and diffusers' PNDM run it: the first step
    is taken twice, with the noise found at its end averaged in. From pure noise, which says nothing of the picture, it
    is Euler's.
    """
    past: list[Tensor] = []  # n of the steps before, newest first
    for number, (now, then) in enumerate(levels.pairs(), 1):
        clean = denoise(x, now)
        n = (x - now.alpha * clean) / now.sigma
        if now.alpha == 0 or then.sigma == 0:
            mixed = n
        elif number == 1:
            end = _towards(x, clean, now, then)
            mixed = (n + (end - then.alpha * denoise(end, then)) / then.sigma) / 2
        else:
            weights = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
            used = [n, *past][:4]
            mixed = torch.stack([w * m for w, m in zip(weights[len(used) - 1], used, strict=True)]).sum(dim=0)
        estimate = clean if mixed is n else (x - now.sigma * mixed) / now.alpha
        x = _towards(x, estimate, now, then)
        past = [n, *past[:2]]
        yield Step(number, levels.steps, x, clean)


SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "unipc": unipc,
    "plms": plms,
    "lcm": lcm,
}


def evaluated(sampler: Sampler, levels: Levels) -> tuple[Level, ...]:
    """The levels that the sampler will ask the denoiser for: each once, in the order of first use.

    Found by a dry run on one element, so that a denoiser can prepare all that depends on the level alone.
    """
    asked: dict[Level, None] = {}

    def denoise(x: Tensor, level: Level) -> Tensor:
        asked[level] = None
        return x

    for _ in sampler(denoise, torch.zeros(1), levels, lambda: torch.zeros(1)):
        pass
    return tuple(asked)
