"""Train a ControlNet that leads the built-in model by soft edges: `python -m recipes.adapters.controlnet --minutes 45`.

    python -m recipes.adapters.controlnet --minutes 45          train, or go on where it stopped; writes the folder
    python -m recipes.adapters.controlnet --measure OUT.json    how far pictures follow their hints, beside chance

A copy of the model's blocks is shown the hint beside the noisy picture, and what each block says is added to what the
model's own block says, through a layer that starts at zero (Zhang et al. 2023). The model itself stays as it is. It has
learned to draw things in a few standing places; the hints have them anywhere, in several sizes, mirrored. The folder is
laid out as diffusers lays out its FluxControlNetModel.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import calotype
from calotype.control.annotators import annotate
from calotype.families.flux import FluxModel
from calotype.families.flux.controlnet import CONTROL, FluxControlConfig, FluxControlNet
from calotype.families.flux.keys import diffusers_settings
from calotype.families.flux.network import FluxNetwork
from calotype.image import to_pil, to_tensor
from recipes.adapters.grids import grid
from recipes.adapters.training import Batch, Batches, Examples, LinearEncoder, Plan, builtin, read, train
from recipes.builtin.classifier import Judge, load_judge, ranks
from recipes.builtin.fetch import DATA
from recipes.builtin.library import STYLES, Library, load_library
from recipes.builtin.measure import grounds, visible
from recipes.builtin.scenes import FIXED, FREE, Item, Scene, Variety, caption, compose, sample_scenes

KIND = "softedge"  # wide enough for the autoencoder, which loses lines of a pixel
EXAMPLES = 12000
JOINT, SINGLE = 2, 1  # blocks that are copied
PLAN = Plan(steps=8600, batch=16, rate=8e-4, warm=60, pure=0.15, noisy=0.5)
# Things anywhere, large enough to be drawn.
LED = replace(
    FREE,
    kinds={"single": 0.6, "pair": 0.15, "count": 0.15, "placed": 0.1},
    most=4,
    scale=(0.6, 1.0),
    shift=0.2,
    unknown=0.0,
    decorate=0.03,
    styles=(0.8, 0.15, 0.05),
)


def begun(network: FluxNetwork, joint: int = JOINT, single: int = SINGLE) -> FluxControlNet:
    """The first blocks of a network, beside a hint; it adds nothing until it is trained."""
    config = replace(network.config, joint_blocks=joint, single_blocks=single)
    control = FluxControlNet(FluxControlConfig(flux=config, hint_width=config.image_width, kinds=0))
    wanted, state = control.state_dict(), network.state_dict()
    copied = {name: tensor for name, tensor in state.items() if name in wanted}
    new = {name: torch.zeros_like(tensor) for name, tensor in wanted.items() if name not in copied}
    control.load_state_dict(copied | new)
    return control


def hint(picture: Tensor) -> Tensor:
    """What the annotator draws of a picture (3 h w in 0..1), likewise."""
    return to_tensor(annotate(KIND, to_pil(picture)))


def scenes_of(
    rng: np.random.Generator, number: int, library: Library, size: int, variety: Variety = LED
) -> tuple[list[Scene], Tensor, list[str]]:
    """Scenes, their pictures (b 3 h w in 0..1) and captions."""
    scenes = sample_scenes(rng, number, variety, library.objects)
    return scenes, compose(scenes, library, size) / 2 + 0.5, [caption(scene, rng, variety) for scene in scenes]


@torch.inference_mode()
def make_examples(model: FluxModel, library: Library, count: int, seed: int = 0) -> Examples:
    """Pictures of scenes with their captions, and latents of their hints by the model's own encoder."""
    rng = np.random.default_rng(seed)
    size = model.defaults.width
    encode = LinearEncoder.fit(model, compose(sample_scenes(rng, 64, FIXED, library.objects), library, size) / 2 + 0.5)
    made: list[tuple[Tensor, ...]] = []
    for first in range(0, count, 64):
        _, pictures, captions = scenes_of(rng, min(64, count - first), library, size)
        hints = torch.cat([model.encode(torch.stack([hint(one) for one in pair])) for pair in pictures.split(2)])
        made.append(tuple(part.half() for part in (encode(pictures), *read(model, captions), hints)))
    return Examples(*(torch.cat(parts) for parts in zip(*made, strict=True)))


