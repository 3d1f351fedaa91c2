"""FLUX.1 dev at its real size in little of a GPU's memory. CALOTYPE_FULL names a folder with 40 GB of room."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.full]
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "full_size.py"


@pytest.mark.parametrize(("budget", "rung"), [(24, "components"), (8, "stream"), (3, "stream")])
def test_flux_at_1024_fits(budget: int, rung: str) -> None:
    """In 24 GB without going layer by layer, as its modulation leaves before the first step; below that, streamed."""
    folder = os.environ.get("CALOTYPE_FULL")
    if folder is None:
        pytest.skip("CALOTYPE_FULL names no folder")
    words = ["flux1-dev", "--folder", folder, "--side", "1024", "--steps", "4", "--device", "cuda"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words, "--budget", str(budget), "--patience", "0"],
        check=True,
        capture_output=True,
        text=True,
    )
    measured = json.loads(done.stdout[done.stdout.index("{") :])["measured"]
    assert measured["memory"] == rung
    assert measured["peak GB on the GPU"] <= budget
