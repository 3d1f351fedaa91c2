"""The picture library: every object in every style, cut out, sized alike and ready to be recoloured.

`python -m recipes.builtin.library --size 128` draws or reads each picture once and writes
`pictures-128.safetensors`:

    full   uint8  style object row plane column (S 6 S): premultiplied red, green, blue; alpha; shade; keep
    half   the same at S / 2, for objects drawn small

`shade` is where a pixel's lightness stands relative to the object's usual lightness (0 black, 0.5 usual, 1
white), in straight colour; `keep` is how much of the pixel's own colour survives recolouring (the leaf of a
red apple stays green).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from recipes.builtin.colours import to_oklab
from recipes.builtin.fetch import DATA, FLUENT_3D, FLUENT_FLAT, NOTO, Package, fetch
from recipes.builtin.objects import Object, load_objects

Array = NDArray[np.float32]
Source = Callable[[Object], Image.Image]  # finds or draws the picture of an object
STYLES = ("3d", "flat", "sticker")  # Fluent 3D, Fluent flat, Noto
OVERSAMPLED = 4  # drawings are rasterised this much larger than needed, then scaled down with Lanczos


@dataclass(frozen=True, kw_only=True)
class Library:
    """The pictures as tensors; see the module's docstring for the planes."""

    objects: tuple[Object, ...]
    full: Tensor
    half: Tensor

    @cached_property
    def rows(self) -> dict[str, int]:
        """Where each object stands, by name."""
        return {thing.name: row for row, thing in enumerate(self.objects)}

    @property
    def size(self) -> int:
        return self.full.shape[-1]

    def to(self, device: torch.device | str) -> Library:
        return Library(objects=self.objects, full=self.full.to(device), half=self.half.to(device))


def load_library(data: Path = DATA, *, size: int = 128, large: bool = False) -> Library:
    """The library with pictures of `size` pixels for the small or the large set of objects; built when
    missing.
    """
    path = data / f"pictures-{size}.safetensors"
    everything = load_objects(large=True)
    names = [thing.name for thing in everything]
    if not path.exists() or _names(path) != names:
        build(path, everything, data, size)
    wanted = load_objects(large=large)
    rows = torch.tensor([names.index(thing.name) for thing in wanted])
    with safe_open(path, "pt") as file:
        full, half = file.get_tensor("full"), file.get_tensor("half")
    return Library(objects=wanted, full=full[:, rows].contiguous(), half=half[:, rows].contiguous())


