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
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calotype.control.annotators import annotate
from calotype.families.flux import FluxModel
from calotype.families.flux.config import FluxConfig
from calotype.families.flux.keys import TRANSFORMER, diffusers_settings
from calotype.families.flux.network import FluxNetwork, Prepared, to_latent, to_tokens
from calotype.image import to_pil, to_tensor
from calotype.nn.norms import modulated
from calotype.request import Request
from calotype.sampling.guidance import guided
from calotype.sampling.levels import Level
from calotype.sampling.samplers import SAMPLERS, Denoise
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
PLAN = Plan(steps=1400, batch=16, rate=8e-4, warm=60, pure=0.35, noisy=1.0)
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


class Added(NamedTuple):
    """What the ControlNet's joint and single blocks add to the picture's tokens, b n d each."""

    joint: tuple[Tensor, ...]
    single: tuple[Tensor, ...]


class ControlNet(nn.Module):
    """The first blocks of a network, beside the hint; it adds nothing until it is trained."""

    def __init__(self, network: FluxNetwork, joint: int = JOINT, single: int = SINGLE) -> None:
        super().__init__()
        config: FluxConfig = replace(network.config, joint_blocks=joint, single_blocks=single)
        self.body = FluxNetwork(config)
        wanted = self.body.state_dict()
        self.body.load_state_dict({name: tensor for name, tensor in network.state_dict().items() if name in wanted})
        for unused in (self.body.out, self.body.modulation.out):
            unused.requires_grad_(False)
        self.hint_in = _nothing(config.image_width, config.width)
        self.joint_taps = nn.ModuleList(_nothing(config.width, config.width) for _ in range(joint))
        self.single_taps = nn.ModuleList(_nothing(config.width, config.width) for _ in range(single))

    def forward(self, noisy: Tensor, hints: Tensor, prepared: Prepared) -> Added:
        """Noisy tokens and the hint's (b n image_width), and what `body.prepare` made for their one level."""
        body, table, text = self.body, prepared.table, prepared.text
        image = body.image_in(noisy) + self.hint_in(hints)
        joint: list[Tensor] = []
        for block, tap, image_rows, text_rows in zip(
            body.joint, self.joint_taps, table.joint_image, table.joint_text, strict=True
        ):
            image, text = block(image, text, prepared.rope, _first(image_rows), _first(text_rows))
            joint.append(tap(image))
        single: list[Tensor] = []
        x = torch.cat([text, image], dim=1)
        for block, tap, rows in zip(body.single, self.single_taps, table.single, strict=True):
            x = block(x, prepared.rope, _first(rows))
            single.append(tap(x[:, text.shape[1] :]))
        return Added(tuple(joint), tuple(single))

    def tensors(self) -> dict[str, Tensor]:
        """The weights under diffusers' names."""
        layout = TRANSFORMER.layout("diffusers")
        assert layout is not None
        state = self.body.state_dict()
        binding = layout.table(self.body.config).bind({name: tuple(tensor.shape) for name, tensor in state.items()})
        found = {k: v for k, v in binding.save(state) if not k.startswith(("proj_out.", "norm_out."))}
        for theirs, layers in (("controlnet_blocks", self.joint_taps), ("controlnet_single_blocks", self.single_taps)):
            found |= {f"{theirs}.{name}": tensor for name, tensor in layers.state_dict().items()}
        found |= {f"controlnet_x_embedder.{name}": tensor for name, tensor in self.hint_in.state_dict().items()}
        return found

    def settings(self) -> dict[str, Any]:
        """config.json of the folder."""
        settings = diffusers_settings(self.body.config) | {"_class_name": "FluxControlNetModel"}
        del settings["out_channels"]
        return settings | {"num_mode": None, "conditioning_embedding_channels": None}


