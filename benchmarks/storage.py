"""What keeping a network's weights in fewer bits costs and loses, at real size, on random weights.

    python benchmarks/storage.py --folder FOLDER [--side 256] [--gguf Q8_0 Q4_K] [--sdcpp PYTHON] [--save]

Stable Diffusion 3 medium as one bfloat16 file with both CLIPs (6 GB, kept in FOLDER). For each kind of storage: the
bytes of the transformer's weights; how far they are from bfloat16's, |stored - bfloat16| / |bfloat16|, over every
matrix kept so; how far its answer is (the velocity at full noise, of the same prompt and noise); and seconds for that
answer, with those of bfloat16 taken in turns. GGUF files are written by stable-diffusion.cpp, in an interpreter that
has stable_diffusion_cpp: files by somebody else's hand, where Calotype reads and does not write.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import torch
from measuring import arithmetic, command, commit, keep, machine, settle, versions
from random_models import clip_tokenizer, write_model
from torch import Tensor, nn

import calotype
from calotype.families.sd3 import Sd3Model
from calotype.memory.plan import weight_bytes
from calotype.nn.stored import Stored
from calotype.request import Job

KINDS = ("fp8_e4m3", "fp8_e5m2", "int8", "int4")
GGUF = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0")
WRITE = """
import sys
from stable_diffusion_cpp import StableDiffusion
from stable_diffusion_cpp import stable_diffusion_cpp as library
from stable_diffusion_cpp.stable_diffusion import GGML_TYPE_MAP
source, out, kind = sys.argv[1:]
done = library.convert(source.encode(), b"", out.encode(), GGML_TYPE_MAP[kind.lower()], b"", False)
sys.exit(0 if done else "stable-diffusion.cpp could not convert it")
"""
TURNS = 2  # the least of them counts


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, required=True, help="where the model is kept between runs")
    arguments.add_argument("--side", type=int, default=256)
    arguments.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    arguments.add_argument("--gguf", nargs="*", default=GGUF, choices=GGUF, help="types of GGUF files")
    arguments.add_argument("--sdcpp", metavar="PYTHON", help="an interpreter that has stable_diffusion_cpp")
    arguments.add_argument("--patience", type=float, default=180, help="seconds to wait for a quiet machine")
    arguments.add_argument("--save", action="store_true", help="keep the result under benchmarks/results")
    given = arguments.parse_args()
    source = given.folder / "sd3_medium_incl_clips.safetensors"
    write_model(source, "sd3-medium-incl-clips", torch.bfloat16)
    clip_tokenizer(given.folder / "tokenizer")
    clip_tokenizer(given.folder / "tokenizer_2", padding="!")
    settle(given.patience)
    reference = opened(source)
    ask = question(reference, given.side)
    told, _ = ask(reference)  # warms up
    rows: dict[str, dict[str, float]] = {}
    for name, model in contestants(source, given):
        turns = [(ask(model), ask(reference)) for _ in range(TURNS)]
        answer = turns[0][0][0]
        rows[name] = {
            "GB of weights": round(weight_bytes(model.family.backbone) / 1e9, 3),
            "error of the weights": round(weights_error(model.family.backbone, reference.family.backbone), 5),
            "error of the answer": round(float((answer - told).norm() / told.norm()), 5),
            "seconds": round(min(mine for (_, mine), _ in turns), 2),
            "seconds in bfloat16": round(min(plain for _, (_, plain) in turns), 2),
        }
        print(name, json.dumps(rows[name]), flush=True)
    result: dict[str, Any] = {
        "command": command("storage.py", sys.argv[1:]),
        "date": date.today().isoformat(),
        "machine": machine(),
        "arithmetic": arithmetic("bfloat16"),
        "versions": versions("torch"),
        "commit": commit(),
        "model": f"Stable Diffusion 3 medium without T5, {given.side}x{given.side}, random weights, one pass",
        "GB of weights in bfloat16": round(weight_bytes(reference.family.backbone) / 1e9, 3),
        "storage": rows,
    }
    if given.save:
        print(f"kept in {keep('sd3-medium-storage-cpu.json', result)}")


def opened(source: Path, **chosen: Any) -> calotype.Model[Any]:
    """The model, with its tokenizers from beside it; weights stay in the file until they are used."""
    tokenizers = (source.parent / "tokenizer", source.parent / "tokenizer_2")
    return calotype.load(source, *tokenizers, device="cpu", dtype="bfloat16", memory="components", **chosen)


def contestants(source: Path, given: argparse.Namespace) -> Iterator[tuple[str, calotype.Model[Any]]]:
    """Each kind of storage, loaded when its turn comes."""
    for kind in given.kinds:
        yield kind, opened(source, storage={"transformer": kind})
    for kind in given.gguf if given.sdcpp else ():
        file = source.with_name(f"sd3_medium_incl_clips-{kind}.gguf")
        if not file.exists():
            subprocess.run(
                [given.sdcpp, "-c", WRITE, str(source), str(file), kind], check=True, stdout=subprocess.DEVNULL
            )
        yield f"GGUF {kind}", opened(file)
        file.unlink()  # several gigabytes each


def question(reference: calotype.Model[Any], side: int) -> Callable[[calotype.Model[Any]], tuple[Tensor, float]]:
    """What asks a model's transformer for the velocity at full noise: the answer, and its seconds."""
    request = calotype.Request(prompt="a red fox in the snow", width=side, height=side, steps=2, seed=7, cfg_scale=1)
    family = reference.family
    assert isinstance(family, Sd3Model)
    job: Job = request.complete(family.defaults, seed=7)
    levels = family.levels(job)
    x = torch.randn((1, *family.noise_shape(job)), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode(), family.memory.holding(*family.encoders):
        conditioning = family.condition(job.prompt, job, negative=False)

    @torch.inference_mode()
    def ask(model: calotype.Model[Any]) -> tuple[Tensor, float]:
        with model.family.memory.holding(model.family.backbone):
            denoise = model.family.denoiser(conditioning, levels.path, [job])
            start = time.perf_counter()
            clean = denoise(x, levels.path[0])
            return (x - clean) / levels.path[0].sigma, time.perf_counter() - start

    return ask


def weights_error(network: nn.Module, reference: nn.Module) -> float:
    """|stored - reference| / |reference| over all weights kept in fewer bits, taken together."""
    apart = whole = 0.0
    for name, layer in network.named_modules():
        if not isinstance(layer, Stored):
            continue
        weight = reference.get_submodule(name).get_parameter("weight")
        first = 0
        for block in layer.blocks():
            wanted = weight[first : first + len(block)].flatten(1).float()
            apart += float((block - wanted).square().sum(dtype=torch.float64))
            whole += float(wanted.square().sum(dtype=torch.float64))
            first += len(block)
    return (apart / whole) ** 0.5 if whole else 0.0


if __name__ == "__main__":
    main()
