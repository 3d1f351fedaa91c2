"""Draw with the built-in model, finished or half-trained, and print contact sheets to look at.

    python -m recipes.builtin.draw --scale cpu --out sheet.png        the averaged networks of the last training state
    python -m recipes.builtin.draw --model FOLDER --out sheet.png     an exported model

Two sheets come out: common and hard prompts, and (`sheet-seeds.png`) what several seeds make of a few prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from calotype.families.flux import FluxModel
from calotype.families.flux.conditioning import joined
from calotype.generate import Picture, stream
from calotype.image import to_tensor
from calotype.nn.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from calotype.request import Request
from calotype.sampling.guidance import guided_both, halves
from calotype.sampling.samplers import SAMPLERS, evaluated
from recipes.builtin.autoencoder import Basis, load_basis
from recipes.builtin.fetch import DATA
from recipes.builtin.look import contact_sheet
from recipes.builtin.model import SCALES, Networks, Scale, assemble

COMMON = (
    "a red apple", "a cat face", "a rocket", "a sun", "a tree", "a pizza", "a dog", "a guitar",
    "a sunflower", "a rainbow", "a castle", "a penguin", "a red heart", "a grinning face", "a house", "a car",
    "a fish", "a banana", "a butterfly", "a bicycle", "a snowman", "a robot", "a crown", "an umbrella",
)  # fmt: skip
HARD = (
    "a red apple on a blue background", "a cat face on a pink background", "a purple octopus", "a green car",
    "a cat and a dog", "a pizza next to a guitar", "two bananas", "three red apples",
    "four strawberries", "a small house on a yellow background", "a rocket above a house", "two cats and a dog",
    "a flat style apple", "a blue pizza", "a spork", "a big lion",
)  # fmt: skip
FREEDOM = ("a dog", "a butterfly on a teal background", "a fish", "two apples", "a rocket and a star", "a small house")


class Settings(NamedTuple):
    """What a drawing leaves to the model's defaults where it is None."""

    steps: int | None = None
    cfg_scale: float | None = None

    def request(self, prompt: str, seed: int, count: int = 1) -> Request:
        return Request(prompt=prompt, seed=seed, count=count, steps=self.steps, cfg_scale=self.cfg_scale)


class LinearAutoencoder(TinyAutoencoder):
    """A stand-in until the decoder is trained: the linear inverse of the latents' basis. Blocks show their edges."""

    inverse: Tensor  # z 192
    mean: Tensor  # 192

    def __init__(self, config: TinyAutoencoderConfig, basis: Basis) -> None:
        super().__init__(config)
        self.basis = basis
        self.register_buffer("inverse", torch.linalg.pinv(basis.weight))
        self.register_buffer("mean", basis.mean)

    def encode(self, picture: Tensor) -> Tensor:
        return self.basis.encode(picture)

    def decode(self, latent: Tensor) -> Tensor:
        blocks = latent.movedim(1, -1) @ self.inverse + self.mean
        rows, columns = latent.shape[2:]
        return blocks.view(-1, rows, columns, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, 8 * rows, 8 * columns)


def open_state(folder: Path, scale: Scale, *, linear: bool = False) -> tuple[FluxModel, int]:
    """The averaged networks of the training state in `folder` as a model, and the step they were saved at.

    With `linear` pictures are decoded by the linear inverse of the basis instead of the trained decoder.
    """
    state: dict[str, Any] = torch.load(folder / "state.pt", map_location="cpu", weights_only=True, mmap=True)
    networks = Networks(scale)
    networks.load_state_dict(state["averaged"])
    if linear:
        vae: TinyAutoencoder = LinearAutoencoder(scale.vae, load_basis(folder, torch.device("cpu")))
    else:
        file = folder / "vae.safetensors"
        if not file.exists():
            raise FileNotFoundError(f"{file}: run `python -m recipes.builtin.autoencoder`, or draw with --linear")
        vae = TinyAutoencoder(scale.vae)
        vae.load_state_dict(load_file(file))
    tokenizer = str(folder / "tokenizer.json")
    model = assemble(scale, networks.eval(), vae.eval(), tokenizer, torch.device("cpu"))
    return model, int(state["step"])


def open_folder(folder: Path) -> FluxModel:
    """An exported model, through the door that users take."""
    import calotype

    model = calotype.load(str(folder)).family
    if not isinstance(model, FluxModel):
        raise SystemExit(f"{folder} holds a model of the family {model.family}; the recipe makes models of flux")
    return model


