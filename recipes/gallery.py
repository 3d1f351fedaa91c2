"""Draw the grids of docs/gallery with the built-in model: `python -m recipes.gallery [NAME ...]`.

NAME is inpainting, regions, high-res, image-to-image or panorama; all of them where none is given. The regions are
the first random layouts, none left out; the other grids show prompts that were chosen for what this model draws well.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

import calotype
from recipes.builtin.fetch import DATA
from recipes.builtin.objects import load_objects
from recipes.measure_places import enlarged, psnr
from recipes.places import EMPTY, SIDE, Layout, layouts, regions

GALLERY = Path(__file__).parents[1] / "docs" / "gallery"
Draw = Callable[..., Image.Image]
GAP = 12
LARGEST = 480_000  # bytes of a file
INK, PAPER, LINE = (32, 32, 36), (250, 250, 250), (205, 205, 210)


class Cell(NamedTuple):
    """A picture above its words."""

    picture: Image.Image
    words: str


def grid(rows: Sequence[Sequence[Cell]], title: str, *, side: int = 192) -> Image.Image:
    """Rows of pictures, `side` pixels high, each above its words, below a title."""
    small, large = ImageFont.load_default(14), ImageFont.load_default(20)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    shown = [[(_scaled(cell.picture, side), cell.words) for cell in row] for row in rows]
    lines = [[_wrapped(pen, words, small, picture.width) for picture, words in row] for row in shown]
    heights = [side + 8 + 18 * max(len(words) for words in row) + GAP for row in lines]
    width = max(sum(picture.width + GAP for picture, _ in row) for row in shown) + GAP
    sheet = Image.new("RGB", (width, 48 + sum(heights)), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 14), title, INK, large)
    top = 48
    for row, words, height in zip(shown, lines, heights, strict=True):
        left = GAP
        for (picture, _), text in zip(row, words, strict=True):
            sheet.paste(picture, (left, top))
            pen.rectangle((left - 1, top - 1, left + picture.width, top + side), outline=LINE)
            for number, line in enumerate(text):
                pen.text((left, top + side + 5 + 18 * number), line, INK, small)
            left += picture.width + GAP
        top += height
    return sheet


def _scaled(picture: Image.Image, side: int) -> Image.Image:
    width = round(picture.width * side / picture.height)
    return picture.convert("RGB").resize((width, side), Image.Resampling.BICUBIC)


def _wrapped(pen: ImageDraw.ImageDraw, words: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and pen.textlength(longer, font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def outlined(picture: Image.Image, boxes: Sequence[Sequence[int]], colour: str = "#d6006c") -> Image.Image:
    """The picture with frames around boxes."""
    shown = picture.convert("RGB").resize((2 * picture.width, 2 * picture.height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(shown)
    for left, top, right, bottom in boxes:
        pen.rectangle((2 * left + 1, 2 * top + 1, 2 * right - 2, 2 * bottom - 2), outline=colour, width=2)
    return shown


def _mask(box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, box)
    return mask


def inpainting(draw: Draw) -> Image.Image:
    """A part drawn anew, and pictures drawn on beyond their edge."""
    half, corner = (64, 0, 128, 128), (64, 64, 128, 128)
    cases = (
        ("a pizza and a penguin", half, ("a pizza and a guitar", "a pizza and a dog", "a pizza and a rocket")),
        ("four apples", corner, ("four cars", "four dogs", "four strawberries")),
    )
    rows: list[list[Cell]] = []
    for prompt, box, asked in cases:
        begun = draw(prompt, seed=1)
        own: dict[str, Any] = {"input_image": begun, "mask_image": _mask(box), "keep_unmasked": True}
        after = [Cell(draw(words, seed=2, **own), f"{words}: only the frame is drawn") for words in asked]
        rows.append([Cell(outlined(begun, [box]), f"{prompt} (the picture)"), *after])
    whole = draw("a pizza and a penguin", seed=1)
    part = whole.crop((0, 0, 64, 128))
    framed = Image.new("RGB", whole.size, (222, 222, 226))
    framed.paste(part, (0, 0))
    asked = ("a pizza and a guitar", "a pizza and a penguin", "a pizza and a butterfly")
    beyond: dict[str, Any] = {"input_image": part, "extend": (0, 0, 64, 0), "keep_unmasked": True}
    after = [Cell(draw(words, seed=2, **beyond), f"{words}, extended by 64 pixels") for words in asked]
    rows.append([Cell(framed, "half a picture"), *after])
    return grid(rows, "Inpainting and outpainting: what is kept is kept bit for bit")


def placed(draw: Draw) -> Image.Image:
    """The first random layouts of each kind."""
    kinds: dict[str, list[Layout]] = {}
    for layout in layouts(load_objects(), 15):
        kinds.setdefault(layout.name, []).append(layout)
    rows: list[list[Cell]] = []
    for name, own in kinds.items():
        rows.append([])
        for layout in own[:5]:
            drawn = outlined(draw(EMPTY, seed=layout.seed, regions=regions(layout)), layout.places[0].boxes)
            drawn = _over(drawn, layout)
            first, second = (thing.name for thing in layout.things)
            rows[-1].append(Cell(drawn, f"{name}: {first} (pink), {second} (blue)"))
    return grid(rows, "Regions: two prompts for two places, random layouts, nothing selected")


def _over(picture: Image.Image, layout: Layout) -> Image.Image:
    small = [tuple(value * picture.width // (2 * SIDE) for value in box) for box in layout.places[1].boxes]
    pen = ImageDraw.Draw(picture)
    for left, top, right, bottom in small:
        pen.rectangle((2 * left + 1, 2 * top + 1, 2 * right - 2, 2 * bottom - 2), outline="#0062d6", width=2)
    return picture


def high_res(draw: Draw) -> Image.Image:
    """128 to 1024 in tiles, beside lanczos alone; led by the ControlNet for tiles too, where it was trained."""
    tile = DATA / "adapters" / "tile"
    ways: list[tuple[float, str | None, Path | None]] = [(0.3, "", None), (0.6, None, None)]
    ways += [(strength, None, tile) for strength in (0.6, 1.0) if tile.exists()]
    rows: list[list[Cell]] = []
    for prompt in ("a penguin", "a crown"):
        first = draw(prompt, seed=1, cfg_scale=1.0)
        plain = first.resize((1024, 1024), Image.Resampling.LANCZOS)
        rows.append([Cell(plain, f"{prompt}, 128, enlarged by lanczos alone")])
        for strength, again, led in ways:
            picture = enlarged(draw, prompt, 1, strength, again=again, led=led)
            said = "the same prompt" if again is None else "no prompt"
            said += "" if led is None else ", led by a tile ControlNet"
            rows[-1].append(Cell(picture, f"strength {strength}, {said}: {psnr(first, picture):.0f} dB to the first"))
    return grid(rows, "Passes at higher resolutions: 128 to 256, 512, 1024 in tiles of 128", side=320)


def from_picture(draw: Draw) -> Image.Image:
    """One picture towards other prompts, by strength."""
    cases = (("a black car", "a red car"), ("a red apple", "a green apple"), ("a cat face", "a bear"))
    rows: list[list[Cell]] = []
    for before, after in cases:
        begun = draw(before, seed=0)
        rows.append([Cell(begun, f"{before} (the picture)")])
        for strength in (0.2, 0.4, 0.6, 0.8, 1.0):
            picture = draw(after, seed=0, input_image=begun, denoising_strength=strength)
            rows[-1].append(Cell(picture, f"{after}, {strength}"))
    return grid(rows, "Image to image: denoising_strength 0.2 to 1", side=160)


def panorama(draw: Draw) -> Image.Image:
    """Wider than the model was shown."""
    prompts = ("a tulip", "a sunflower on a light blue background", "a tree on a light blue background", "a rainbow")
    tiles: dict[str, Any] = {"width": 512, "height": 128, "tiled": True, "tile_size": 128, "tile_stride": 96}
    rows = [[Cell(draw(prompt, seed=1, **tiles), f"{prompt}: 512 x 128")] for prompt in prompts]
    return grid(rows, "Tiles: one picture of 512 x 128 in tiles of 128, 96 apart")


GRIDS: dict[str, Callable[[Draw], Image.Image]] = {
    "inpainting": inpainting,
    "regions": placed,
    "high-res": high_res,
    "image-to-image": from_picture,
    "panorama": panorama,
}


def save(sheet: Image.Image, file: Path) -> None:
    """As PNG; of 256 colours where it would be larger than LARGEST."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, optimize=True)
    if file.stat().st_size > LARGEST:
        sheet.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of " + ", ".join(GRIDS))
    parser.add_argument("--out", type=Path, default=GALLERY, help="folder")
    given = parser.parse_args()
    for name in given.names:
        if name not in GRIDS:
            parser.error(f"{name!r} is none of " + ", ".join(GRIDS))
    draw: Any = calotype.load().generate
    for name in given.names or GRIDS:
        file = given.out / f"{name}.png"
        save(GRIDS[name](draw), file)
        print(f"{file}: {file.stat().st_size // 1024} KB", flush=True)


if __name__ == "__main__":
    main()
