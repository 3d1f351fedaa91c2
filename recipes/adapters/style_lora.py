"""Train a LoRA that makes the built-in model draw cyanotypes: `python -m recipes.adapters.style_lora --minutes 20`.

    python -m recipes.adapters.style_lora --minutes 20       train, or go on where it stopped; writes the file when done
    python -m recipes.adapters.style_lora --measure OUT.json  what the file does, beside what chance would

The model stays as it is; what is learned are the two small matrices beside each layer of its blocks (Hu et al. 2021).
One object in five is never shown in the new style: whether these are drawn in it too says if a style was learned, or
pictures. The file has the names that diffusers and PEFT write.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import calotype
from calotype.checkpoint.keys import Source
from calotype.families.flux import FluxModel
from calotype.families.flux.keys import TRANSFORMER
from calotype.families.flux.network import FluxNetwork
from recipes.adapters.cyanotype import cyanotypes, tones
from recipes.adapters.grids import grid
from recipes.adapters.training import Batch, Batches, Examples, LinearEncoder, Plan, builtin, read, train
from recipes.builtin.colours import to_oklab
from recipes.builtin.draw import Settings, batch
from recipes.builtin.fetch import DATA
from recipes.builtin.library import Library, load_library
from recipes.builtin.measure import References, compose_all, crops, grounds, visible
from recipes.builtin.objects import Object, share
from recipes.builtin.scenes import FIXED, caption, make_scene, sample_scenes
from recipes.builtin.train import TOGETHER
from recipes.figures import measured_by

FILE = Path(__file__).with_name("cyanotype.safetensors")
# Layers by which the picture passes, and the ranks of their changes; what reads the prompt stays as it is. New colours
# for each of the sixteen latents of a token are a change of high rank where tokens come in and go out.
RANKS = {"joint.": 8, "single.": 8, "image_in": 96, "out": 96}
EXAMPLES = 4096
GAIN = 2  # alpha over rank: the change is so many times the product of its two matrices
# The varieties of scenes that the model was trained to draw, with their weights.
VARIETIES = ((FIXED, 0.6), (TOGETHER, 0.4))
PLAIN = replace(FIXED, synonym=0.0, unknown=0.0, decorate=0.0, say_usual_style=0.0)
NEAR = 0.06  # distance in OKLab up to which a pixel counts as of one of the style's tones
PLAN = Plan(steps=3000, batch=16, rate=1.5e-3, warm=50, pure=0.25, noisy=0.7)


def held_out(thing: Object) -> bool:
    """One object in five is not shown to the LoRA."""
    return share("cyanotype", thing.name) < 0.2


class Branch(nn.Module):
    """Beside one of our layers: for each of the file's layers that it is stacked of, rows of `up(down(x))`."""

    def __init__(self, columns: int, sources: tuple[Source, ...], rank: int) -> None:
        super().__init__()
        self.names = tuple(source.key.removesuffix(".weight") for source in sources)
        self.down = nn.ParameterList(torch.randn(rank, columns) * columns**-0.5 for _ in sources)
        self.up = nn.ParameterList(torch.zeros(source.shape[0], rank) for source in sources)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.linear(F.linear(x, down), up) for up, down in zip(self.up, self.down, strict=True)], dim=-1)


class StyleLora(nn.Module):
    """Branches beside a network's layers; the network itself is not changed, and not trained."""

    def __init__(self, network: FluxNetwork, ranks: Mapping[str, int] = RANKS) -> None:
        super().__init__()
        layout = TRANSFORMER.layout("diffusers")
        assert layout is not None
        self.branches = nn.ModuleDict()
        network.requires_grad_(False)
        bound = layout.table(network.config).bind({name: tuple(p.shape) for name, p in network.named_parameters()})
        for item in bound.bound:
            path, _, kind = item.ours.rpartition(".")
            rank = next((rank for start, rank in ranks.items() if path.startswith(start)), None)
            if rank is None or kind != "weight" or len(item.shape) != 2 or ".text." in path:
                continue
            branch = Branch(item.shape[1], item.sources, rank)
            self.branches[path.replace(".", "_")] = branch
            network.get_submodule(path).register_forward_hook(_beside(branch))

    def tensors(self) -> dict[str, Tensor]:
        """The matrices under the names of diffusers and PEFT."""
        found: dict[str, Tensor] = {}
        for branch in self.branches.values():
            assert isinstance(branch, Branch)
            for name, down, up in zip(branch.names, branch.down, branch.up, strict=True):
                found[f"transformer.{name}.lora_A.weight"] = down.detach()
                found[f"transformer.{name}.lora_B.weight"] = up.detach()
        return found


def _beside(branch: Branch) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def after(module: nn.Module, given: tuple[Tensor, ...], answer: Tensor) -> Tensor:
        return answer + GAIN * branch(given[0])

    return after


