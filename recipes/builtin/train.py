"""Train the built-in model: captions to latents, by flow matching, along a curriculum.

    python -m recipes.builtin.train --scale cpu --minutes 9      one chunk; run it again to go on where it stopped

The curriculum starts where learning is fast: one style, fixed places, and levels of nearly pure noise, where the task
is plain regression from a caption to clean latents. Then variety, and all levels. Scenes are composed on the device as
they are needed, so nothing is seen twice in the same way; the state holds everything that the next chunk needs.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from calotype.families.flux.network import to_tokens
from recipes.builtin.autoencoder import Basis, load_basis
from recipes.builtin.fetch import DATA
from recipes.builtin.library import Library, load_library
from recipes.builtin.model import END, PAD, SCALES, START, Networks, Scale
from recipes.builtin.optimizer import optimizers
from recipes.builtin.scenes import FIXED, FREE, VARIED, Variety, caption, compose, sample_scenes

DROPPED = 0.1  # share of captions left empty, for classifier-free guidance


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Until `until` (share of all steps): scenes drawn from each variety with its weight, and levels.

    `pure` is the share of samples at pure noise; the others' levels are sigmoid(normal(noisy, 1)).
    """

    until: float
    varieties: tuple[tuple[Variety, float], ...]
    pure: float
    noisy: float


