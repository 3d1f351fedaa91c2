"""FLUX.1 at its real size with random bfloat16 weights: does it load, run, and stay within its memory?

    python benchmarks/full_size.py --folder FOLDER [--steps 1] [--side 512] [--save]

Writes the four files of FLUX.1 dev from our own manifests (34 GB, once; kept in FOLDER), loads them by memory mapping
in a process of its own, and draws one picture. Tokenizers are small stand-ins: the real ones are on the hub.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from against_diffusers import cpu

import calotype

FILES = {
    "flux1-dev.safetensors": "flux1-dev",
    "clip_l.safetensors": "flux-text-encoder",
    "t5xxl.safetensors": "flux-text-encoder-2",
    "ae.safetensors": "flux-ae",
}
CHILD = """
import json, re, sys, time
from pathlib import Path
folder, side, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
def memory(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) / 2**20
start = time.perf_counter()
import calotype
model = calotype.load(*sorted(folder.glob("*.safetensors")), folder / "tokenizer", folder / "tokenizer_2", device="cpu")
loaded = time.perf_counter()
after_load = {
    "load s": loaded - start,
    "GiB in memory after loading": memory("VmRSS"),
    "anonymous GiB after loading": memory("RssAnon"),
}
marks, anonymous = [], 0.0
request = calotype.Request(prompt="a red fox in the snow", width=side, height=side, steps=steps, seed=7)
for event in model.stream(request):
    anonymous = max(anonymous, memory("RssAnon"))
    marks.append(time.perf_counter())
    if isinstance(event, calotype.Picture):
        event.image.save(folder / "picture.png")
print(json.dumps(after_load | {
    "encode, prepare and first step s": marks[0] - loaded,
    "further steps s": [b - a for a, b in zip(marks, marks[1:-1])],
    "decode s": marks[-1] - marks[-2],
    "peak GiB in memory, mapped weights included": memory("VmHWM"),
    "anonymous GiB, largest seen between steps": anonymous,
}))
"""


def write(folder: Path) -> None:
    """The random files, and stand-ins for the tokenizers."""
    import torch

    from calotype.checkpoint.writing import write_random
    from calotype.loading import manifest

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "parity"))
    from tiny_flux import framed, word_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, layout) in enumerate(FILES.items()):
        if not (folder / name).exists():
            write_random(folder / name, manifest(layout), torch.bfloat16, seed=number)
            print(f"{name}: {(folder / name).stat().st_size / 1e9:.1f} GB", flush=True)
    clip = {"eos_token": "<end>", "pad_token": "<end>", "bos_token": "<start>", "unk_token": "<end>"}
    t5 = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    framed(word_tokenizer(clip, 77), "<start> $A <end>").save_pretrained(folder / "tokenizer")
    framed(word_tokenizer(t5, 512), "$A </s>").save_pretrained(folder / "tokenizer_2")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, required=True)
    arguments.add_argument("--steps", type=int, default=1)
    arguments.add_argument("--side", type=int, default=512)
    arguments.add_argument("--save", action="store_true", help="keep the result under benchmarks/results")
    given = arguments.parse_args()
    write(given.folder)
    command = [sys.executable, "-c", CHILD, str(given.folder), str(given.side), str(given.steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    measured = json.loads(done.stdout.splitlines()[-1])
    weights = sum(file.stat().st_size for file in given.folder.glob("*.safetensors"))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    result = {
        "command": f"python benchmarks/full_size.py --folder FOLDER --side {given.side} --steps {given.steps}",
        "date": date.today().isoformat(),
        "machine": f"{cpu()}, {os.cpu_count()} cores, {memory:.0f} GiB",
        "versions": {"python": platform.python_version(), "torch": version("torch"), "calotype": calotype.__version__},
        "weights GB": weights / 1e9,
        "measured": measured,
    }
    print(json.dumps(result, indent=1))
    if given.save:
        file = Path(__file__).parent / "results" / f"flux1-dev-full-size-{given.side}-cpu.json"
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
