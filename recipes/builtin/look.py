"""Contact sheets of training scenes with their captions: `python -m recipes.builtin.look --data FOLDER`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from recipes.builtin.fetch import DATA
from recipes.builtin.library import load_library
from recipes.builtin.scenes import STAGES, caption, compose, sample_scenes


def contact_sheet(pictures: Tensor, captions: list[str], columns: int = 8) -> Image.Image:
    """A grid of pictures (b 3 h w in -1..1), each above its caption in two lines."""
    height, width = pictures.shape[2:]
    rows = -(-len(captions) // columns)
    sheet = Image.new("RGB", (columns * (width + 6), rows * (height + 32)), (236, 236, 236))
    pen = ImageDraw.Draw(sheet)
    pixels = ((pictures + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    for index, (picture, words) in enumerate(zip(pixels, captions, strict=True)):
        x, y = index % columns * (width + 6) + 3, index // columns * (height + 32) + 3
        sheet.paste(Image.fromarray(picture), (x, y))
        letters = width // 6
        pen.text((x, y + height), f"{words[:letters]}\n{words[letters : 2 * letters]}", fill=(0, 0, 0), spacing=1)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="cache folder; the sheets go there too")
    parser.add_argument("--size", type=int, default=128, choices=(128, 256))
    parser.add_argument("--large", action="store_true", help="the large set of objects")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    library = load_library(options.data, size=options.size, large=options.large)
    for name, variety in STAGES.items():
        rng = np.random.default_rng(options.seed)
        scenes = sample_scenes(rng, 48, variety, library.objects)
        captions = [caption(scene, rng, variety) for scene in scenes]
        path = options.data / f"scenes-{name}.png"
        contact_sheet(compose(scenes, library, options.size), captions).save(path)
        print(path)


if __name__ == "__main__":
    main()
