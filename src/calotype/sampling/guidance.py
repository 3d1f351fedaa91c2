"""Guidance: a denoiser made of denoisers. It wraps `denoise` and leaves the samplers alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from calotype.sampling.levels import Level
from calotype.sampling.samplers import Denoise

Prediction = Literal["noise", "v", "flow"]
"""What a network predicts: the noise n, v = alpha n - sigma clean, or the flow's velocity n - clean."""

# Up to a factor, each of them is w x - clean: here is w.
_WEIGHTS: dict[Prediction, Callable[[Level], float]] = {
    "noise": lambda level: 1 / level.alpha if level.alpha > 0 else math.inf,
    "v": lambda level: level.alpha,
    "flow": lambda level: 1.0,
}


def guided(
    positive: Denoise, negative: Denoise, scale: float, rescale: float = 0.0, prediction: Prediction = "noise"
) -> Denoise:
    """negative + scale (positive - negative): classifier-free guidance (Ho and Salimans 2022).

    Scale 1 is `positive` itself. `rescale` in 0..1 pulls the spread of the result back to the positive one's
    (Lin et al. 2023, section 3.4). Guidance is the same on clean pictures and on what the network predicts,
    but rescaling is not: it is done on the latter, which `prediction` names, as in diffusers.
    """
    if scale == 1.0:
        return positive

    def denoise(x: Tensor, level: Level) -> Tensor:
        with_, without = positive(x, level), negative(x, level)
        clean = without + scale * (with_ - without)
        return clean if rescale == 0 else _rescaled(clean, with_, rescale, prediction, x, level)

    return denoise


Both = Callable[[Tensor, Level], tuple[Tensor, Tensor]]
"""Noisy x at a level -> the estimates of the clean x with the prompt and without it."""


def sides(denoise: Denoise, count: int) -> Callable[[Tensor, Level], tuple[Tensor, ...]]:
    """The answers of a denoiser with `count` prompts for every row of x: the first of all rows, the second of all..."""

    def answers(x: Tensor, level: Level) -> tuple[Tensor, ...]:
        if count == 1:
            return (denoise(x, level),)
        # One row is every side's, and they may share what they compute of it.
        return denoise(x if len(x) == 1 else x.repeat(count, 1, 1, 1), level).chunk(count)

    return answers


def halves(denoise: Denoise) -> Both:
    """As `sides`, for the two of guidance."""
    answers = sides(denoise, 2)

    def both(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        with_, without = answers(x, level)
        return with_, without

    return both


def guided_both(both: Both, scale: float, rescale: float = 0.0, prediction: Prediction = "noise") -> Denoise:
    """As `guided`, where one call answers for both sides."""

    def denoise(x: Tensor, level: Level) -> Tensor:
        with_, without = both(x, level)
        clean = without + scale * (with_ - without)
        return clean if rescale == 0 else _rescaled(clean, with_, rescale, prediction, x, level)

    return denoise


def _rescaled(
    clean: Tensor, positive: Tensor, rescale: float, prediction: Prediction, x: Tensor, level: Level
) -> Tensor:
    weight = _WEIGHTS[prediction](level)
    if math.isinf(weight):  # pure noise: the noise is x, whatever the clean picture is
        return clean
    ratio = _spread(weight * x - positive) / _spread(weight * x - clean)
    factor = rescale * ratio + (1 - rescale)
    return factor * clean + weight * (1 - factor) * x


def _spread(x: Tensor) -> Tensor:
    """The standard deviation of each row, shaped to multiply it."""
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)