def fit(
    model: FluxModel, examples: Examples, folder: Path, *, plan: Plan = PLAN, minutes: float
) -> tuple[FluxControlNet, int]:
    """Train a ControlNet for the model's transformer, or go on from the state in `folder`; the step reached."""
    torch.manual_seed(0)
    network = model.transformer.requires_grad_(False)
    control = begun(network)
    rows, columns = (side // network.config.patch for side in examples.latents.shape[2:])

    def loss_of(batch: Batch) -> Tensor:
        prepared = control.prepare(batch.text, batch.pooled, None, batch.sigma[None], rows, columns)
        added = control(batch.noisy, prepared, 0, control.embed(batch.hints), 1.0)
        return (network(batch.noisy, batch.prepared, 0, [added]) - batch.velocity).square().mean()

    return control, train(control, loss_of, Batches(model, examples, plan), plan, folder / "controlnet.pt", minutes)


def write(control: FluxControlNet, folder: Path) -> None:
    """The ControlNet as a folder of diffusers', in float16."""
    config = FluxControlConfig(flux=control.config, hint_width=control.config.image_width, kinds=0)
    _, binding = CONTROL.bind(CONTROL.layouts[0], config)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.half().contiguous() for name, tensor in binding.save(control.state_dict())}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    settings = diffusers_settings(control.config) | {"_class_name": "FluxControlNetModel"}
    del settings["out_channels"]
    settings |= {"num_mode": None, "conditioning_embedding_channels": None}
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


# What it does ------------------------------------------------------------------------------------------------

ASKED = replace(LED, synonym=0.0, decorate=0.0, say_usual_style=0.0, styles=(1.0, 0.0, 0.0))
TOLERANCE = 2  # pixels that an edge may be off


def edges(picture: Tensor) -> Tensor:
    """h w, true on the Canny edges of a picture (3 h w in 0..1)."""
    return to_tensor(annotate("canny", to_pil(picture)))[0] > 0.5


def agreement(shown: Tensor, wanted: Tensor) -> float:
    """F1 of two sets of edges (h w each): the harmonic mean of the shares of each that lie near one of the other."""

    def near(one: Tensor, other: Tensor) -> float:
        """The share of one's edges with an edge of the other within the tolerance."""
        grown = F.max_pool2d(other[None].float(), 2 * TOLERANCE + 1, 1, TOLERANCE)[0] > 0
        return float(grown[one].float().mean()) if one.any() else 0.0

    precision, recall = near(shown, wanted), near(wanted, shown)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def overlap(shown: Tensor, wanted: Tensor) -> float:
    """Intersection over union of what differs from the background in two pictures (3 h w)."""
    one, other = (visible(picture[None], grounds(picture[None]))[0] for picture in (shown, wanted))
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 1.0


def measure(folder: Path, library: Library, judge: Judge, count: int = 50) -> dict[str, Any]:
    """Figures for layouts that training has not seen: without the ControlNet, with it, with the hint of another layout
    (chance), and for the very picture as the autoencoder gives it back, which is the most that can be had.
    """
    model, family = builtin()
    rng = np.random.default_rng(1234)
    scenes, pictures, prompts = scenes_of(rng, count, library, family.defaults.width, ASKED)
    others = pictures.roll(1, 0)
    encode = LinearEncoder.fit(family, pictures[:32])

    def drawn(led_by: Tensor, scale: float) -> list[Tensor]:
        return [
            to_tensor(draw(model, prompt, seed, folder, to_pil(led_by[seed]), scale))
            for seed, prompt in enumerate(prompts)
        ]

    report: dict[str, Any] = {"n": count}
    for name, shown in (
        ("without", drawn(pictures, 0.0)),
        ("scale 0.5", drawn(pictures, 0.5)),
        ("scale 1", drawn(pictures, 1.0)),
        ("another's hint", drawn(others, 1.0)),
        ("the picture itself", list(family.decode(encode(pictures)).clamp(0, 1))),
    ):
        alone = [row for row, scene in enumerate(scenes) if len(scene.items) == 1]
        things = [library.rows[scenes[row].items[0].thing.name] for row in alone]
        named = [rank == 1 for rank in ranks(judge, torch.stack([shown[row] for row in alone]), things)]
        pairs = list(zip(shown, pictures, strict=True))
        report[name] = {
            "edges agree": round(fmean(agreement(edges(one), edges(other)) for one, other in pairs), 3),
            "shapes overlap": round(fmean(overlap(one, other) for one, other in pairs), 3),
            "single objects named by the classifier": round(sum(named) / len(named), 3),
        }
        print(f"{name}: {report[name]}", flush=True)
    return report