def _nothing(columns: int, rows: int) -> nn.Linear:
    layer = nn.Linear(columns, rows)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _first(rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of the one level that was prepared."""
    return tuple(row[0] for row in rows)


def led(network: FluxNetwork, noisy: Tensor, prepared: Prepared, added: Added) -> Tensor:
    """The network's velocity with something added after each block; where there is less of it, to several alike."""
    table, text = prepared.table, prepared.text
    image = network.image_in(noisy)
    for number, (block, image_rows, text_rows) in enumerate(
        zip(network.joint, table.joint_image, table.joint_text, strict=True)
    ):
        image, text = block(image, text, prepared.rope, _first(image_rows), _first(text_rows))
        image = image + added.joint[number // -(-len(network.joint) // len(added.joint))]
    x, words = torch.cat([text, image], dim=1), text.shape[1]
    for number, (block, rows) in enumerate(zip(network.single, table.single, strict=True)):
        x = block(x, prepared.rope, _first(rows))
        more = added.single[number // -(-len(network.single) // len(added.single))]
        x = torch.cat([x[:, :words], x[:, words:] + more], dim=1)
    shift, scale = _first(table.out)
    return network.out(modulated(x[:, words:], shift, scale))


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
) -> tuple[ControlNet, int]:
    """Train a ControlNet for the model's transformer, or go on from the state in `folder`; the step reached."""
    torch.manual_seed(0)
    network = model.transformer.requires_grad_(False)
    control = ControlNet(network)
    rows, columns = (side // network.config.patch for side in examples.latents.shape[2:])

    def loss_of(batch: Batch) -> Tensor:
        prepared = control.body.prepare(batch.text, batch.pooled, None, batch.sigma[None], rows, columns)
        added = control(batch.noisy, batch.hints, prepared)
        return (led(network, batch.noisy, batch.prepared, added) - batch.velocity).square().mean()

    return control, train(control, loss_of, Batches(model, examples, plan), plan, folder / "controlnet.pt", minutes)


def write(control: ControlNet, folder: Path) -> None:
    """The ControlNet as a folder of diffusers', in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().half().contiguous() for name, tensor in control.tensors().items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(control.settings(), indent=2) + "\n", "utf-8")


# Drawing ---------------------------------------------------------------------------------------------------------


def opened(folder: Path, network: FluxNetwork) -> ControlNet:
    """The ControlNet that `write` wrote to a folder."""
    control = ControlNet(network)
    saved = load_file(folder / "diffusion_pytorch_model.safetensors")
    layout = TRANSFORMER.layout("diffusers")
    assert layout is not None
    state = control.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in control.body.state_dict().items()}
    for item in layout.table(control.body.config).bind(shapes).bound:
        if all(source.key in saved for source in item.sources):  # the end of a whole transformer is not
            state[f"body.{item.ours}"] = torch.cat([saved[source.key] for source in item.sources]).float()
    for theirs, ours in (
        ("controlnet_blocks", "joint_taps"),
        ("controlnet_single_blocks", "single_taps"),
        ("controlnet_x_embedder", "hint_in"),
    ):
        state |= {
            name.replace(theirs, ours, 1): tensor.float()
            for name, tensor in saved.items()
            if name.startswith(f"{theirs}.")
        }
    control.load_state_dict(state)
    return control.eval()


@torch.inference_mode()
def draw(
    model: FluxModel, prompt: str, seed: int, *, control: ControlNet, picture: Tensor, scale: float = 1.0
) -> Tensor:
    """A picture of the prompt, 3 h w in 0..1, led by the soft edges of another (3 h w).

    Step for step what the engine does without a ControlNet, with the model's defaults; both sides of guidance are led.
    """
    network = model.transformer
    job = Request(prompt=prompt).complete(model.defaults, seed=seed)
    levels, sampler, patch = model.levels(job), SAMPLERS[job.sampler], network.config.patch
    hints = to_tokens(model.encode(hint(picture)[None]), patch)
    rows, columns = job.height // model.defaults.grain, job.width // model.defaults.grain

    def side(words: str, *, negative: bool) -> Denoise:
        told = model.condition(words, job, negative=negative)

        def denoise(x: Tensor, level: Level) -> Tensor:
            times = torch.tensor([level.time])
            noisy = to_tokens(x, patch)
            prepared = control.body.prepare(told.text, told.pooled, None, times, rows, columns)
            said = control(noisy, hints, prepared)
            added = Added(*(tuple(scale * tensor for tensor in tensors) for tensors in said))
            prepared = network.prepare(told.text, told.pooled, None, times, rows, columns)
            return x - level.sigma * to_latent(led(network, noisy, prepared, added), rows, columns, patch)

        return denoise

    denoise = guided(
        side(prompt, negative=False), side("", negative=True), job.cfg_scale, job.cfg_rescale, model.prediction
    )
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn((1, *model.noise_shape(job)), generator=generator)

    x = model.start(job, levels, noise)
    for step in sampler(denoise, x, levels, noise):
        x = step.x
    return model.decode(x)[0].clamp(0, 1)


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
    _, family = builtin()
    control = opened(folder, family.transformer)
    rng = np.random.default_rng(1234)
    scenes, pictures, prompts = scenes_of(rng, count, library, family.defaults.width, ASKED)
    others = pictures.roll(1, 0)
    encode = LinearEncoder.fit(family, pictures[:32])

    def drawn(led_by: Tensor, scale: float) -> list[Tensor]:
        return [
            draw(family, prompt, seed, control=control, picture=led_by[seed], scale=scale)
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


# What people look at -----------------------------------------------------------------------------------------


def gallery(folder: Path, library: Library, seed: int = 0) -> Image.Image:
    """Prompts with the hints that they are given, without the ControlNet, at half its strength and at all of it."""
    _, family = builtin()
    control = opened(folder, family.transformer)
    scenes, prompts = [scene for scene, _ in layouts(library)], [prompt for _, prompt in layouts(library)]
    pictures = list(compose(scenes, library, family.defaults.width) / 2 + 0.5)
    rows = [("hint", [to_pil(hint(picture)) for picture in pictures])]
    for name, scale in (("without", 0.0), ("scale 0.5", 0.5), ("scale 1", 1.0)):
        made = [
            draw(family, prompt, seed, control=control, picture=picture, scale=scale)
            for prompt, picture in zip(prompts, pictures, strict=True)
        ]
        rows.append((name, [to_pil(picture) for picture in made]))
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
