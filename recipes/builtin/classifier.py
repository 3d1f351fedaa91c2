"""A judge that looks at one object and names it: `python -m recipes.builtin.classifier --minutes 5`.

A small convolutional network over crops of real composites in every style, in any colour, on any background,
blurred and noisy. It shares nothing with the model that it judges, and unlike the pixel distance of
`measure.References` it does not mind a changed colour. Held-out combinations of object and colour are not held
out from it. Training stops after the given minutes and goes on where it stopped; the state is in the data folder.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor, nn

from recipes.builtin.colours import BACKGROUNDS, COLOURS
from recipes.builtin.fetch import DATA
from recipes.builtin.library import STYLES, Library, load_library
from recipes.builtin.measure import crops, grounds
from recipes.builtin.model import SCALES
from recipes.builtin.objects import Object
from recipes.builtin.scenes import FREE, Scene, compose, make_scene

SIDE = 48  # pixels of a crop
STEPS = 1500
BATCH = 32
RATE = 3e-3
# Objects of every size that a scene of several can have.
SEEN = replace(FREE, scale=(0.38, 1.0))


class UntrainedJudgeError(RuntimeError):
    """The classifier has not been trained to the end."""


class Judge(nn.Module):
    """Crops (b 4 48 48: colour in 0..1 and mask, as `measure.crops` makes them) -> a logit for each object."""

    def __init__(self, objects: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_convolution(4, 32, stride=2),
            *_convolution(32, 64, stride=2),
            *_convolution(64, 64, stride=1),
            *_convolution(64, 128, stride=2),
            *_convolution(128, 128, stride=1),
            *_convolution(128, 192, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(192, objects),
        )

    def forward(self, crop: Tensor) -> Tensor:
        return self.layers(crop)


def _convolution(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


@torch.inference_mode()
def ranks(judge: Judge, pictures: Tensor, rows: Sequence[int]) -> list[int]:
    """The rank (1 is best) that the judge gives to the right object, by its row, in each picture (b 3 h w)."""
    logits = judge(crops(pictures, grounds(pictures), SIDE))
    right = logits[torch.arange(len(rows)), torch.tensor(rows)]
    return [int(rank) for rank in 1 + (logits > right[:, None]).sum(1)]


def load_judge(data: Path, library: Library) -> Judge:
    """The trained judge of this library's objects; UntrainedJudgeError where there is none."""
    file = _file(data, library)
    judge = Judge(len(library.objects))
    state = _saved(file, library)
    if state is None or state["step"] < STEPS:
        raise UntrainedJudgeError(f"{file}: no finished classifier; run `python -m recipes.builtin.classifier` first")
    judge.load_state_dict(state["judge"])
    return judge.eval()


def train(data: Path, library: Library, minutes: float) -> int:
    """Train, or train on, for at most `minutes`; returns the step reached, of STEPS."""
    torch.manual_seed(0)
    judge = Judge(len(library.objects))
    optimizer = torch.optim.AdamW(judge.parameters(), RATE, weight_decay=0.02)
    rng = np.random.default_rng(0)
    step = 0
    file = _file(data, library)
    state = _saved(file, library)
    if state is not None:
        judge.load_state_dict(state["judge"])
        optimizer.load_state_dict(state["optimizer"])
        rng.bit_generator.state = json.loads(state["rng"])
        step = int(state["step"])
    end = time.monotonic() + 60 * minutes
    while step < STEPS and time.monotonic() < end:
        crop, rows = batch(rng, library, BATCH)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        loss = F.cross_entropy(judge(crop), rows, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"classifier, step {step} of {STEPS}: loss {float(loss.detach()):.3f}", flush=True)
        if step % 100 == 0:
            _save(file, library, judge, optimizer, rng, step)
    _save(file, library, judge, optimizer, rng, step)
    return step