def draw(
    model: calotype.Model[Any], prompt: str, seed: int, folder: Path, picture: Image.Image, scale: float
) -> Image.Image:
    """A picture of the prompt, led by the soft edges of another; at scale 0 without the ControlNet."""
    control = calotype.Control(kind=KIND, model=str(folder), image=picture, scale=scale)
    made = model.generate(prompt, seed=seed, controls=(control,) if scale else ())
    assert isinstance(made, Image.Image)
    return made


# What people look at -----------------------------------------------------------------------------------------


def gallery(folder: Path, library: Library, seed: int = 0) -> Image.Image:
    """Prompts with the hints that they are given, without the ControlNet, at half its strength and at all of it."""
    model = calotype.load()
    scenes, prompts = [scene for scene, _ in layouts(library)], [prompt for _, prompt in layouts(library)]
    size = model.family.defaults.width
    pictures = [to_pil(picture) for picture in compose(scenes, library, size) / 2 + 0.5]
    rows = [("hint", [annotate(KIND, picture) for picture in pictures])]
    for name, scale in (("without", 0.0), ("scale 0.5", 0.5), ("scale 1", 1.0)):
        made = [
            draw(model, prompt, seed, folder, picture, scale) for prompt, picture in zip(prompts, pictures, strict=True)
        ]
        rows.append((name, made))
    return grid(rows, prompts)


def layouts(library: Library) -> list[tuple[Scene, str]]:
    """Scenes that the hints are drawn from, and the prompts to fill them with, some of which say another thing."""
    things = {thing.name: thing for thing in library.objects}

    def placed(name: str, x: float, y: float, size: float, *, flip: bool = False) -> Item:
        return Item(things[name], STYLES[0], None, x, y, size, flip)

    wanted = (
        ("a red apple", [placed("apple", 0.3, 0.65, 0.55)]),
        ("a cat face", [placed("cat face", 0.62, 0.4, 0.62)]),
        ("a rocket", [placed("rocket", 0.5, 0.5, 0.8, flip=True)]),
        ("a car on a yellow background", [placed("car", 0.4, 0.35, 0.7, flip=True)]),
        ("a butterfly", [placed("butterfly", 0.6, 0.6, 0.5)]),
        ("a basketball", [placed("apple", 0.3, 0.65, 0.55)]),
        ("a pizza", [placed("heart", 0.5, 0.5, 0.75)]),
        ("three mushrooms", [placed("mushroom", x, y, 0.36) for x, y in ((0.22, 0.3), (0.75, 0.25), (0.5, 0.75))]),
    )
    return [(Scene("single", tuple(items), (), "", STYLES[0], "white", 0.0), prompt) for prompt, items in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="cache folder, also of pictures and of the state")
    parser.add_argument("--minutes", type=float, default=45.0, help="of training; examples take fifteen more")
    parser.add_argument("--out", type=Path, help="the ControlNet's folder; DATA/adapters/controlnet when left out")
    parser.add_argument(
        "--measure", type=Path, metavar="JSON", help="only measure the folder, and write what was found"
    )
    given = parser.parse_args()
    _, family = builtin()
    library = load_library(given.data, size=family.defaults.width)
    if given.measure is not None:
        folder: Path = given.out or given.data / "adapters" / "controlnet"
        report = measure(folder, library, load_judge(given.data, library))
        given.measure.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        return
    kept = given.data / "adapters" / "hints.safetensors"
    if not kept.exists():
        make_examples(family, library, EXAMPLES).save(kept)
    control, step = fit(family, Examples.load(kept), kept.parent, minutes=given.minutes)
    out: Path = given.out or kept.parent / "controlnet"
    write(control, out)
    print(f"step {step} of {PLAN.steps}: {out}")


if __name__ == "__main__":
    main()