# Each object by itself, as it is, nearly always on white: names first.
BARE = replace(FIXED, kinds={"single": 1.0}, recolour=0.0, background=0.15, synonym=0.05, unknown=0.0, decorate=0.0)
# The same for halves and quarters of the canvas: which name goes where.
TOGETHER = replace(BARE, kinds={"pair": 0.65, "count": 0.35}, background=0.1)
# Mirrored, smaller or a little aside where the caption does not say.
LIVELY = replace(FIXED, flip=0.5, scale=(0.85, 1.0), shift=4 / 128, tint=0.04)
ON_TWO_CORES = (
    Stage(until=0.33, varieties=((BARE, 1.0),), pure=0.9, noisy=1.5),
    Stage(until=0.56, varieties=((BARE, 0.15), (FIXED, 0.85)), pure=0.35, noisy=1.2),
    Stage(until=0.92, varieties=((BARE, 0.05), (FIXED, 0.15), (TOGETHER, 0.8)), pure=0.75, noisy=1.2),
    Stage(until=1.00, varieties=((BARE, 0.05), (FIXED, 0.45), (TOGETHER, 0.5)), pure=0.2, noisy=0.3),
)
ON_A_GPU = (
    Stage(until=0.08, varieties=((BARE, 1.0),), pure=0.9, noisy=1.5),
    Stage(until=0.20, varieties=((BARE, 0.2), (TOGETHER, 0.5), (FIXED, 0.3)), pure=0.4, noisy=1.2),
    Stage(until=0.45, varieties=((FIXED, 0.4), (LIVELY, 0.2), (VARIED, 0.4)), pure=0.15, noisy=1.0),
    Stage(until=1.00, varieties=((FIXED, 0.1), (VARIED, 0.4), (FREE, 0.5)), pure=0.05, noisy=0.6),
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long, how fast and on what.

    The rates rise over `warm` steps and fall to a twentieth over the last `decay` share of all `steps`; `average` is
    how much of the kept weights, an exponential moving average, stays at each step.
    """

    steps: int
    warm: int
    decay: float
    muon_rate: float
    adam_rate: float
    average: float
    curriculum: tuple[Stage, ...]


PLANS = {
    "cpu": Plan(
        steps=1320, warm=40, decay=0.10, muon_rate=6e-3, adam_rate=1.5e-3, average=0.99, curriculum=ON_TWO_CORES
    ),
    "gpu": Plan(steps=12000, warm=200, decay=0.4, muon_rate=4e-3, adam_rate=1.5e-3, average=0.999, curriculum=ON_A_GPU),
}


class Text:
    """Captions to ids for both encoders."""

    def __init__(self, file: Path, scale: Scale) -> None:
        self.tokenizer = Tokenizer.from_file(str(file))
        self.length = scale.text_tokens
        self.positions = scale.clip.positions

    def __call__(self, captions: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        words = [one.ids for one in self.tokenizer.encode_batch(captions, add_special_tokens=False)]
        t5 = [_padded([*ids[: self.length - 1], END], self.length) for ids in words]
        clip = [_padded([START, *ids[: self.positions - 2], END], self.positions) for ids in words]
        return torch.tensor(t5, device=device), torch.tensor(clip, device=device)


def _padded(ids: list[int], length: int) -> list[int]:
    return ids + [PAD] * (length - len(ids))


def flow_loss(networks: Networks, latents: Tensor, ids: tuple[Tensor, Tensor], sigma: Tensor, patch: int) -> Tensor:
    """Each sample's mean squared error of the velocity (noise - clean) at its own level (Lipman et al. 2022)."""
    noise = torch.randn_like(latents)
    level = sigma[:, None, None, None]
    noisy = (1 - level) * latents + level * noise
    rows, columns = latents.shape[2] // patch, latents.shape[3] // patch
    text, pooled = networks.t5(ids[0]), networks.clip(ids[1]).pooled
    prepared = networks.transformer.prepare(text, pooled, None, sigma[None], rows, columns)
    velocity = networks.transformer(to_tokens(noisy, patch), prepared, 0)
    return (velocity - to_tokens(noise - latents, patch)).square().mean((1, 2))


class Batches:
    """Scenes and captions of a stage, drawn from one seeded generator."""

    def __init__(self, library: Library, basis: Basis, scale: Scale, text: Text, device: torch.device) -> None:
        self.library, self.basis, self.scale, self.text, self.device = library, basis, scale, text, device

    def __call__(self, rng: np.random.Generator, stage: Stage) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """Latents, ids and levels of one batch."""
        weights = np.array([weight for _, weight in stage.varieties])
        shares = rng.multinomial(self.scale.batch, weights / weights.sum())
        scenes = []
        captions: list[str] = []
        for (variety, _), count in zip(stage.varieties, shares, strict=True):
            drawn = sample_scenes(rng, int(count), variety, self.library.objects)
            scenes.extend(drawn)
            captions.extend("" if rng.random() < DROPPED else caption(scene, rng, variety) for scene in drawn)
        picture = compose(scenes, self.library, self.scale.pixels, self.device) / 2 + 0.5
        sigma = 1 / (1 + np.exp(-rng.normal(stage.noisy, 1.0, len(scenes))))
        sigma[rng.random(len(scenes)) < stage.pure] = 1.0
        return (
            self.basis.encode(picture),
            self.text(captions, self.device),
            torch.tensor(sigma, dtype=torch.float32, device=self.device),
        )


def rate_at(plan: Plan, step: int) -> float:
    """The share of the full learning rate at a step."""
    left = (plan.steps - step) / (plan.decay * plan.steps)
    return min(1.0, (step + 1) / plan.warm, max(left, 0.05))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--scale", choices=sorted(SCALES), default="cpu")
    arguments.add_argument("--data", type=Path, default=DATA)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--minutes", type=float, default=9.0)
    given = arguments.parse_args()
    scale, plan, device = SCALES[given.scale], PLANS[given.scale], torch.device(given.device)
    folder: Path = given.data / given.scale

    torch.manual_seed(0)
    networks = Networks(scale).to(device)
    averaged = copy.deepcopy(networks).requires_grad_(False)
    muon, adam = optimizers(networks, plan.muon_rate, plan.adam_rate)
    rng = np.random.default_rng(0)
    step = 0
    state_file = folder / "state.pt"
    if state_file.exists():
        step = restore(
            torch.load(state_file, map_location=device, weights_only=True),
            networks,
            averaged,
            muon,
            adam,
            rng,
        )
    library = load_library(given.data, size=scale.pixels, large=scale.large).to(device)
    text = Text(folder / "tokenizer.json", scale)
    batches = Batches(library, load_basis(folder, device), scale, text, device)

    loss_of = torch.compile(flow_loss, dynamic=False)  # about 1.7 times as fast; the first step takes minutes

    started = told = time.monotonic()
    high: list[float] = []
    low: list[float] = []
    while step < plan.steps and time.monotonic() - started < 60 * given.minutes:
        stage = next(stage for stage in plan.curriculum if step < stage.until * plan.steps)
        latents, ids, sigma = batches(rng, stage)
        share = rate_at(plan, step)
        for optimizer in (muon, adam):
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * share
            optimizer.zero_grad()
        losses = loss_of(networks, latents, ids, sigma, scale.transformer.patch)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_([p for group in adam.param_groups for p in group["params"]], 1.0)
        muon.step()
        adam.step()
        step += 1
        keep = min(plan.average, 1 - 1 / (step / 10 + 1))
        with torch.no_grad():
            for kept, new in zip(averaged.parameters(), networks.parameters(), strict=True):
                kept.lerp_(new, 1 - keep)
        if step % 2 == 0:
            high.append(float(losses.detach()[sigma > 0.9].mean()))
            low.append(float(losses.detach()[sigma <= 0.9].mean()))
        if step % 25 == 0:
            now = time.monotonic()
            print(
                json.dumps(
                    {
                        "step": step,
                        "loss at noise > 0.9": round(float(np.nanmean(high)), 4),
                        "below": round(float(np.nanmean(low)), 4),
                        "samples/s": round(25 * scale.batch / (now - told), 1),
                    }
                ),
                flush=True,
            )
            told, high, low = now, [], []
        if step % 50 == 0:
            save(state_file, step, networks, averaged, muon, adam, rng)
    save(state_file, step, networks, averaged, muon, adam, rng)
    print(f"stopped after step {step} of {plan.steps}")


def save(
    file: Path,
    step: int,
    networks: Networks,
    averaged: Networks,
    muon: torch.optim.Optimizer,
    adam: torch.optim.Optimizer,
    rng: np.random.Generator,
) -> None:
    """Write all that the next chunk needs, in place of the old state only when complete."""
    state = {
        "step": step,
        "networks": networks.state_dict(),
        "averaged": averaged.state_dict(),
        "muon": muon.state_dict(),
        "adam": adam.state_dict(),
        "scenes": json.dumps(rng.bit_generator.state),
        "noise": torch.get_rng_state(),
        "device noise": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    part = file.with_suffix(".part")
    torch.save(state, part)
    part.replace(file)


def restore(
    state: dict[str, Any],
    networks: Networks,
    averaged: Networks,
    muon: torch.optim.Optimizer,
    adam: torch.optim.Optimizer,
    rng: np.random.Generator,
) -> int:
    """Put a saved state back; returns its step."""
    networks.load_state_dict(state["networks"])
    averaged.load_state_dict(state["averaged"])
    muon.load_state_dict(state["muon"])
    adam.load_state_dict(state["adam"])
    rng.bit_generator.state = json.loads(state["scenes"])
    torch.set_rng_state(state["noise"].cpu())
    if state.get("device noise") is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["device noise"].cpu())
    return int(state["step"])


if __name__ == "__main__":
    main()
