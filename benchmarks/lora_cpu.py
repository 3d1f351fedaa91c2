"""A LoRA on SDXL's UNet at its real size, on a CPU: Calotype and diffusers (with peft) in turns, on random weights.

    python benchmarks/lora_cpu.py --folder FOLDER [--dtype float16] [--rank 40] [--rounds 2] [--save]

The file is written once in FOLDER: kohya's names, all attention and feed-forward layers (210 MB at rank 40).
Calotype: `attach` reads and checks the file, `merge` is what the next job does first, `detach` puts the loaded weights
back. diffusers: `load_lora_weights`, `fuse_lora`, then `unfuse_lora` and `unload_lora_weights`. Each runs in a process
of its own, in memory that was touched before; ratios are Calotype's over diffusers': below 1 is in Calotype's favour.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import torch
from measuring import arithmetic, command, commit, keep, machine, touch, versions
from safetensors.torch import save_file
from torch import nn

from calotype.checkpoint.files import Weights
from calotype.families.sdxl.config import UNET as CONFIG
from calotype.families.sdxl.keys import UNET
from calotype.lora.attach import Adapters
from calotype.lora.targets import Adaptable
from calotype.memory.ladder import Memory

STAGES = ("attach", "merge", "detach")
TOUCHED = 12 * 2**30  # bytes: more than either takes


def filled(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A network on meta with random weights: one block of numbers, over and over."""
    block = (0.02 * torch.randn(2**20)).to(dtype)
    network = network.to(dtype).to_empty(device="cpu").requires_grad_(False)
    for parameter in network.parameters():
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), len(block)):
            flat[start : start + len(block)] = block[: len(flat) - start]
    return network


def adaptable(dtype: torch.dtype | None) -> Adaptable:
    layout = UNET.layout("original")
    assert layout is not None
    network, _ = UNET.bind(layout, CONFIG)
    return Adaptable("unet", "unet", network if dtype is None else filled(network, dtype), UNET, CONFIG, True)


def write(path: Path, rank: int) -> None:
    names = next(names for names in adaptable(None).layouts if names.layout == "original")
    state: dict[str, torch.Tensor] = {}
    for joined, dotted in names.joined.items():
        if "transformer_blocks" not in dotted:
            continue
        out, inner = names.dotted[dotted][0][1].shape[:2]
        state[f"lora_unet_{joined}.lora_down.weight"] = (torch.randn(rank, inner) / rank).half()
        state[f"lora_unet_{joined}.lora_up.weight"] = (0.01 * torch.randn(out, rank)).half()
        state[f"lora_unet_{joined}.alpha"] = torch.tensor(float(rank))
    save_file(state, path)


def calotype(file: Path, dtype: torch.dtype) -> dict[str, float]:
    one = adaptable(dtype)
    memory = Memory(torch.device("cpu"))
    adapters = Adapters([one], lambda: memory)
    start = time.perf_counter()
    adapters.attach(Weights.of(str(file), [file]), name="lora")
    attached = time.perf_counter()
    adapters.apply()
    merged = time.perf_counter()
    adapters.detach("lora")
    adapters.apply()
    return {"attach": attached - start, "merge": merged - attached, "detach": time.perf_counter() - merged}


def diffusers(file: Path, dtype: torch.dtype) -> dict[str, float]:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    from calotype.checkpoint.unets import settings

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(settings(CONFIG))
    pipeline: Any = StableDiffusionXLPipeline(
        unet=filled(unet, dtype),
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        scheduler=EulerDiscreteScheduler(),
    )
    start = time.perf_counter()
    pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="lora")
    attached = time.perf_counter()
    pipeline.fuse_lora()
    merged = time.perf_counter()
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    return {"attach": attached - start, "merge": merged - attached, "detach": time.perf_counter() - merged}


CONTESTANTS = {"calotype": calotype, "diffusers": diffusers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--dtype", default="float16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rank", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--only", choices=CONTESTANTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    file = given.folder / f"sdxl-rank-{given.rank}.safetensors"
    if given.only:
        touch(TOUCHED)
        print(json.dumps(CONTESTANTS[given.only](file, getattr(torch, given.dtype))))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        write(file, given.rank)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for _ in range(given.rounds):
        for name, times in runs.items():
            words = [sys.executable, __file__, "--folder", str(given.folder), "--dtype", given.dtype, "--only", name]
            done = subprocess.run([*words, "--rank", str(given.rank)], capture_output=True, text=True, check=True)
            times.append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(name, {stage: round(value, 2) for stage, value in times[-1].items()}, flush=True)
    medians = {
        name: {stage: statistics.median(each[stage] for each in times) for stage in STAGES}
        for name, times in runs.items()
    }
    ratios = {stage: medians["calotype"][stage] / medians["diffusers"][stage] for stage in STAGES}
    result = {
        "what": "LoRA on SDXL's UNet, seconds",
        "file MB": round(file.stat().st_size / 1e6),
        "date": date.today().isoformat(),
        "machine": machine(),
        "arithmetic": arithmetic(given.dtype),
        "versions": versions("torch", "diffusers", "peft"),
        "commit": commit(),
        "command": command("lora_cpu.py", sys.argv[1:]),
        "seconds": medians,
        "ratios": ratios,
        "runs": runs,
    }
    print(json.dumps({"seconds": medians, "ratios": ratios}, indent=2))
    if given.save:
        print(keep(f"lora-sdxl-{given.dtype}-cpu.json", result))


if __name__ == "__main__":
    main()
