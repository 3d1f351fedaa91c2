"""The README's examples run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from calotype.cli.main import app

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)( notest)?\n(.*?)```", README, re.DOTALL)
PYTHON = [code for language, skipped, code in BLOCKS if language == "python" and not skipped]
COMMANDS = [
    line.split("#")[0].strip()
    for language, _, code in BLOCKS
    if language == "sh"
    for line in code.replace("\\\n", " ").splitlines()
    if "calotype " in line
]


FILES = re.compile(r"flux1|OLD|--model|--input-image")  # what these commands need is not here


@pytest.mark.parametrize("code", PYTHON)
def test_python(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102
    assert list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("command", [line for line in COMMANDS if not FILES.search(line)])
def test_command(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that need no other model than the built-in one are run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a cat face", "seed": 1}\n', "utf-8")
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", [line for line in COMMANDS if FILES.search(line)])
def test_options_exist(command: str) -> None:
    """Of the others, every option named is one."""
    words = shlex.split(command)[1:]
    shown = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
    assert shown.exit_code == 0
    for option in (word for word in words if word.startswith("--")):
        assert option in shown.output