@torch.inference_mode()
def batch(
    model: FluxModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
    size: int = 16,
) -> Tensor:
    """One picture for each prompt and seed, b 3 h w in 0..1: what `generate.stream` draws, `size` at a time."""
    made: list[Tensor] = []
    for first in range(0, len(prompts), size):
        made.append(_together(model, prompts[first : first + size], seeds[first : first + size], settings))
    return torch.cat(made)


def _together(model: FluxModel, prompts: Sequence[str], seeds: Sequence[int], settings: Settings) -> Tensor:
    job = settings.request("", 0).complete(model.defaults, seed=0)
    levels, sampler = model.levels(job), SAMPLERS[job.sampler]
    asked = evaluated(sampler, levels)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise() -> Tensor:
        rows = [torch.randn((1, *model.noise_shape(job)), generator=generator) for generator in generators]
        return torch.cat(rows).to(model.device)

    with model.memory.holding(*model.encoders):
        conditionings = [model.condition(prompt, job, negative=False) for prompt in prompts]
        if job.cfg_scale != 1:
            conditionings += [model.condition("", job, negative=True)] * len(prompts)
    with model.memory.holding(model.backbone):
        denoise = model.denoiser(joined(conditionings), asked, [job] * len(conditionings))
        if job.cfg_scale != 1:
            denoise = guided_both(halves(denoise), job.cfg_scale, job.cfg_rescale, model.prediction)
        x = model.start(job, levels, noise)
        for step in sampler(denoise, x, levels, noise):
            x = step.x
    with model.memory.holding(model.vae):
        return model.decode(x).clamp(0, 1).cpu()


def pictures(model: FluxModel, request: Request) -> list[Image.Image]:
    """A request's pictures by the engine's ordinary path."""
    with closing(stream(model, request)) as events:
        return [event.image for event in events if isinstance(event, Picture)]


def sheet(model: FluxModel, prompts: Sequence[str], seeds: int, settings: Settings, columns: int) -> Image.Image:
    """Every prompt with seeds 0, 1, ..., labelled."""
    drawn: list[Image.Image] = []
    labels: list[str] = []
    for prompt in prompts:
        drawn.extend(pictures(model, settings.request(prompt, 0, seeds)))
        labels.extend([prompt] * seeds)
    return contact_sheet(torch.stack([to_tensor(one) for one in drawn]) * 2 - 1, labels, columns)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which model, and how it samples."""
    parser.add_argument("--model", type=Path, help="folder of an exported model, instead of a training state")
    parser.add_argument("--scale", choices=sorted(SCALES), default="cpu")
    parser.add_argument("--data", type=Path, default=DATA, help="cache folder")
    parser.add_argument("--folder", type=Path, help="where the training state is; DATA/SCALE when left out")
    parser.add_argument("--linear", action="store_true", help="decode linearly, while there is no trained decoder")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--cfg-scale", type=float)


def chosen(given: argparse.Namespace) -> tuple[FluxModel, str]:
    """The model that the options of `add_arguments` name, and words for it."""
    if given.model is not None:
        return open_folder(given.model), f"the model in {given.model.name}"
    model, step = open_state(given.folder or given.data / given.scale, SCALES[given.scale], linear=given.linear)
    return model, f"training state of scale {given.scale}, step {step}" + (", linear decoder" if given.linear else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="PNG file")
    parser.add_argument("--prompts", type=Path, help="a text file, one prompt a line, instead of the usual ones")
    parser.add_argument("--seeds", type=int, default=1, help="pictures of each prompt, with seeds 0, 1, ...")
    given = parser.parse_args()
    model, name = chosen(given)
    settings = Settings(given.steps, given.cfg_scale)
    prompts = given.prompts.read_text("utf-8").split("\n") if given.prompts else [*COMMON, *HARD]
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    columns = 8 if given.seeds == 1 else given.seeds
    sheet(model, prompts, given.seeds, settings, columns).save(given.out)
    print(f"{given.out}: {name}")
    if not given.prompts:
        second = given.out.with_name(f"{given.out.stem}-seeds{given.out.suffix}")
        sheet(model, FREEDOM, 6, settings, 6).save(second)
        print(second)


if __name__ == "__main__":
    main()
