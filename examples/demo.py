"""Draw a page of pictures with the built-in model: offline, on a CPU, in seconds.

python examples/demo.py [--out demo]      writes one PNG a prompt, and all of them on one sheet
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import calotype

PROMPTS = (
    "a red apple",
    "a cat face",
    "a rocket",
    "a red apple on a blue background",
    "a purple octopus",
    "a slice of pizza next to a guitar",
    "three strawberries",
    "a penguin on a yellow background",
    "a castle",
    "a sunflower on a black background",
    "a green car",
    "a dog and a cat",
)
COLUMNS = 4
ZOOM = 2  # the built-in model draws small


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=Path("demo"))
    folder: Path = arguments.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    model = calotype.load()
    pictures: list[Image.Image] = []
    for prompt in PROMPTS:
        picture = model.generate(prompt, seed=7)
        assert isinstance(picture, Image.Image)
        calotype.save(picture, folder / f"{prompt.replace(' ', '-')}.png")
        pictures.append(picture)
    sheet(pictures, PROMPTS).save(folder / "sheet.png")
    print(f"{len(pictures)} pictures in {time.monotonic() - started:.1f} s: {folder / 'sheet.png'}")


def sheet(pictures: list[Image.Image], captions: tuple[str, ...]) -> Image.Image:
    """The pictures in rows, each over its caption."""
    width, height = (side * ZOOM for side in pictures[0].size)
    rows = -(-len(pictures) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * (width + 12) + 12, rows * (height + 36) + 12), "#f4f1ea")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = 12 + number % COLUMNS * (width + 12), 12 + number // COLUMNS * (height + 36)
        page.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (x, y))
        draw.text((x + 2, y + height + 7), caption, "#3a3226", font)
    return page


if __name__ == "__main__":
    main()
