"""What stands beside figures that were measured: the command, the date, the machine and the versions."""

from __future__ import annotations

import platform
from datetime import date
from typing import Any

import torch

import calotype


def measured_by(command: str) -> dict[str, Any]:
    """For a file of results: made now, by this command."""
    return {
        "command": command,
        "date": date.today().isoformat(),
        "device": f"cpu, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            "calotype": calotype.__version__,
            "torch": torch.__version__,
        },
    }
