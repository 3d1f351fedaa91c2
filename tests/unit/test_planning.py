"""A plan says what a picture takes without drawing it, or reading a weight."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import torch
from typer.testing import CliRunner

from calotype.cli.main import app
from calotype.errors import MissingPart, RequestError
from calotype.loading import load
from calotype.loading.planning import plan
from calotype.memory.ladder import RUNGS

MEASURE = """
import re, sys
import torch
from calotype.loading import load
from calotype.generate import stream
from calotype.request import Request

torch.set_num_threads(1)

def memory(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024

model = load(memory="resident").family
list(stream(model, Request(prompt="", steps=1, width=64, height=64)))  # what is allocated once
before = memory("VmRSS")
list(stream(model, Request(prompt="", steps=1, width=1024, height=1024)))
print(memory("VmHWM") - before)
"""


def test_each_rung_takes_less_than_the_one_above() -> None:
    planned = plan()
    assert (planned.model, planned.width, planned.height, planned.device) == ("flux/builtin", 128, 128, "cpu")
    assert [phase.name for phase in planned.phases] == ["encode", "denoise", "decode"]
    peaks = [planned.device_bytes[rung] for rung in RUNGS]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 3
    assert planned.chosen == "resident"
    assert planned.free_bytes > peaks[0]
    weights = sum(phase.weights["resident"] for phase in planned.phases)
    family = load().family
    networks = (*family.encoders, family.backbone, family.vae)
    assert weights == sum(tensor.nbytes for network in networks for tensor in network.state_dict().values())


def test_activations_grow_with_the_picture() -> None:
    small, large = plan(width=256, height=256), plan(width=512, height=512)
    for name in (1, 2):
        assert 2.5 < large.phases[name].activations / small.phases[name].activations < 5
    assert large.phases[0].activations == small.phases[0].activations


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory counters")
def test_what_was_predicted_is_what_is_taken() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    planned = plan(width=1024, height=1024)
    predicted = max(phase.activations for phase in planned.phases)
    assert 0.6 < int(done.stdout) / predicted < 1.6


def test_nothing_is_read(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    for file in files.values():
        if file.is_dir():
            continue
        start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        with file.open("r+b") as opened:  # every weight not a number: a plan that computes would show it
            opened.seek(start)
            opened.write(b"\xff" * (file.stat().st_size - start))
    planned = plan(*files.values(), width=64, height=64, dtype="bfloat16")
    assert planned.device_bytes["stream"] > 0
    with pytest.raises(MissingPart):
        plan(files["transformer"])
    with pytest.raises(RequestError, match="width"):
        plan(width=100)


def test_planning_leaves_no_mode_behind() -> None:
    plan()
    assert type(torch.zeros(1) + 1) is torch.Tensor


def test_models_that_share_an_encoder_with_a_planned_one_keep_their_weights(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path).values()
    model = load(*files)
    before = model.generate("a red apple", steps=1, seed=1, width=32, height=32)
    plan(*files, width=64, height=64)
    again = load(*files, memory="stream")
    again.prompts.clear()
    assert again.generate("a red apple", steps=1, seed=1, width=32, height=32) == before


def test_the_command_prints_it() -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["info", "--plan", "--width", "256", "--height", "128"])
    assert shown.exit_code == 0, shown.output
    assert "flux/builtin, 256x128 on cpu" in shown.output
    for rung in RUNGS:
        assert rung in shown.output
    printed = runner.invoke(app, ["info", "--plan", "--json"])
    assert set(json.loads(printed.output)["device_bytes"]) == set(RUNGS)
    for words in (["info", "--width", "64", "x"], ["info", "a", "b"], ["info", "--plan", "--manifests"]):
        assert runner.invoke(app, words).exit_code == 2
