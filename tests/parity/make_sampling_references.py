"""Writes tests/data/sampling/*.json: what k-diffusion and SciPy answer on small problems.

    pip install scipy tqdm "torch>=2.6"
    pip install --no-deps k-diffusion==0.1.1.post1
    python tests/parity/make_sampling_references.py

The rest of k-diffusion's dependencies is not needed for its samplers, and is replaced by empty stand-ins.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from scipy import stats  # pyright: ignore[reportMissingTypeStubs, reportMissingImports]  # by hand only
from torch import Tensor

OUT = Path(__file__).parents[1] / "data" / "sampling"
SHAPE = (2, 3)
RATIOS = [14.61, 9.7, 6.2, 3.1, 1.7, 0.81, 0.33, 0.12, 0.031, 0.0]
FLOW_SIGMAS = [1.0, 0.94, 0.81, 0.62, 0.55, 0.31, 0.12, 0.03, 0.0]


def k_diffusion() -> Any:  # noqa: ANN401
    """k_diffusion.sampling alone, without the package around it."""
    stand_ins = {"torchdiffeq": {"odeint": None}, "torchsde": {}, "k_diffusion": {}}
    stand_ins["k_diffusion.utils"] = {"append_dims": lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]}  # pyright: ignore
    for name, content in stand_ins.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(content)
    vars(sys.modules["k_diffusion"])["utils"] = sys.modules["k_diffusion.utils"]
    path = importlib.metadata.distribution("k-diffusion").locate_file("k_diffusion/sampling.py")
    spec = importlib.util.spec_from_file_location("k_diffusion.sampling", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toy(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """A made-up denoiser, curved in x and in the level; the same for every scaling of (x, alpha, sigma)."""
    size = math.hypot(alpha, sigma)
    phase = torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape)
    return 0.5 * torch.tanh(1.3 * x / size + phase) + 0.4 * x / size * alpha / size


def numbers(x: Tensor) -> list[float]:
    return [float(value) for value in x.flatten()]


class Noise:
    """noise_sampler for k-diffusion, from a list."""

    def __init__(self, noises: Tensor) -> None:
        self.noises = iter(noises)
        self.half: tuple[Tensor, float] | None = None

    def fresh(self, now: Tensor, then: Tensor) -> Tensor:
        return next(self.noises)

    def nested(self, now: Tensor, then: Tensor) -> Tensor:
        """For dpmpp_sde, which asks for a half step, then for the whole around it: one path."""
        if self.half is None:
            self.half = next(self.noises), float(then)
            return self.half[0]
        (early, middle), self.half = self.half, None
        share = math.sqrt((1 - (middle / float(now)) ** 2) / (1 - (float(then) / float(now)) ** 2))
        share *= float(then) / middle
        return share * early + math.sqrt(1 - share**2) * next(self.noises)


def record(sampler: Any, path: list[float], flow: bool, x: Tensor, noise: Any) -> list[list[float]]:  # noqa: ANN401
    """x after every step."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        level = float(sigma.flatten()[0])
        return toy(x, 1 - level if flow else 1.0, level)

    seen: list[Tensor] = []
    options: dict[str, Any] = {"disable": True, "callback": lambda state: seen.append(state["x"])}  # pyright: ignore
    if noise is not None:
        options["noise_sampler"] = noise
    last = sampler(denoise, x, torch.tensor(path, dtype=torch.float64), **options)
    return [numbers(x) for x in [*seen[1:], last]]


def main() -> None:
    k = k_diffusion()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    noises = torch.randn((2 * len(RATIOS), *SHAPE), generator=generator, dtype=torch.float64)
    noise = {
        "euler_ancestral": Noise(noises).fresh,
        "dpmpp_2m_sde": Noise(noises).fresh,
        "dpmpp_sde": Noise(noises).nested,
        "dpmpp_3m_sde": Noise(noises).fresh,
    }
    names = ["euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "dpmpp_3m_sde"]
    made = {name: importlib.metadata.version(name) for name in ("k-diffusion", "scipy", "torch")}
    samplers: dict[str, Any] = {
        "made_with": made,
        "shape": SHAPE,
        "x": numbers(x),
        "noises": [numbers(noise) for noise in noises],
        "ratios": RATIOS,
        "flow_sigmas": FLOW_SIGMAS,
    }
    for name in names:
        run = record(getattr(k, f"sample_{name}"), RATIOS, False, x * RATIOS[0], noise.get(name))
        samplers[name] = run
    for name in ("euler", "heun"):
        samplers[f"flow {name}"] = record(getattr(k, f"sample_{name}"), FLOW_SIGMAS, True, x, None)
    probabilities = [1e-6, 1e-3, 0.01, 0.02, 0.1, 0.25, 0.4, 0.5, 0.6, 0.77, 0.9, 0.99, 0.999, 1.0]
    quantiles: dict[str, Any] = {"made_with": made, "p": probabilities}
    for shape in (0.6, 0.3):
        values = [float(stats.beta.ppf(p, shape, shape)) for p in probabilities]  # pyright: ignore
        quantiles[f"beta {shape}"] = values
    OUT.mkdir(parents=True, exist_ok=True)
    for name, content in {"k_diffusion": samplers, "beta_quantiles": quantiles}.items():
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
        (OUT / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
