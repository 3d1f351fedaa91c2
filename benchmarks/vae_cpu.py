"""Stable Diffusion's autoencoder at its real widths on a CPU: strips, one piece, and diffusers' two ways, in turns.

    python benchmarks/vae_cpu.py --folder FOLDER [--side 1024] [--way decode] [--dtype float32] [--rounds 1] [--save]

Random weights. Each run is a process of its own; peak memory is the kernel's and counts torch and the weights, which
are half a gigabyte of it. Before each, memory is touched once: a virtual machine's host gives it slowly at first.
Differences are from the result in one piece, or from diffusers' where that is not run; of 4096 x 4096 in float32 one
piece takes more than 64 GiB: leave it out with --only.

Ratios are Calotype's strips over the other: below 1 is in Calotype's favour.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import psutil
import torch
from measuring import Run, arithmetic, command, commit, keep, machine, run, versions
from safetensors.torch import load_file, save_file
from vae_contestants import CONTESTANTS, Settings

from calotype.checkpoint.autoencoders import diffusers_table
from calotype.families.sd1.config import VAE
from calotype.nn.autoencoder import Autoencoder

CHILD = Path(__file__).parent / "vae_contestants.py"
MEASURES = ("seconds", "CPU seconds", "peak GiB")
EXACT = ("calotype whole", "diffusers")  # what others are compared with, the first that is there


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, required=True, help="where weights, inputs and results are kept")
    arguments.add_argument("--side", type=int, default=1024, help="of the picture, in pixels")
    arguments.add_argument("--way", choices=("decode", "encode"), default="decode")
    arguments.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments.add_argument("--rounds", type=int, default=1)
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    arguments.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS), metavar="NAME")
    arguments.add_argument("--patience", type=float, default=180, help="seconds to wait for a quiet machine")
    arguments.add_argument("--save", action="store_true", help="keep the result under benchmarks/results")
    given = arguments.parse_args()
    names: list[str] = given.only
    settings = prepare(given)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for number in range(given.rounds):
        for name in names if number % 2 == 0 else reversed(names):
            told = replace(settings, result=str(result_file(given.folder, name)))
            touched = int(0.8 * psutil.virtual_memory().available)
            runs[name].append(run(CHILD, name, json.dumps(asdict(told)), patience=given.patience, touched=touched))
            print(name, json.dumps(runs[name][-1].measured), json.dumps(runs[name][-1].seen), flush=True)
    least = {name: {what: min(one.measured[what] for one in of) for what in MEASURES} for name, of in runs.items()}
    middle = {
        name: {what: statistics.median(one.measured[what] for one in of) for what in MEASURES}
        for name, of in runs.items()
    }
    result: dict[str, Any] = {
        "command": command("vae_cpu.py", sys.argv[1:]),
        "date": date.today().isoformat(),
        "machine": f"{machine()}; {given.threads} threads",
        "arithmetic": arithmetic(given.dtype),
        "versions": versions("torch", "diffusers"),
        "commit": commit(),
        "model": f"Stable Diffusion's autoencoder, random weights, {given.dtype}",
        "what": f"{given.way} {given.side}x{given.side}",
        "least": least,
        "median": middle,
        "ratios, strips over the other": {
            name: {what: round(middle["calotype"][what] / middle[name][what], 3) for what in MEASURES}
            for name in names
            if name != "calotype" and "calotype" in names
        },
        "differences": differences(given.folder, names),
        "runs": {name: [one.measured | {"seen": one.seen} for one in of] for name, of in runs.items()},
    }
    show(result)
    if given.save:
        print(f"kept in {keep(f'vae-{given.way}-{given.side}-{given.dtype}-cpu.json', result)}")


def prepare(given: argparse.Namespace) -> Settings:
    """Write what is not there yet."""
    folder: Path = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "calotype.safetensors").exists():
        weights(folder)
    side: int = given.side // VAE.factor if given.way == "decode" else given.side
    file = folder / f"{given.way}-{given.side}.safetensors"
    if not file.exists():
        rng = torch.Generator().manual_seed(7)
        channels = VAE.latent_channels if given.way == "decode" else 3
        drawn = torch.randn(1, channels, side, side, generator=rng)
        save_file({"x": drawn if given.way == "decode" else torch.sigmoid(drawn)}, file)
    return Settings(
        folder=str(folder), result="", way=given.way, side=given.side, dtype=given.dtype, threads=given.threads
    )


def weights(folder: Path) -> None:
    """The same random weights, which keep signals at their size, in our names and in diffusers' layout."""
    from diffusers import AutoencoderKL

    rng = torch.Generator().manual_seed(0)
    net = Autoencoder(VAE).requires_grad_(False)
    for name, weight in net.named_parameters():
        spread = 1 / math.sqrt(weight[0].numel()) if weight.ndim > 1 else 0.02
        gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        weight.copy_(gain + spread * torch.randn(weight.shape, generator=rng))
    state = net.state_dict()
    save_file(state, folder / "calotype.safetensors")
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(VAE.widths),
        up_block_types=("UpDecoderBlock2D",) * len(VAE.widths),
        block_out_channels=VAE.widths,
        layers_per_block=VAE.blocks,
        latent_channels=VAE.latent_channels,
        sample_size=512,
        scaling_factor=VAE.scale,
    )
    binding = diffusers_table(VAE).bind({name: tuple(value.shape) for name, value in state.items()})
    theirs.load_state_dict({name: value.contiguous() for name, value in binding.save(state)})
    theirs.save_pretrained(folder)


def result_file(folder: Path, name: str) -> Path:
    return folder / f"result-{name.replace(' ', '-')}.safetensors"


def differences(folder: Path, names: list[str]) -> dict[str, dict[str, float]]:
    """Of results: the largest, the mean, and the largest over the largest number there is."""
    exact = next((name for name in EXACT if name in names), None)
    if exact is None:
        return {}
    wanted = load_file(result_file(folder, exact))["x"]
    found: dict[str, dict[str, float]] = {}
    for name in names:
        if name != exact:
            apart = (load_file(result_file(folder, name))["x"] - wanted).abs()
            most = float(apart.max())
            found[f"{name} from {exact}"] = {
                "largest": most,
                "mean": float(apart.mean()),
                "relative": most / float(wanted.abs().max()),
            }
    return found


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['model']}: {result['what']}\n{result['machine']}; {result['arithmetic']}\n")
    for what in MEASURES:
        print(f"{what:12}" + "".join(f"{name:>18} {of[what]:8.2f}" for name, of in result["median"].items()))
    for name, of in result["differences"].items():
        print(name, of)
    print("ratios, strips over the other:", result["ratios, strips over the other"])


if __name__ == "__main__":
    main()
