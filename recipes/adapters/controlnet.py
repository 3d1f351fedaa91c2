"""Train a ControlNet that leads the built-in model by pictures: `python -m recipes.adapters.controlnet tile`.

    python -m recipes.adapters.controlnet KIND --minutes 45      train, or go on where it stopped; writes the folder
    python -m recipes.adapters.controlnet KIND --measure F.json  how far pictures follow their hints, beside chance

KIND is `tile` (a blurred, spotted picture; drawn sharply, also parts of pictures that were enlarged) or `softedge`
(outlines, to be filled as the prompt says). A copy of the model's blocks is shown the hint beside the noisy picture,
and what each block says is added to what the model's own block says, through a layer that starts at zero (Zhang et al.
2023). The model itself stays as it is. The folder is laid out as diffusers lays out its FluxControlNetModel.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

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
from recipes.builtin.scenes import FIXED, FREE, VARIED, Item, Scene, Variety, caption, compose, sample_scenes
from recipes.figures import measured_by

JOINT, SINGLE = 2, 1  # blocks that are copied


class Task(NamedTuple):
    """What a ControlNet learns.

    `kind` is the annotator that draws its hints, `given` what that is given of a training picture (3 h w in 0..1).
    Scenes are of one of the varieties at a time; with `parts` pictures are also halves of them. `after` is the task
    that was learned before, where it begins with what that made.
    """

    kind: str
    after: str | None
    varieties: tuple[Variety, ...]
    parts: bool
    unnamed: float  # share of captions left empty
    given: Callable[[np.random.Generator, Tensor], Tensor]
    asked: Variety  # of scenes that it is measured with
    examples: int
    plan: Plan


def unchanged(rng: np.random.Generator, picture: Tensor) -> Tensor:
    return picture


ENLARGED = (1.5, 5.0)  # how many times
SPOTS = 0.06  # standard deviation of noise, at most
GRAINS = (8, 16, 32)  # noise is so many values a side, enlarged


def spoilt(rng: np.random.Generator, picture: Tensor) -> Tensor:
    """A picture enlarged from few pixels, with spots: as those of the built-in model are when they are enlarged."""
    size = picture.shape[-1]
    small = _resized(picture, max(16, round(size / float(rng.uniform(*ENLARGED)))))
    grain, amount = int(rng.choice(GRAINS)), float(rng.uniform(0, SPOTS))
    spots = torch.from_numpy(rng.standard_normal((3, grain, grain))).float()
    return (_resized(small, size) + amount * _resized(spots, size)).clamp(0, 1)


def _resized(picture: Tensor, size: int) -> Tensor:
    return F.interpolate(picture[None], (size, size), mode="bicubic", antialias=True)[0]


# Things anywhere, large enough to be drawn.
ANYWHERE = replace(
    FREE,
    kinds={"single": 0.6, "pair": 0.15, "count": 0.15, "placed": 0.1},
    most=4,
    scale=(0.6, 1.0),
    shift=0.2,
    unknown=0.0,
    decorate=0.03,
    styles=(0.8, 0.15, 0.05),
)
PLAIN: dict[str, Any] = {"synonym": 0.0, "decorate": 0.0, "say_usual_style": 0.0, "styles": (1.0, 0.0, 0.0)}
TASKS = {
    "softedge": Task(  # wide enough for the autoencoder, which loses lines of a pixel
        kind="softedge",
        after="tile",  # which has things drawn where the model never had them
        varieties=(ANYWHERE,),
        parts=False,
        unnamed=0.0,
        given=unchanged,
        asked=replace(ANYWHERE, **PLAIN),
        examples=12000,
        plan=Plan(steps=11000, batch=16, rate=8e-4, warm=60, pure=0.15, noisy=0.5),
    ),
    "tile": Task(
        kind="tile",
        after=None,
        varieties=(FIXED, replace(VARIED, decorate=0.03, unknown=0.0, styles=(0.9, 0.1, 0.0))),
        parts=True,
        unnamed=0.3,  # passes at higher resolutions may have no prompt
        given=spoilt,
        asked=replace(FIXED, **PLAIN),
        examples=8192,
        plan=Plan(steps=3000, batch=16, rate=8e-4, warm=60, pure=0.15, noisy=0.5),
    ),
}


class Shown(NamedTuple):
    """Pictures of scenes (b 3 h w in 0..1), what a ControlNet is shown beside (likewise), and captions."""

    pictures: Tensor
    hints: Tensor
    captions: list[str]


def show(task: Task, rng: np.random.Generator, number: int, library: Library, size: int) -> Shown:
    """Training data of one variety, pictures `size` a side."""
    variety = task.varieties[int(rng.integers(len(task.varieties)))]
    scenes = sample_scenes(rng, number, variety, library.objects)
    pictures = compose(scenes, library, 2 * size if task.parts else size) / 2 + 0.5
    if task.parts:
        pictures = torch.stack([_part(rng, picture, size) for picture in pictures])
    hints = torch.stack([hint(task.kind, task.given(rng, picture)) for picture in pictures])
    captions = ["" if rng.random() < task.unnamed else caption(scene, rng, variety) for scene in scenes]
    return Shown(pictures, hints, captions)


def _part(rng: np.random.Generator, picture: Tensor, size: int) -> Tensor:
    """All of a picture, or a half or two thirds of its sides, at this size."""
    side = int(rng.choice([2 * size, size, size, 11 * size // 8]))
    left, top = (int(rng.integers(0, picture.shape[-1] - side + 1)) for _ in range(2))
    return _resized(picture[:, top : top + side, left : left + side], size).clamp(0, 1)


def hint(kind: str, picture: Tensor) -> Tensor:
    """What the annotator draws of a picture (3 h w in 0..1), likewise."""
    return to_tensor(annotate(kind, to_pil(picture)))


def begun(network: FluxNetwork, joint: int = JOINT, single: int = SINGLE) -> FluxControlNet:
    """The first blocks of a network, beside a hint; it adds nothing until it is trained."""
    config = replace(network.config, joint_blocks=joint, single_blocks=single)
    control = FluxControlNet(FluxControlConfig(flux=config, hint_width=config.image_width, kinds=0))
    wanted, state = control.state_dict(), network.state_dict()
    copied = {name: tensor for name, tensor in state.items() if name in wanted}
    new = {name: torch.zeros_like(tensor) for name, tensor in wanted.items() if name not in copied}
    control.load_state_dict(copied | new)
    return control


@torch.inference_mode()
def make_examples(model: FluxModel, library: Library, task: Task, count: int, seed: int = 0) -> Examples:
    """Pictures of scenes with their captions, and latents of their hints by the model's own encoder."""
    rng = np.random.default_rng(seed)
    size = model.defaults.width
    encode = LinearEncoder.fit(model, compose(sample_scenes(rng, 64, FIXED, library.objects), library, size) / 2 + 0.5)
    made: list[tuple[Tensor, ...]] = []
    for first in range(0, count, 64):
        shown = show(task, rng, min(64, count - first), library, size)
        hints = torch.cat([model.encode(pair) for pair in shown.hints.split(2)])
        made.append(tuple(part.half() for part in (encode(shown.pictures), *read(model, shown.captions), hints)))
    return Examples(*(torch.cat(parts) for parts in zip(*made, strict=True)))


