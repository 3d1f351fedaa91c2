"""The built-in model at 4096 x 4096 pixels, end to end: tiles of its own 128 pixels, the autoencoder in strips.

    python benchmarks/builtin_4096.py [--side 4096] [--steps 4] [--picture FILE] [--save]

The picture is drawn in a process of its own, whose peak memory is watched. Its steps are timed one by one; what comes
after the last one is decoding. A field of sunflowers is what a model of single things draws in tiles.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from measuring import command, commit, keep, machine, run, versions

PROMPT = "a sunflower on a light blue background"
TILE, STRIDE = 128, 96


def draw(side: int, steps: int, picture: Path | None) -> None:
    """Draw one picture, and print what it took as JSON."""
    import torch

    import calotype
    from calotype.generate import Picture, Progress

    began = time.perf_counter()
    model = calotype.load()
    loaded = time.perf_counter()
    request = calotype.Request(
        prompt=PROMPT,
        seed=1,
        width=side,
        height=side,
        steps=steps,
        cfg_scale=1.0,
        tiled=True,
        tile_size=TILE,
        tile_stride=STRIDE,
    )
    marks: list[float] = []
    for event in model.stream(request):
        if isinstance(event, Progress):
            marks.append(time.perf_counter())
        elif isinstance(event, Picture):
            marks.append(time.perf_counter())
            assert event.image.size == (side, side)
            if picture is not None:
                event.image.save(picture)
    spent = [after - before for before, after in zip([loaded, *marks], marks, strict=False)]
    across = 1 + -(-(side - TILE) // STRIDE) if side > TILE else 1
    print(
        json.dumps(
            {
                "load s": round(loaded - began, 2),
                "steps s": [round(seconds, 1) for seconds in spent[:-1]],
                "decode s": round(spent[-1], 1),
                "picture s": round(marks[-1] - loaded, 1),
                "tiles": across**2,
                "threads": torch.get_num_threads(),
            }
        )
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--side", type=int, default=4096)
    arguments.add_argument("--steps", type=int, default=4)
    arguments.add_argument("--picture", type=Path, help="PNG file")
    arguments.add_argument("--patience", type=float, default=180, help="seconds to wait for a quiet machine")
    arguments.add_argument("--save", action="store_true", help="keep the result under benchmarks/results")
    arguments.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.child:
        draw(given.side, given.steps, given.picture)
        return
    words = ["--side", str(given.side), "--steps", str(given.steps), "--child"]
    if given.picture is not None:
        words += ["--picture", str(given.picture)]
    done = run(Path(__file__), *words, patience=given.patience, every=0.2)
    result = {
        "command": command("builtin_4096.py", sys.argv[1:], private=("--picture",)),
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": versions("torch"),
        "commit": commit(),
        "model": f"the built-in model, {given.side}x{given.side}, {given.steps} steps, cfg 1, "
        f"tiles of {TILE} every {STRIDE}, float32: {PROMPT}",
        **done.measured,
        **done.seen,
    }
    print(json.dumps(result, indent=1))
    if given.save:
        keep(f"builtin-{given.side}-cpu.json", result)


if __name__ == "__main__":
    main()
