"""Stable Diffusion 1.5 at its real size on a CPU: Calotype and its peers in turns, on the same random weights.

    python benchmarks/sd1_cpu.py --folder FOLDER [--dtype float32] [--rounds 2] [--steps 2] [--sdcpp PYTHON] [--save]

Every contestant draws a picture under classifier-free guidance (7.5), in a process of its own: Calotype with torch
and with OpenVINO, diffusers, diffusers' networks converted to OpenVINO, and stable-diffusion.cpp (in an interpreter
that has stable_diffusion_cpp). The weights are written once in FOLDER, as one file and in diffusers' layout (13 GB in
float32, OpenVINO's graphs included). OpenVINO computes in float32 whatever the dtype: weights are widened once.
With --control, Calotype (torch) and diffusers are led by a ControlNet of the real size, random too.

Ratios are Calotype's (torch) over the peer's: below 1 is in Calotype's favour.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import os
import statistics
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import torch
from measuring import Run, arithmetic, command, commit, keep, machine, picture_difference, run, versions
from PIL import Image, ImageDraw
from random_models import as_diffusers, sd1, sd1_control
from sd1_contestants import Settings

import calotype

CHILD = Path(__file__).parent / "sd1_contestants.py"
SECONDS = (
    "import and load",
    "text encoding",
    "first step",
    "step",
    "decode",
    "picture after loading",
    "picture in all",
)
MEMORY = ("peak GiB", "peak anonymous GiB")
LED = ("calotype", "diffusers")  # contestants that --control is asked of
SAME_NOISE = ("calotype-openvino", "diffusers", "openvino")  # and the same solver: their pictures must agree


def present(sdcpp: str | None) -> list[str]:
    """The contestants that can run here."""
    openvino = importlib.util.find_spec("openvino") is not None
    return [
        "calotype",
        *(["calotype-openvino"] if openvino and "backend" in inspect.signature(calotype.load).parameters else []),
        "diffusers",
        *(["openvino"] if openvino else []),
        *(["sd.cpp"] if sdcpp else []),
    ]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, required=True, help="where the models are kept between runs")
    arguments.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--steps", type=int, default=2, help="steps that count, after the first")
    arguments.add_argument("--side", type=int, default=512)
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    arguments.add_argument("--sdcpp", metavar="PYTHON", help="an interpreter that has stable_diffusion_cpp")
    arguments.add_argument("--only", nargs="+", metavar="NAME", help="contestants to run; else all that are installed")
    arguments.add_argument("--control", action="store_true", help="draw with a ControlNet")
    arguments.add_argument("--patience", type=float, default=180, help="seconds to wait for a quiet machine")
    arguments.add_argument("--save", action="store_true", help="keep the result under benchmarks/results")
    given = arguments.parse_args()
    names = [name for name in present(given.sdcpp) if given.only is None or name in given.only]
    names = [name for name in names if name in LED or not given.control]
    settings = prepare(given)
    converted: Run | None = None
    if "openvino" in names and not (Path(settings.graphs) / "decoder.xml").exists():
        converted = run(CHILD, "openvino-convert", json.dumps(asdict(settings)), patience=0)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for number in range(given.rounds):
        for name in names if number % 2 == 0 else reversed(names):
            python = given.sdcpp if name == "sd.cpp" else sys.executable
            told = asdict(settings) | {"picture": str(given.folder / f"{name}.png")}
            runs[name].append(run(CHILD, name, json.dumps(told), python=python, patience=given.patience))
            print(name, json.dumps(runs[name][-1].measured), json.dumps(runs[name][-1].seen), flush=True)
    result: dict[str, Any] = {
        "command": command("sd1_cpu.py", sys.argv[1:]),
        "date": date.today().isoformat(),
        "machine": f"{machine()}; {given.threads} threads",
        "arithmetic": arithmetic(given.dtype),
        "versions": versions("torch", *(["diffusers", "transformers"] if "diffusers" in names else []))
        | {"openvino": importlib.util.find_spec("openvino") and openvino_version()}
        | ({"stable-diffusion.cpp": sdcpp_version(given.sdcpp)} if "sd.cpp" in names else {}),
        "commit": commit(),
        "model": f"Stable Diffusion 1.5, {given.side}x{given.side}, {given.dtype}, random weights, cfg 7.5"
        + (", a ControlNet" if given.control else ""),
    }
    result |= {name: summary(of) for name, of in runs.items()}
    if converted is not None:
        result["openvino"]["converting once, s"] = converted.measured["import and load"]
    result["ratios, Calotype over peer"] = {
        name: ratios(runs["calotype"], runs[name]) for name in names if name != "calotype" and "calotype" in names
    }
    result["largest difference from Calotype's picture"] = {
        name: picture_difference(given.folder / "calotype.png", given.folder / f"{name}.png")
        for name in SAME_NOISE
        if name in names and "calotype" in names
    }
    result["runs"] = {name: [one.measured | one.seen for one in of] for name, of in runs.items()}
    show(result, names)
    if given.save:
        led = "control-" if given.control else ""
        print(f"kept in {keep(f'sd1-{led}{given.side}-{given.dtype}-cpu.json', result)}")


def prepare(given: argparse.Namespace) -> Settings:
    """Write what is not there yet."""
    single = given.folder / f"sd1-{given.dtype}"
    file = sd1(single, getattr(torch, given.dtype))
    folder = as_diffusers(single, given.folder / f"sd1-{given.dtype}-diffusers")
    graphs = given.folder / f"sd1-{given.dtype}-{given.side}-openvino"
    graphs.mkdir(exist_ok=True)
    control = hint = ""
    if given.control:
        control = str(sd1_control(given.folder / f"sd1-{given.dtype}-control", getattr(torch, given.dtype)))
        hint = str(given.folder / f"hint-{given.side}.png")
        lines(given.side).save(hint)
    return Settings(
        file=str(file),
        folder=str(folder),
        graphs=str(graphs),
        picture="",
        dtype=given.dtype,
        prompt="a red fox in the snow",
        side=given.side,
        steps=given.steps,
        threads=given.threads,
        control=control,
        hint=hint,
    )


def lines(side: int) -> Image.Image:
    """A hint: white circles on black."""
    picture = Image.new("RGB", (side, side))
    pen = ImageDraw.Draw(picture)
    for radius in range(side // 16, side // 2, side // 8):
        pen.circle((side / 2, side / 2), radius, outline="white", width=2)
    return picture


def summary(runs: list[Run]) -> dict[str, dict[str, float]]:
    """Least and median of each measure; of `step` over all counted steps of all rounds."""
    return {
        name: {"min": round(min(values), 4), "median": round(statistics.median(values), 4)}
        for name in (*SECONDS, *MEMORY)
        if (values := measured(runs, name))
    }


def measured(runs: list[Run], name: str) -> list[float]:
    if name == "step":
        return [step for one in runs for step in one.measured["steps"]]
    return [(one.measured | one.seen)[name] for one in runs]


def ratios(ours: list[Run], theirs: list[Run]) -> dict[str, dict[str, float]]:
    mine, peer = summary(ours), summary(theirs)
    return {
        name: {kind: round(mine[name][kind] / peer[name][kind], 3) for kind in ("min", "median")}
        for name in mine
        if all(peer[name].values())
    }


def openvino_version() -> str:
    from importlib.metadata import version

    return version("openvino")


def sdcpp_version(python: str) -> str:
    import subprocess

    asked = "from importlib.metadata import version; print(version('stable_diffusion_cpp_python'))"
    done = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True)
    return f"stable-diffusion-cpp-python {done.stdout.strip()}"


def show(result: dict[str, Any], names: list[str]) -> None:
    print(f"\n{result['model']}\n{result['machine']}; {result['arithmetic']}\n")
    print(f"{'least':24}" + "".join(f"{name:>20}" for name in names))
    for measure in (*SECONDS, *MEMORY):
        print(f"{measure:24}" + "".join(f"{result[name][measure]['min']:20.3f}" for name in names))
    print("differences from Calotype's picture:", result["largest difference from Calotype's picture"])


if __name__ == "__main__":
    main()