def fit(
    model: FluxModel,
    examples: Examples,
    state: Path,
    *,
    plan: Plan,
    minutes: float,
    after: Mapping[str, Tensor] | None = None,
) -> tuple[FluxControlNet, int]:
    """Train a ControlNet for the model's transformer, or go on from the file `state`; the step reached.

    `after` is another's state dict, to begin with.
    """
    torch.manual_seed(0)
    network = model.transformer.requires_grad_(False)
    control = begun(network)
    if after is not None:
        control.load_state_dict(after)
    rows, columns = (side // network.config.patch for side in examples.latents.shape[2:])

    def loss_of(batch: Batch) -> Tensor:
        prepared = control.prepare(batch.text, batch.pooled, None, batch.sigma[None], rows, columns)
        added = control(batch.noisy, prepared, 0, control.embed(batch.hints), 1.0)
        return (network(batch.noisy, batch.prepared, 0, [added]) - batch.velocity).square().mean()

    return control, train(control, loss_of, Batches(model, examples, plan), plan, state, minutes)


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


def measure(task: Task, folder: Path, library: Library, judge: Judge, count: int = 50) -> dict[str, Any]:
    """Figures for scenes that training has not seen: without the ControlNet, with it, with the hint of another scene
    (chance), what it is led by itself, and the very picture as the autoencoder gives it back, which is the most that
    can be had.
    """
    model, family = builtin()
    rng = np.random.default_rng(1234)
    scenes = sample_scenes(rng, count, task.asked, library.objects)
    pictures = compose(scenes, library, family.defaults.width) / 2 + 0.5
    prompts = [caption(scene, rng, task.asked) for scene in scenes]
    given = torch.stack([task.given(rng, picture) for picture in pictures])
    encode = LinearEncoder.fit(family, pictures[:32])

    def drawn(led_by: Tensor, scale: float) -> list[Tensor]:
        return [
            to_tensor(draw(model, task.kind, prompt, seed, folder, to_pil(led_by[seed]), scale))
            for seed, prompt in enumerate(prompts)
        ]

    report: dict[str, Any] = {"n": count}
    for name, shown in (
        ("without", drawn(given, 0.0)),
        ("scale 0.5", drawn(given, 0.5)),
        ("scale 1", drawn(given, 1.0)),
        ("another's hint", drawn(given.roll(1, 0), 1.0)),
        ("what it is led by", [hint(task.kind, picture) for picture in given]),
        ("the picture itself", list(family.decode(encode(pictures)).clamp(0, 1))),
    ):
        alone = [row for row, scene in enumerate(scenes) if len(scene.items) == 1]
        things = [library.rows[scenes[row].items[0].thing.name] for row in alone]
        named = [rank == 1 for rank in ranks(judge, torch.stack([shown[row] for row in alone]), things)]
        pairs = list(zip(shown, pictures, strict=True))
        error = fmean(float((one - other).square().mean()) for one, other in pairs)
        report[name] = {
            "edges agree": round(fmean(agreement(edges(one), edges(other)) for one, other in pairs), 3),
            "shapes overlap": round(fmean(overlap(one, other) for one, other in pairs), 3),
            "dB to the picture": round(-10 * math.log10(error), 1),
            "single objects named by the classifier": round(sum(named) / len(named), 3),
        }
        print(f"{name}: {report[name]}", flush=True)
    return report


def draw(
    model: calotype.Model[Any], kind: str, prompt: str, seed: int, folder: Path, picture: Image.Image, scale: float
) -> Image.Image:
    """A picture of the prompt, led by another; at scale 0 without the ControlNet."""
    control = calotype.Control(kind=kind, model=str(folder), image=picture, scale=scale)
    made = model.generate(prompt, seed=seed, controls=(control,) if scale else ())
    assert isinstance(made, Image.Image)
    return made


# What people look at -----------------------------------------------------------------------------------------


def gallery(task: Task, folder: Path, library: Library, seed: int = 0) -> Image.Image:
    """Prompts with the hints that they are given, without the ControlNet, at half its strength and at all of it."""
    model = calotype.load()
    scenes, prompts = [scene for scene, _ in layouts(library)], [prompt for _, prompt in layouts(library)]
    size, rng = model.family.defaults.width, np.random.default_rng(seed)
    pictures = [to_pil(task.given(rng, picture)) for picture in compose(scenes, library, size) / 2 + 0.5]
    rows = [("hint", [annotate(task.kind, picture) for picture in pictures])]
    for name, scale in (("without", 0.0), ("scale 0.5", 0.5), ("scale 1", 1.0)):
        made = [
            draw(model, task.kind, prompt, seed, folder, picture, scale)
            for prompt, picture in zip(prompts, pictures, strict=True)
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
    parser.add_argument("kind", choices=TASKS)
    parser.add_argument("--data", type=Path, default=DATA, help="cache folder, also of pictures and of the state")
    parser.add_argument("--minutes", type=float, default=45.0, help="of training; examples take ten more")
    parser.add_argument("--out", type=Path, help="the ControlNet's folder; DATA/adapters/KIND when left out")
    parser.add_argument(
        "--measure", type=Path, metavar="JSON", help="only measure the folder, and write what was found"
    )
    given = parser.parse_args()
    _, family = builtin()
    task, kept = TASKS[given.kind], given.data / "adapters" / given.kind
    out: Path = given.out or kept
    library = load_library(given.data, size=family.defaults.width)
    if given.measure is not None:
        report = measured_by(f"python -m recipes.adapters.controlnet {task.kind} --measure OUT.json")
        report |= measure(task, out, library, load_judge(given.data, library))
        given.measure.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        return
    file = kept.with_suffix(".safetensors")
    if not file.exists():
        detailed = load_library(given.data, size=2 * library.size) if task.parts else library
        make_examples(family, detailed, task, task.examples).save(file)
    after: dict[str, Tensor] | None = None
    state = kept.with_suffix(".pt")
    if task.after is not None and not state.exists():
        before: Path = given.data / "adapters" / f"{task.after}.pt"
        if not before.exists():
            parser.error(f"{given.kind} begins with {task.after}: run `... {task.after}` first ({before} is not there)")
        after = torch.load(before, weights_only=True)["learner"]
    control, step = fit(family, Examples.load(file), state, plan=task.plan, minutes=given.minutes, after=after)
    write(control, out)
    print(f"step {step} of {task.plan.steps}: {out}")


if __name__ == "__main__":
    main()
