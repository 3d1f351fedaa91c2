"""Draw the grids of docs/gallery that show the adapters: `python -m recipes.adapters.gallery`.

`lora.png` needs the LoRA's file alone; `controlnet-tile.png` and `controlnet-softedge.png` also the ControlNets'
folders and the library of pictures that the hints are drawn from, and are left out where a folder is not there.
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
    for kind, task in controlnet.TASKS.items():
        folder: Path = given.data / "adapters" / kind
        if not folder.exists():
            print(f"{folder}: no ControlNet; run `python -m recipes.adapters.controlnet {kind}` first")
            continue
        file = given.out / f"controlnet-{kind}.png"
        controlnet.gallery(task, folder, load_library(given.data, size=CPU.pixels)).save(file, optimize=True)
        print(file)


if __name__ == "__main__":
    main()
