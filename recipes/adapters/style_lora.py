"""Train a LoRA that makes the built-in model draw cyanotypes: `python -m recipes.adapters.style_lora --minutes 15`.

    python -m recipes.adapters.style_lora --minutes 15       train, or go on where it stopped; writes the file when done
    python -m recipes.adapters.style_lora --measure OUT.json  what the file does, beside what chance would

The model stays as it is; what is learned are the two small matrices beside each layer of its blocks (Hu et al. 2021).
One object in five is never shown in the new style: whether these are drawn in it too says if a style was learned, or
pictures. The file has the names that diffusers and PEFT write.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from calotype.checkpoint.keys import Source
from calotype.families.flux import FluxModel
from calotype.families.flux.keys import TRANSFORMER
from calotype.families.flux.network import FluxNetwork
from recipes.adapters.cyanotype import cyanotype
from recipes.adapters.training import Batch, Batches, Examples, Plan, LinearEncoder, builtin, read, train
from recipes.builtin.fetch import DATA
from recipes.builtin.library import Library, load_library
from recipes.builtin.objects import Object, share
from recipes.builtin.scenes import FIXED, Variety, caption, compose, sample_scenes
from recipes.builtin.train import TOGETHER

FILE = Path(__file__).with_name("cyanotype.safetensors")
RANK = 8
ALPHA = 16  # the change is ALPHA / RANK times the product of the two matrices
EXAMPLES = 4096
# The varieties of scenes that the model was trained to draw, with their weights.
VARIETIES = ((FIXED, 0.6), (TOGETHER, 0.4))
PLAN = Plan(steps=2000, batch=16, rate=2e-3, warm=50, pure=0.3, noisy=0.8)


def held_out(thing: Object) -> bool:
    """One object in five is not shown to the LoRA."""
    return share("cyanotype", thing.name) < 0.2


class Branch(nn.Module):
    """Beside one of our layers: for each of the file's layers that it is stacked of, rows of `up(down(x))`."""

    def __init__(self, columns: int, sources: tuple[Source, ...], rank: int) -> None:
        super().__init__()
        self.sources = sources
        self.down = nn.ModuleList(nn.Linear(columns, rank, bias=False) for _ in sources)
        self.up = nn.ModuleList(nn.Linear(rank, source.shape[0], bias=False) for source in sources)
        for layer in self.up:
            nn.init.zeros_(layer.weight)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([up(down(x)) for up, down in zip(self.up, self.down, strict=True)], dim=-1)


class StyleLora(nn.Module):
    """Branches beside all layers of a network's blocks; the network itself is not changed, and not trained."""

    def __init__(self, network: FluxNetwork, rank: int = RANK, alpha: float = ALPHA) -> None:
        super().__init__()
        self.rank, self.alpha = rank, alpha
        layout = TRANSFORMER.layout("diffusers")
        assert layout is not None
        self.branches = nn.ModuleDict()
        network.requires_grad_(False)
        bound = layout.table(network.config).bind({name: tuple(p.shape) for name, p in network.named_parameters()})
        for item in bound.bound:
            if not item.ours.startswith(("joint.", "single.")) or not item.ours.endswith(".weight"):
                continue
            if len(item.shape) != 2:
                continue  # norms
            path = item.ours.removesuffix(".weight")
            branch = Branch(item.shape[1], item.sources, rank)
            self.branches[path.replace(".", "_")] = branch
            network.get_submodule(path).register_forward_hook(self._beside(branch))

    def _beside(self, branch: Branch) -> object:
        def after(module: nn.Module, given: tuple[Tensor, ...], answer: Tensor) -> Tensor:
            return answer + self.alpha / self.rank * branch(given[0])

        return after

    def tensors(self) -> dict[str, Tensor]:
        """The matrices under the names of diffusers and PEFT."""
        found: dict[str, Tensor] = {}
        for branch in self.branches.values():
            assert isinstance(branch, Branch)
            for source, down, up in zip(branch.sources, branch.down, branch.up, strict=True):
                name = f"transformer.{source.key.removesuffix('.weight')}"
                found[f"{name}.lora_A.weight"] = down.weight.detach()  # pyright: ignore[reportAssignmentType, reportCallIssue]
                found[f"{name}.lora_B.weight"] = up.weight.detach()  # pyright: ignore[reportAssignmentType, reportCallIssue]
        return found


def write(tensors: Mapping[str, Tensor], file: Path, *, rank: int = RANK, alpha: float = ALPHA) -> None:
    """A LoRA's file as diffusers writes it, in float16, with PEFT's configuration in the header."""
    layers = sorted({name.removeprefix("transformer.").rsplit(".lora_", 1)[0] for name in tensors})
    settings = {"transformer.r": rank, "transformer.lora_alpha": alpha, "transformer.target_modules": layers}
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings, sort_keys=True)}
    save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, file, metadata)


def make_examples(model: FluxModel, library: Library, count: int, seed: int = 0) -> Examples:
    """Cyanotypes of scenes, with the captions that they had in colour."""
    rng = np.random.default_rng(seed)
    objects = [thing for thing in library.objects if not held_out(thing)]
    def drawn(number: int, variety: Variety) -> tuple[Tensor, list[str]]:
        scenes = sample_scenes(rng, number, variety, objects)
        return compose(scenes, library, size) / 2 + 0.5, [caption(scene, rng, variety) for scene in scenes]

    size = model.defaults.width
    encode = LinearEncoder.fit(model, drawn(64, FIXED)[0])
    made: list[tuple[Tensor, Tensor, Tensor]] = []
    for first in range(0, count, 64):
        number = min(64, count - first)
        variety = VARIETIES[int(rng.random() > VARIETIES[0][1])][0]
        pictures, captions = drawn(number, variety)
        made.append((encode(cyanotype(pictures)).half(), *(part.half() for part in read(model, captions))))
    return Examples(*(torch.cat(parts) for parts in zip(*made, strict=True)), hints=torch.empty(0))


def fit(
    model: FluxModel, examples: Examples, folder: Path, *, plan: Plan = PLAN, minutes: float, rank: int = RANK
) -> tuple[StyleLora, int]:
    """Train a LoRA beside the model's transformer, or go on from the state in `folder`; the step reached."""
    torch.manual_seed(0)
    lora = StyleLora(model.transformer, rank)

    def loss_of(batch: Batch) -> Tensor:
        return (model.transformer(batch.noisy, batch.prepared, 0) - batch.velocity).square().mean()

    step = train(lora, loss_of, Batches(model, examples, plan), plan, folder / "style-lora.pt", minutes)
    return lora, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="cache folder, also of pictures and of the state")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training; examples take two more")
    parser.add_argument("--out", type=Path, default=FILE, help="the LoRA's file")
    given = parser.parse_args()
    _, family = builtin()
    library = load_library(given.data, size=family.defaults.width)
    kept = given.data / "adapters" / "cyanotypes.safetensors"
    if not kept.exists():
        make_examples(family, library, EXAMPLES).save(kept)
    lora, step = fit(family, Examples.load(kept), kept.parent, minutes=given.minutes)
    write(lora.tensors(), given.out)
    print(f"step {step} of {PLAN.steps}: {given.out}, {given.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
