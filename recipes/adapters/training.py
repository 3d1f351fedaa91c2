"""What both recipes share: the built-in model, examples kept as latents, and a loop that can be stopped and resumed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import calotype
from calotype.families.flux import FluxModel
from calotype.families.flux.network import Prepared, to_tokens

DROPPED = 0.1  # share of captions left empty, for classifier-free guidance
BLOCK = 8  # pixels a side of what one latent stands for


def builtin() -> tuple[calotype.Model[Any], FluxModel]:
    """The built-in model, as users hold it and as the family's own."""
    model = calotype.load()
    family = model.family
    assert isinstance(family, FluxModel)
    return model, family


class Examples(NamedTuple):
    """Training pictures as the networks see them, n of each; `hints` are latents of what a ControlNet is shown."""

    latents: Tensor  # n c h w
    text: Tensor  # n m d, T5's states
    pooled: Tensor  # n d, CLIP's
    hints: Tensor  # n c h w, or 0 of them

    @classmethod
    def load(cls, file: Path) -> Examples:
        with safe_open(file, "pt") as tensors:
            return cls(*(tensors.get_tensor(name) for name in cls._fields))

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        save_file({name: tensor.contiguous() for name, tensor in self._asdict().items()}, part)
        part.replace(file)


class LinearEncoder(NamedTuple):
    """Latents as a linear function of 8x8 blocks, fitted to the model's encoder by least squares.

    The decoder was trained on principal components of blocks, and the encoder to give these. The fit averages its
    errors away: it is nearer to the components than the encoder, on pictures of other kinds too, and costs nothing.
    """

    weight: Tensor  # 193 c: a block's numbers, then 1

    @classmethod
    @torch.inference_mode()
    def fit(cls, model: FluxModel, pictures: Tensor) -> LinearEncoder:
        """From some pictures (b 3 h w in 0..1) of things on plain backgrounds; 64 of 128x128 are plenty."""
        latents = torch.cat([model.encode(part) for part in pictures.split(2)])
        wanted = rearrange(latents, "b c h w -> (b h w) c").double()
        return cls(
            torch.linalg.lstsq(_blocks(pictures).flatten(0, 2).double(), wanted, driver="gelsd").solution.float()
        )

    def __call__(self, pictures: Tensor) -> Tensor:
        """b 3 8h 8w in 0..1 -> b c h w."""
        return rearrange(_blocks(pictures) @ self.weight, "b h w c -> b c h w")


def _blocks(pictures: Tensor) -> Tensor:
    blocks = rearrange(pictures, "b c (h p) (w q) -> b h w (c p q)", p=BLOCK, q=BLOCK)
    return F.pad(blocks, (0, 1), value=1.0)


@torch.inference_mode()
def read(model: FluxModel, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """What the text encoders make of captions: (b m d) and (b d)."""
    length = model.defaults.text_tokens
    assert length is not None
    t5 = torch.cat([model.t5_tokenizer(caption, length) for caption in captions])
    clip = torch.cat([model.clip_tokenizer(caption, model.clip.config.positions) for caption in captions])
    return model.t5(t5), model.clip(clip).pooled


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The rate rises over `warm` steps and falls to nothing along a cosine over all `steps`.

    `pure` is the share of samples at pure noise; the others' levels are sigmoid(normal(noisy, 1)).
    """

    steps: int
    batch: int
    rate: float
    warm: int
    pure: float
    noisy: float

    def rate_at(self, step: int) -> float:
        return self.rate * min(1.0, (step + 1) / self.warm) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class Batch(NamedTuple):
    """One step's samples: noisy tokens (b n d), what the network shall answer (b n d), and what it is told."""

    noisy: Tensor
    velocity: Tensor
    prepared: Prepared
    hints: Tensor  # b n d tokens, or 0 of them
    text: Tensor  # b m d
    pooled: Tensor  # b d
    sigma: Tensor  # b


class Batches:
    """Samples of the examples at random levels, drawn from one seeded generator."""

    def __init__(self, model: FluxModel, examples: Examples, plan: Plan) -> None:
        self.model, self.examples, self.plan = model, examples, plan
        self.random = torch.Generator().manual_seed(0)
        self.nothing = read(model, [""])

    def __call__(self) -> Batch:
        plan, examples, random = self.plan, self.examples, self.random
        network = self.model.transformer
        patch = network.config.patch
        rows = torch.randint(len(examples.latents), (plan.batch,), generator=random)
        latents = examples.latents[rows].float()
        dropped = torch.rand(plan.batch, generator=random) < DROPPED
        text = torch.where(dropped[:, None, None], self.nothing[0], examples.text[rows]).float()
        pooled = torch.where(dropped[:, None], self.nothing[1], examples.pooled[rows]).float()
        sigma = torch.sigmoid(torch.randn(plan.batch, generator=random) + plan.noisy)
        sigma[torch.rand(plan.batch, generator=random) < plan.pure] = 1.0
        noise = torch.randn(latents.shape, generator=random)
        level = sigma[:, None, None, None]
        height, width = latents.shape[2] // patch, latents.shape[3] // patch
        return Batch(
            noisy=to_tokens((1 - level) * latents + level * noise, patch),
            velocity=to_tokens(noise - latents, patch),
            prepared=network.prepare(text, pooled, None, sigma[None], height, width),
            hints=to_tokens(examples.hints[rows].float(), patch) if len(examples.hints) else examples.hints,
            text=text,
            pooled=pooled,
            sigma=sigma,
        )


def train(
    learner: nn.Module,
    loss_of: Callable[[Batch], Tensor],
    batches: Batches,
    plan: Plan,
    state: Path,
    minutes: float,
) -> int:
    """Train `learner`, or go on from `state`, for at most so many minutes; the step reached, of the plan's.

    `loss_of` gives the mean squared error of the velocity for a batch (flow matching, Lipman et al. 2022).
    """
    parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.0)
    step = 0
    if state.exists():
        saved: dict[str, Any] = torch.load(state, weights_only=True)
        learner.load_state_dict(saved["learner"])
        optimizer.load_state_dict(saved["optimizer"])
        batches.random.set_state(saved["random"])
        step = int(saved["step"])

    def save() -> None:
        """All that the next run needs, in place of the old state only when complete."""
        state.parent.mkdir(parents=True, exist_ok=True)
        part = state.with_suffix(".part")
        kept = {"learner": learner.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**kept, "random": batches.random.get_state(), "step": step}, part)
        part.replace(state)

    end = time.monotonic() + 60 * minutes
    losses: list[float] = []
    while step < plan.steps and time.monotonic() < end:
        for group in optimizer.param_groups:
            group["lr"] = plan.rate_at(step)
        loss = loss_of(batches())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        losses.append(float(loss.detach()))
        if step % 100 == 0:
            left = end - time.monotonic()
            told = {"step": step, "loss": round(sum(losses) / len(losses), 4), "minutes left": round(left / 60, 1)}
            print(json.dumps(told), flush=True)
            losses = []
        if step % 200 == 0:
            save()
    save()
    return step
