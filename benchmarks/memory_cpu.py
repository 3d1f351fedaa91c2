"""Less memory for the same picture on a CPU: Calotype's rungs and storage, and what diffusers has for it, in turns.

    python benchmarks/memory_cpu.py --folder FOLDER [--side 512] [--steps 2] [--rounds 1] [--save]

Stable Diffusion 3 medium without T5, random bfloat16 weights (6 GB; 18 GB in FOLDER with the folder in diffusers'
layout and the files of diffusers' groups), without classifier-free guidance. Pairs at the same budget are `stream`
and group offload (a layer at a time, from files), and float8 storage and layerwise casting to float8. Each run is a
process of its own; peak memory is the kernel's, and counts what is mapped and in memory.

Ratios are Calotype's over diffusers': below 1 is in Calotype's favour. What float8 does to a picture is measured
against the same program's picture in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import torch
from measuring import Run, arithmetic, command, commit, keep, machine, picture_difference, run, versions
from memory_contestants import Settings
from random_models import as_diffusers, clip_tokenizer, write_model

CHILD = Path(__file__).parent / "memory_contestants.py"
PAIRS = (
    ("calotype", "diffusers"),
    ("calotype stream", "diffusers group offload"),
    ("calotype float8", "diffusers layerwise float8"),
)
ALONE = ("calotype float8 stream",)
NAMES = tuple(name for pair in PAIRS for name in pair) + ALONE
SECONDS = ("import and load", "first step", "step", "decode", "picture in all")
MEMORY = ("peak GiB", "peak anonymous GiB")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, required=True, help="where the models are kept between runs")
    arguments.add_argument("--side", type=int, default=512)
    arguments.add_argument("--steps", type=int, default=2, help="steps that count, after the first")
    arguments.add_argument("--rounds", type=int, default=1)
    arguments.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    arguments.add_argument("--patience", type=float, default=180, help="seconds to wait for a quiet machine")
    arguments.add_argument("--save", action="store_true", help="keep the result under benchmarks/results")
    given = arguments.parse_args()
    settings = prepare(given)
    runs: dict[str, list[Run]] = {name: [] for name in given.only}
    for number in range(given.rounds):
        for name in given.only if number % 2 == 0 else reversed(given.only):
            told = asdict(settings) | {"picture": str(picture(given.folder, name))}
            runs[name].append(run(CHILD, name, json.dumps(told), patience=given.patience))
            print(name, json.dumps(runs[name][-1].measured), json.dumps(runs[name][-1].seen), flush=True)
    middle = {name: summary(of) for name, of in runs.items()}
    result: dict[str, Any] = {
        "command": command("memory_cpu.py", sys.argv[1:]),
        "date": date.today().isoformat(),
        "machine": machine(),
        "arithmetic": arithmetic("bfloat16"),
        "versions": versions("torch", "diffusers", "transformers"),
        "commit": commit(),
        "model": f"Stable Diffusion 3 medium without T5, {given.side}x{given.side}, bfloat16, random weights, cfg 1",
        "median": middle,
        "ratios, Calotype over diffusers": {
            f"{ours} / {theirs}": {
                measure: round(middle[ours][measure] / middle[theirs][measure], 3) for measure in (*SECONDS, *MEMORY)
            }
            for ours, theirs in PAIRS
            if ours in middle and theirs in middle
        },
        "pictures": differences(given.folder, given.only),
        "runs": {name: [one.measured | one.seen for one in of] for name, of in runs.items()},
    }
    show(result)
    if given.save:
        print(f"kept in {keep(f'sd3-medium-memory-{given.side}-cpu.json', result)}")


def prepare(given: argparse.Namespace) -> Settings:
    """Write what is not there yet."""
    single = given.folder / "sd3-medium"
    write_model(single / "sd3_medium_incl_clips.safetensors", "sd3-medium-incl-clips", torch.bfloat16)
    clip_tokenizer(single / "tokenizer")
    clip_tokenizer(single / "tokenizer_2", padding="!")
    settings = Settings(
        folder=str(as_diffusers(single, given.folder / "sd3-medium-diffusers")),
        offloaded=str(given.folder / "sd3-medium-groups"),
        picture="",
        side=given.side,
        steps=given.steps,
    )
    if "diffusers group offload" in given.only and not Path(settings.offloaded).exists():
        run(CHILD, "group-files", json.dumps(asdict(settings)), patience=0)
    return settings


def picture(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(' ', '-')}.png"


def summary(runs: list[Run]) -> dict[str, float]:
    """The median of each measure."""
    return {
        name: round(statistics.median((one.measured | one.seen)[name] for one in runs), 3)
        for name in (*SECONDS, *MEMORY)
    }


def differences(folder: Path, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """How far pictures are from the same program's plain one; and Calotype's plain one from diffusers'."""
    pairs = [(name, name.split(" ")[0]) for name in names if " " in name] + [("calotype", "diffusers")]
    return {
        f"{name} from {plain}": picture_difference(picture(folder, name), picture(folder, plain))
        for name, plain in pairs
        if name in names and plain in names
    }


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['model']}\n{result['machine']}; {result['arithmetic']}\n")
    print(f"{'':28}" + "".join(f"{name:>20}" for name in (*SECONDS, *MEMORY)))
    for name, measured in result["median"].items():
        print(f"{name:28}" + "".join(f"{measured[measure]:20.3f}" for measure in (*SECONDS, *MEMORY)))
    for name, difference in result["pictures"].items():
        print(f"{name}: largest {difference['largest of 255']:.0f}, mean {difference['mean of 255']:.2f} of 255")


if __name__ == "__main__":
    main()
