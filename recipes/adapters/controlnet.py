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
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from calotype.control.annotators import annotate
from calotype.families.flux import FluxModel
from calotype.image import to_pil, to_tensor
from recipes.adapters.training import Examples, LinearEncoder, builtin, read
from recipes.builtin.fetch import DATA
from recipes.builtin.library import Library, load_library
from recipes.builtin.scenes import FIXED, FREE, Scene, caption, compose, sample_scenes

KIND = "softedge"  # wide enough for the autoencoder, which loses lines of a pixel
EXAMPLES = 12000
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


def hint(picture: Tensor) -> Tensor:
    """What the annotator draws of a picture (3 h w in 0..1), likewise."""
    return to_tensor(annotate(KIND, to_pil(picture)))


def draw(rng: np.random.Generator, number: int, library: Library, size: int) -> tuple[list[Scene], Tensor, list[str]]:
    """Scenes, their pictures (b 3 h w in 0..1) and captions."""
    scenes = sample_scenes(rng, number, LED, library.objects)
    return scenes, compose(scenes, library, size) / 2 + 0.5, [caption(scene, rng, LED) for scene in scenes]


@torch.inference_mode()
def make_examples(model: FluxModel, library: Library, count: int, seed: int = 0) -> Examples:
    """Pictures of scenes with their captions, and latents of their hints by the model's own encoder."""
    rng = np.random.default_rng(seed)
    size = model.defaults.width
    encode = LinearEncoder.fit(model, compose(sample_scenes(rng, 64, FIXED, library.objects), library, size) / 2 + 0.5)
    made: list[tuple[Tensor, ...]] = []
    for first in range(0, count, 64):
        _, pictures, captions = draw(rng, min(64, count - first), library, size)
        hints = torch.cat([model.encode(torch.stack([hint(one) for one in pair])) for pair in pictures.split(2)])
        made.append(tuple(part.half() for part in (encode(pictures), *read(model, captions), hints)))
    return Examples(*(torch.cat(parts) for parts in zip(*made, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="cache folder, also of pictures and of the state")
    parser.add_argument("--minutes", type=float, default=45.0, help="of training; examples take fifteen more")
    given = parser.parse_args()
    _, family = builtin()
    library = load_library(given.data, size=family.defaults.width)
    kept = given.data / "adapters" / "hints.safetensors"
    if not kept.exists():
        make_examples(family, library, EXAMPLES).save(kept)


if __name__ == "__main__":
    main()
