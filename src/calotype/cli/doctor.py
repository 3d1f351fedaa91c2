"""`calotype doctor`: what this machine has, and whether the built-in model runs on it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from calotype.cli.output import columns, size
from calotype.errors import CalotypeError
from calotype.version import VERSION

LIBRARIES = ("torch", "safetensors", "tokenizers", "huggingface-hub", "pillow", "numpy")
Findings = dict[str, str]


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices, memory and folders, and try the built-in model.

    The exit status is 1 where that does not load.
    """
    built_in, works = _built_in()
    found: dict[str, Findings] = {
        "versions": dict(_versions()),
        "devices": dict(_devices()),
        "memory": dict(_memory()),
        "folders": dict(_folders()),
        "built-in model": built_in,
    }
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        width = max(len(name) for findings in found.values() for name in findings)
        for title, findings in found.items():
            typer.secho(title, bold=True)
            rows = [(name.ljust(width), text) for name, text in findings.items()]
            typer.echo("\n".join(columns(rows, indent="  ")))
    if not works:
        raise typer.Exit(1)


def _versions() -> Iterator[tuple[str, str]]:
    yield "calotype", VERSION
    yield "python", f"{platform.python_version()}, {sys.executable}"
    yield "system", platform.platform()
    for library in LIBRARIES:
        try:
            yield library, metadata.version(library)
        except metadata.PackageNotFoundError:
            yield library, "missing"


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    from calotype.nn.linear import native

    yield "cpu", f"{_processor()}, {os.cpu_count()} threads, torch uses {torch.get_num_threads()}"
    yield "cpu bfloat16", "native" if native(torch.bfloat16) else "not native: half the memory, slower than float32"
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        yield f"cuda:{number}", f"{torch.cuda.get_device_name(number)}, {size(free)} free of {size(total)}"
    if torch.backends.mps.is_available():
        yield "mps", "Apple GPU, shares the memory below"
    if not torch.cuda.is_available():
        yield "cuda", "none that torch can use" if torch.version.cuda else "none: this torch is built without CUDA"


def _processor() -> str:
    if sys.platform == "darwin":
        return _apple("machdep.cpu.brand_string") or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _apple(key: str) -> str:
    return subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False).stdout.strip()


def _memory() -> Iterator[tuple[str, str]]:
    free, total = memory()
    if total is None:
        yield "ram", "unknown"
    else:
        yield "ram", f"{size(total)}" if free is None else f"{size(free)} free of {size(total)}"


def memory() -> tuple[int | None, int | None]:
    """Bytes of RAM that are free and that there are, within a container's limit; None where unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        names = getattr(os, "sysconf_names", {})
        known = "SC_PHYS_PAGES" in names
        return None, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    free, total = fields.get("MemAvailable"), fields.get("MemTotal")
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such file, or no limit: "max"
        return free, total
    if free is None or total is None:
        return limit - used, limit
    return min(free, limit - used), min(total, limit)


def _folders() -> Iterator[tuple[str, str]]:
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    home = Path(os.environ.get("CALOTYPE_HOME", "~/.cache/calotype")).expanduser()
    yield "CALOTYPE_HOME", _folder(home)
    yield "hub cache", _folder(Path(HF_HUB_CACHE)) + (", HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "")


def _folder(path: Path) -> str:
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    state = "" if there == path else " (not made yet)"
    return f"{path}{state}, {size(shutil.disk_usage(there).free)} free"


def _built_in() -> tuple[Findings, bool]:
    """What became of the built-in model, and whether it loads."""
    from calotype.loading import load

    started = time.monotonic()
    try:
        model = load()
    except CalotypeError as error:
        return {"loads": f"no: {error}"}, False
    d = model.family.defaults
    took = time.monotonic() - started
    return {"loads": f"yes, {model.name} in {took:.1f} s; draws {d.width}x{d.height} in {d.steps} steps"}, True
