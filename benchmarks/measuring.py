"""What the benchmarks share: a run is a process of its own, watched from outside; a result names its machine."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BUSY = 0.5  # cores that others may use while a run waits to begin
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


@dataclass(frozen=True)
class Run:
    """One process: what it printed about itself, and what was seen of it."""

    measured: dict[str, Any]
    seen: dict[str, Any]


def run(
    script: Path,
    *arguments: str,
    python: str = sys.executable,
    patience: float = 180,
    every: float = 0.05,
    touched: int = 0,
) -> Run:
    """Run a script whose last line of output is a JSON object, after waiting `patience` seconds for a quiet machine.

    Before it begins, another process touches so many bytes of memory (see `touch`).

    Seen are the load average before it, its peak memory, and the cores that other processes used beside it. Exits with
    its error where it fails.
    """
    waited = settle(patience)
    if touched:
        subprocess.run([sys.executable, "-c", f"import measuring; measuring.touch({touched})"], cwd=HERE, check=True)
    load = [round(value, 2) for value in os.getloadavg()]
    settings = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
    }
    busy, start = busy_seconds(), time.perf_counter()
    child = subprocess.Popen(
        [python, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **settings},
    )
    status = Path(f"/proc/{child.pid}/status")
    peaks = {"RssAnon": 0.0, "RssFile": 0.0, "VmHWM": 0.0}
    used = 0.0
    output = error = ""
    while True:
        try:
            output, error = child.communicate(timeout=every)
            break
        except subprocess.TimeoutExpired:
            for field, most in peaks.items():
                peaks[field] = max(most, gibibytes(status, field))
            used = cpu_seconds(child.pid) or used
    if child.returncode:
        raise SystemExit(f"{script.name} {' '.join(arguments)} failed:\n{error}")
    wall = time.perf_counter() - start
    seen = {
        "load_average": load,
        "waited s": round(waited, 1),
        "wall s": round(wall, 3),
        "cores used by others": round(max(busy_seconds() - busy - used, 0) / wall, 2),
        "peak GiB": round(peaks["VmHWM"], 3),
        "peak anonymous GiB": round(peaks["RssAnon"], 3),
        "peak mapped GiB": round(peaks["RssFile"], 3),
    }
    return Run(json.loads(output.splitlines()[-1]), seen)


def settle(patience: float) -> float:
    """Wait until other processes use less than BUSY cores, at most this long; the seconds waited.

    The load average would count the run before this one too, so what is looked at is the last two seconds.
    """
    start = time.perf_counter()
    while time.perf_counter() - start < patience:
        before = busy_seconds()
        time.sleep(2)
        if (busy_seconds() - before) / 2 < BUSY:
            break
    return time.perf_counter() - start


def busy_seconds() -> float:
    """Seconds that all cores together have worked since the machine began."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _waiting, *interrupts = map(int, fields[:8])
    return (user + nice + system + sum(interrupts)) / TICKS


def cpu_seconds(process: int) -> float:
    """Seconds that a process has worked; 0 where it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def gibibytes(status: Path, field: str) -> float:
    """A field of /proc/PID/status; 0 where the process is gone."""
    try:
        found = re.search(field + r":\s+(\d+)", status.read_text())
    except OSError:
        return 0.0
    return int(found.group(1)) / 2**20 if found else 0.0


def machine() -> str:
    """Processor, cores and memory."""
    name = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB"


def arithmetic(dtype: str) -> str:
    """What this CPU does with a dtype."""
    import torch

    from calotype.nn.linear import native

    if dtype == "float32" or native(getattr(torch, dtype)):
        return f"this CPU multiplies matrices of {dtype} in hardware"
    return f"this CPU has no {dtype} arithmetic: it is emulated, or products are taken in float32"


def versions(*names: str) -> dict[str, str]:
    import calotype

    return {"python": platform.python_version(), "calotype": calotype.__version__} | {
        name: version(name) for name in names
    }


def commit() -> str:
    """Calotype's commit, with a plus sign where src/ has changed since."""
    root = Path(__file__).parents[1]

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "src") else "")


def command(script: str, given: Sequence[str], private: Iterable[str] = ("--folder", "--sdcpp")) -> str:
    """The command line to keep with a result, with paths of this machine left out."""
    words = list(given)
    for place, word in enumerate(words[:-1]):
        if word in private:
            words[place + 1] = word.strip("-").upper()
    return " ".join(["python", f"benchmarks/{script}", *words])


def keep(name: str, result: Mapping[str, Any]) -> Path:
    """Write a result under benchmarks/results."""
    file = RESULTS / name
    file.write_text(json.dumps(dict(result), indent=1) + "\n")
    return file


def picture_difference(first: Path, second: Path) -> dict[str, float]:
    """Differences of two pictures in levels of 255: the largest, and the mean over all channels of all pixels."""
    import numpy as np
    from PIL import Image

    a, b = (np.asarray(Image.open(file).convert("RGB"), dtype=int) for file in (first, second))
    return {"largest of 255": int(abs(a - b).max()), "mean of 255": float(abs(a - b).mean())}


def touch(size: int) -> None:
    """Write to so many bytes once and give them back.

    A virtual machine gets its memory from the host at the first touch, which can take longer than what is measured.
    """
    np.empty(size, np.uint8).fill(1)
