"""Draw the grids of docs/gallery that show the adapters: `python -m recipes.adapters.gallery`.

`lora.png` needs the LoRA's file alone; `controlnet.png` also the ControlNet's folder and the library of pictures that
the hints are drawn from, and is left out where the folder is not there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from recipes.adapters import controlnet, style_lora
from recipes.builtin.fetch import DATA
from recipes.builtin.library import load_library
from recipes.builtin.model import CPU

GALLERY = Path(__file__).parents[2] / "docs" / "gallery"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="cache folder of the recipes")
    parser.add_argument("--out", type=Path, default=GALLERY)
    given = parser.parse_args()
    style_lora.gallery().save(given.out / "lora.png", optimize=True)
    print(given.out / "lora.png")
    folder: Path = given.data / "adapters" / "controlnet"
    if not folder.exists():
        print(f"{folder}: no ControlNet; run `python -m recipes.adapters.controlnet` first")
        return
    controlnet.gallery(folder, load_library(given.data, size=CPU.pixels)).save(
        given.out / "controlnet.png", optimize=True
    )
    print(given.out / "controlnet.png")


if __name__ == "__main__":
    main()
