"""How much memory there is to take."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes that a model may take on a device now.

    On a GPU, what torch holds and does not use counts as free, and a limit set for this process is kept to.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used = torch.cuda.memory_allocated(device)
        free += torch.cuda.memory_reserved(device) - used
        if hasattr(torch.cuda, "get_per_process_memory_fraction"):  # torch 2.8
            free = min(free, int(torch.cuda.get_per_process_memory_fraction(device) * total) - used)
        return max(free, 0)
    return min(psutil.virtual_memory().available, _allowed())


def _allowed(group: Path = CGROUP) -> int:
    """What a container's limit leaves; no limit is a very large one."""
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no control groups of version 2, or "max"
        return 2**62
    return limit - used + int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))