def batch(rng: Generator, library: Library, count: int) -> tuple[Tensor, Tensor]:
    """Degraded crops of random objects, and their rows."""
    rows = rng.integers(len(library.objects), size=count)
    canvas = library.size if rng.random() < 0.25 else library.size // 2  # small ones cost a fifth
    pictures = compose([_scene(rng, library.objects[row]) for row in rows], library, canvas) / 2 + 0.5
    return _degraded(rng, crops(pictures, grounds(pictures), SIDE)), torch.from_numpy(rows)


def _scene(rng: Generator, thing: Object) -> Scene:
    colour = COLOURS[int(rng.integers(len(COLOURS)))] if thing.recolours and rng.random() < 0.35 else None
    style = STYLES[int(rng.choice(len(STYLES), p=(0.6, 0.2, 0.2)))]
    usual = rng.random() < 0.4 and colour != "white"
    grounds_allowed = [word for word in BACKGROUNDS if word.split()[-1] != colour]
    background = "white" if usual else grounds_allowed[int(rng.integers(len(grounds_allowed)))]
    return make_scene([(1, thing, colour)], kind="single", style=style, background=background, rng=rng, variety=SEEN)


def _degraded(rng: Generator, crop: Tensor) -> Tensor:
    """Some blurred, some noisy, some in other brightness, and the box never quite right."""
    noise = torch.Generator().manual_seed(int(rng.integers(2**31)))
    made = crop.clone()
    for row in range(len(crop)):
        if rng.random() < 0.4:
            coarse = int(rng.integers(16, 40))
            small = F.interpolate(made[row][None], (coarse, coarse), mode="bilinear", antialias=True)
            made[row] = F.interpolate(small, (SIDE, SIDE), mode="bilinear")[0]
        moved = (int(shift) for shift in rng.integers(-3, 4, 2))
        made[row] = made[row].roll(tuple(moved), (1, 2))  # what leaves on one side is background on the other
        if rng.random() < 0.4:
            grain = torch.randn(made[row, :3].shape, generator=noise) * float(rng.uniform(0.01, 0.1))
            made[row, :3] += grain
        made[row, :3] = made[row, :3] * float(rng.uniform(0.9, 1.1))
    return made.clamp_(0, 1)


def held_out(judge: Judge, library: Library, pictures: int = 654) -> tuple[float, float]:
    """Top-1 and top-5 accuracy on degraded crops that training has not seen."""
    crop, rows = batch(np.random.default_rng(1), library, pictures)
    with torch.inference_mode():
        logits = judge(crop)
    rank = 1 + (logits > logits.gather(1, rows[:, None])).sum(1)
    return float((rank == 1).float().mean()), float((rank <= 5).float().mean())


def _file(data: Path, library: Library) -> Path:
    return data / "eval" / f"classifier-{library.size}-{len(library.objects)}.pt"


def _saved(file: Path, library: Library) -> dict[str, Any] | None:
    if not file.exists():
        return None
    state: dict[str, Any] = torch.load(file, weights_only=True)
    names = [thing.name for thing in library.objects]
    return state if state["objects"] == names else None  # of another table of objects: begin again


def _save(
    file: Path, library: Library, judge: Judge, optimizer: torch.optim.Optimizer, rng: Generator, step: int
) -> None:
    state = {
        "objects": [thing.name for thing in library.objects],
        "judge": judge.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": json.dumps(rng.bit_generator.state),
        "step": step,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    torch.save(state, part)
    part.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=sorted(SCALES), default="cpu")
    parser.add_argument("--data", type=Path, default=DATA, help="cache folder")
    parser.add_argument("--minutes", type=float, default=9.0)
    given = parser.parse_args()
    scale = SCALES[given.scale]
    library = load_library(given.data, size=scale.pixels, large=scale.large)
    step = train(given.data, library, given.minutes)
    if step < STEPS:
        print(f"stopped after step {step} of {STEPS}; run it again")
        return
    first, five = held_out(load_judge(given.data, library), library)
    print(f"held-out composites: top-1 {first:.1%}, top-5 {five:.1%}")


if __name__ == "__main__":
    main()