def build(path: Path, objects: tuple[Object, ...], data: Path, size: int) -> None:
    """Write the library file at `path`; takes about a minute."""
    sources = (_read_webp(data), _draw_svg(data, FLUENT_FLAT, size), _draw_svg(data, NOTO, size))
    full = torch.empty(len(STYLES), len(objects), size, 6, size, dtype=torch.uint8)
    half = torch.empty(len(STYLES), len(objects), size // 2, 6, size // 2, dtype=torch.uint8)
    for style, source in enumerate(sources):
        for row, thing in enumerate(objects):
            large = cut_out(source(thing), size)
            full[style, row] = _planes(large)
            half[style, row] = _planes(resize(large, size // 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"objects": json.dumps([thing.name for thing in objects]), "styles": json.dumps(STYLES)}
    partial = path.with_suffix(".partial")  # never a half-written library under the final name
    save_file({"full": full, "half": half}, partial, metadata)
    partial.replace(path)


def cut_out(picture: Image.Image, size: int) -> Array:
    """Crop to the visible, scale the longer side to `size`, centre; premultiplied h w 4 in 0..1."""
    rgba = np.asarray(picture.convert("RGBA"), np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    rows, columns = np.nonzero(rgba[..., 3] > 0.02)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    height, width = int(bottom - top), int(right - left)
    side = max(height, width)
    square = np.zeros((side, side, 4), np.float32)
    y, x = (side - height) // 2, (side - width) // 2
    square[y : y + height, x : x + width] = rgba[top:bottom, left:right]
    return resize(square, size)


def resize(premultiplied: Array, size: int) -> Array:
    """Lanczos, plane by plane; overshoot is clipped so that no colour exceeds its alpha."""
    planes = [
        Image.fromarray(premultiplied[..., channel]).resize((size, size), Image.Resampling.LANCZOS)
        for channel in range(4)
    ]
    scaled = np.clip(np.stack([np.asarray(plane) for plane in planes], -1), 0, 1)
    scaled[..., :3] = np.minimum(scaled[..., :3], scaled[..., 3:])
    return scaled


def _planes(rgba: Array) -> Tensor:
    """Add shade and keep to a premultiplied picture: uint8 h 6 w."""
    alpha = rgba[..., 3]
    straight = rgba[..., :3] / np.maximum(alpha, 1e-3)[..., None]
    lab = to_oklab(torch.from_numpy(straight)).numpy()
    keep = _kept(lab, alpha)
    lightness = np.clip(lab[..., 0], 0, 1)
    body = (alpha > 0.5) & (keep < 0.5)
    usual = float(np.clip(np.quantile(lightness[body], 0.6), 0.3, 0.97)) if body.any() else 0.6
    over = (lightness - usual) / max(1 - usual, 0.15)  # white things are usual at white: they take the full colour
    shade = np.where(lightness < usual, 0.5 * lightness / usual, 0.5 + 0.5 * over)
    planes = np.concatenate([rgba, shade[..., None], keep[..., None]], -1).transpose(0, 2, 1)
    return torch.from_numpy(np.clip(planes * 255 + 0.5, 0, 255).astype(np.uint8))


def _kept(lab: Array, alpha: Array) -> Array:
    """How much of each pixel's colour survives recolouring: small parts of a clearly different hue do.

    The main hue is the most common one weighted by chroma. If the parts far from it make up more than a third
    of what is coloured, the object is simply multicoloured and everything is recoloured.
    """
    chroma = np.hypot(lab[..., 1], lab[..., 2])
    hue = np.arctan2(lab[..., 2], lab[..., 1])
    weight = alpha * chroma
    visible = alpha.sum() + 1e-6
    if weight.sum() / visible < 0.03:  # grey all over
        return np.zeros_like(alpha)
    direction = np.linspace(-np.pi, np.pi, 72, endpoint=False)
    likeness = np.array([(weight * np.exp(4 * (np.cos(hue - angle) - 1))).sum() for angle in direction])
    away = 1 - np.cos(hue - direction[int(likeness.argmax())])
    keep = np.clip((away - 0.5) / 0.3, 0, 1) * np.clip((chroma - 0.05) / 0.05, 0, 1)
    colourful = float((alpha * (chroma > 0.05)).sum()) + 1e-6
    return keep if float((keep * alpha).sum()) < 0.34 * colourful else np.zeros_like(alpha)


def _read_webp(data: Path) -> Source:
    """Fluent 3D: one 256-pixel picture per code point."""
    assets = fetch(FLUENT_3D, data) / "assets"

    def read(thing: Object) -> Image.Image:
        path = next(path for end in ("", "-fe0f") if (path := assets / f"{thing.code}{end}.webp").exists())
        return Image.open(path)

    return read


def _draw_svg(data: Path, package: Package, size: int) -> Source:
    """An Iconify set of SVG drawings, rasterised."""
    folder = fetch(package, data)
    codes: dict[str, str] = json.loads((folder / "chars.json").read_text("utf-8"))
    icons: dict[str, Any] = json.loads((folder / "icons.json").read_text("utf-8"))

    def draw(thing: Object) -> Image.Image:
        icon = icons["icons"][codes[thing.code]]
        width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        png = resvg_py.svg_to_bytes(svg_string=svg, width=OVERSAMPLED * size, skip_system_fonts=True)
        return Image.open(BytesIO(png))

    return draw


def _names(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["objects"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the picture library.")
    parser.add_argument("--data", type=Path, default=DATA, help="cache folder")
    parser.add_argument("--size", type=int, default=128, choices=(128, 256), help="pixels of the longer side")
    parser.add_argument("--large", action="store_true", help="report the large set")
    options = parser.parse_args()
    library = load_library(options.data, size=options.size, large=options.large)
    print(f"{len(library.objects)} objects in {len(STYLES)} styles, {library.size} pixels")


if __name__ == "__main__":
    main()