def write(tensors: Mapping[str, Tensor], file: Path) -> None:
    """A LoRA's file as diffusers writes it, in float16, with PEFT's configuration in the header."""
    ranks = {
        name.removeprefix("transformer.").removesuffix(".lora_A.weight"): len(tensor)
        for name, tensor in tensors.items()
        if name.endswith(".lora_A.weight")
    }
    usual = min(ranks.values())
    # Without ^ the last layer's "proj_out" would mean those of the single blocks too.
    others = {f"^{name}": rank for name, rank in ranks.items() if rank != usual}
    settings = {
        "r": usual,
        "lora_alpha": GAIN * usual,
        "rank_pattern": others,
        "alpha_pattern": {name: GAIN * rank for name, rank in others.items()},
        "target_modules": sorted(ranks),
    }
    told = json.dumps({f"transformer.{key}": value for key, value in settings.items()}, sort_keys=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    halves = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
    save_file(halves, file, {"format": "pt", "lora_adapter_metadata": told})


def make_examples(model: FluxModel, library: Library, count: int, seed: int = 0) -> Examples:
    """Cyanotypes of scenes, with the captions that they had in colour."""
    rng = np.random.default_rng(seed)
    objects = [thing for thing in library.objects if not held_out(thing)]

    size = model.defaults.width
    encode = LinearEncoder.fit(model, compose_all(sample_scenes(rng, 64, FIXED, objects), library, size))
    made: list[tuple[Tensor, Tensor, Tensor]] = []
    for first in range(0, count, 64):
        variety = VARIETIES[int(rng.random() > VARIETIES[0][1])][0]
        scenes = sample_scenes(rng, min(64, count - first), variety, objects)
        text, pooled = read(model, [caption(scene, rng, variety) for scene in scenes])
        made.append((encode(cyanotypes(scenes, library, size)).half(), text.half(), pooled.half()))
    return Examples(*(torch.cat(parts) for parts in zip(*made, strict=True)), hints=torch.empty(0))


def fit(
    model: FluxModel,
    examples: Examples,
    folder: Path,
    *,
    plan: Plan = PLAN,
    minutes: float,
    ranks: Mapping[str, int] = RANKS,
) -> tuple[StyleLora, int]:
    """Train a LoRA beside the model's transformer, or go on from the state in `folder`; the step reached."""
    torch.manual_seed(0)
    lora = StyleLora(model.transformer, ranks)

    def loss_of(batch: Batch) -> Tensor:
        return (model.transformer(batch.noisy, batch.prepared, 0) - batch.velocity).square().mean()

    step = train(lora, loss_of, Batches(model, examples, plan), plan, folder / "style-lora.pt", minutes)
    return lora, step


# What it does ------------------------------------------------------------------------------------------------


def colour_distance(pictures: Tensor, wanted: Tensor) -> Tensor:
    """How differently each picture is coloured from the wanted one, wherever the colours are: b.

    The earth mover's distance of their pixels' distributions along each axis of OKLab, summed, in hundredths.
    """

    def levels(shown: Tensor) -> Tensor:
        return to_oklab(shown.movedim(1, -1)).flatten(1, 2).sort(dim=1).values

    return 100 * (levels(pictures) - levels(wanted)).abs().mean(1).sum(-1)


def printed_share(pictures: Tensor) -> Tensor:
    """The share of each picture's things, wherever they are, that is in the style's tones: b."""
    prints = to_oklab(tones(torch.linspace(0, 1, 64)))
    near = torch.stack([torch.cdist(to_oklab(one.movedim(0, -1)).flatten(0, 1), prints).amin(1) for one in pictures])
    things = visible(pictures, grounds(pictures)).flatten(1)
    return ((near < NEAR) & things).sum(1) / things.sum(1).clamp_min(1)


def scrambled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same matrices with the numbers of each B in another order: a change just as large, that was not learned."""
    random = torch.Generator().manual_seed(0)

    def shuffled(tensor: Tensor) -> Tensor:
        return tensor.flatten()[torch.randperm(tensor.numel(), generator=random)].view_as(tensor)

    return {name: shuffled(tensor) if "lora_B" in name else tensor for name, tensor in tensors.items()}


def found(shown: Tensor, references: Tensor, rows: Sequence[int]) -> list[int]:
    """The rank of the right reference, by its row, among all of them by likeness to each picture (b 3 h w): 1 is best.

    The classifier of `recipes.builtin` knows no cyanotypes, and names one real one in twenty.
    """
    distance = torch.cdist(_cropped(shown), _cropped(references))
    right = distance[torch.arange(len(rows)), torch.tensor(rows)]
    return [int(rank) for rank in 1 + (distance < right[:, None]).sum(1)]


def _cropped(pictures: Tensor) -> Tensor:
    ground = grounds(pictures)
    return (crops(pictures, ground, References.SIDE)[:, :3] - ground[:, :, None, None]).flatten(1)


def measure(file: Path, library: Library, folder: Path, limit: int | None = None) -> dict[str, Any]:
    """Figures for the model without the file, with it, and with its numbers scrambled; for objects that it was not
    shown, and as many that it was. The last line is of the style's own pictures, as the autoencoder gives them back.
    """
    chance = folder / "scrambled.safetensors"
    write(scrambled(load_file(file)), chance)
    _, family = builtin()
    scenes = [make_scene([(1, thing, None)], kind="single") for thing in library.objects]
    plain = compose_all(scenes, library)
    styled = cyanotypes(scenes, library)
    encode = LinearEncoder.fit(family, plain[::4])
    unseen = [row for row, thing in enumerate(library.objects) if held_out(thing)][:limit]
    seen = [row for row, thing in enumerate(library.objects) if not held_out(thing)][: len(unseen)]
    report: dict[str, Any] = {"file": file.name, "megabytes": round(file.stat().st_size / 1e6, 2)}
    for title, rows in (("objects not shown in the style", unseen), ("objects shown", seen)):
        prompts = [caption(scenes[row], np.random.default_rng(1), PLAIN) for row in rows]
        entry: dict[str, Any] = {"n": len(rows)}
        for name, path, scale in (
            ("without", None, 0.0),
            ("scale 0.5", file, 0.5),
            ("scale 1", file, 1.0),
            ("scrambled", chance, 1.0),
            ("the style's own pictures", None, None),
        ):
            if scale is None:
                with torch.inference_mode():
                    drawn = torch.cat([family.decode(encode(styled[row : row + 1])) for row in rows]).clamp(0, 1)
            else:
                drawn = draw(path, scale, prompts)
            ranks = found(drawn, plain if name == "without" else styled, rows)
            entry[name] = {
                "colour distance": round(float(colour_distance(drawn, styled[rows]).mean()), 2),
                "in the style's tones": round(float(printed_share(drawn).mean()), 3),
                "right object nearest": round(sum(rank == 1 for rank in ranks) / len(ranks), 3),
                "among the five nearest": round(sum(rank <= 5 for rank in ranks) / len(ranks), 3),
            }
            print(f"{title}, {name}: {entry[name]}", flush=True)
        report[title] = entry
    return report


def draw(file: Path | None, scale: float, prompts: Sequence[str]) -> Tensor:
    """A picture of each prompt by the built-in model with a LoRA at this strength: b 3 h w in 0..1; seeds 0, 1, ..."""
    model, family = builtin()
    if file is not None:
        model.attach(file, scale=scale)
        assert family.adapters is not None
        family.adapters.apply()
    return batch(family, prompts, range(len(prompts)), Settings())


# What people look at -----------------------------------------------------------------------------------------

SHOWN = (
    "a cat face", "a rocket", "a castle", "a butterfly", "a red apple on a yellow background", "a guitar",
    "a sunflower and a penguin", "three mushrooms",
)  # fmt: skip


def gallery(file: Path = FILE, prompts: Sequence[str] = SHOWN, seed: int = 0) -> Image.Image:
    """The prompts without the LoRA, at half its strength and at all of it."""
    model = calotype.load()
    rows: list[tuple[str, list[Image.Image]]] = []
    for name, scale in (("without", 0.0), ("scale 0.5", 0.5), ("scale 1", 1.0)):
        loras = (calotype.Lora(str(file), scale),) if scale else ()
        made = [model.generate(prompt, seed=seed, loras=loras) for prompt in prompts]
        rows.append((name, [picture for picture in made if isinstance(picture, Image.Image)]))
    return grid(rows, prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="cache folder, also of pictures and of the state")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training; examples take two more")
    parser.add_argument("--out", type=Path, default=FILE, help="the LoRA's file")
    parser.add_argument("--measure", type=Path, metavar="JSON", help="only measure the file, and write what was found")
    given = parser.parse_args()
    _, family = builtin()
    library = load_library(given.data, size=family.defaults.width)
    if given.measure is not None:
        report = measured_by("python -m recipes.adapters.style_lora --measure OUT.json")
        report |= measure(given.out, library, given.data / "adapters")
        given.measure.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        return
    kept = given.data / "adapters" / "cyanotypes.safetensors"
    if not kept.exists():
        make_examples(family, library, EXAMPLES).save(kept)
    lora, step = fit(family, Examples.load(kept), kept.parent, minutes=given.minutes)
    write(lora.tensors(), given.out)
    print(f"step {step} of {PLAN.steps}: {given.out}, {given.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
