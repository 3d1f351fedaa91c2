"""The built-in model: offline, small, obedient, repeatable."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import calotype
from calotype.cli.main import app

FOLDER = Path(calotype.__file__).parent / "builtin"


@pytest.fixture(scope="module")
def model() -> calotype.Model[object]:
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*_: object) -> None:
            raise AssertionError("the network was asked for")

        patch.setattr(socket.socket, "connect", refuse)
        return calotype.load()


def colours(picture: object) -> np.ndarray:
    assert isinstance(picture, Image.Image)
    return np.asarray(picture, dtype=float)


def test_weights_are_small_and_come_with_their_papers() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*.safetensors")) <= 45_000_000
    card = (FOLDER / "README.md").read_text("utf-8")
    for said in ("Fluent Emoji", "MIT", "Held-out"):
        assert said.lower() in card.lower()
    assert "Microsoft" in (FOLDER / "LICENSES.md").read_text("utf-8")


def test_objects_and_backgrounds_are_as_asked(model: calotype.Model[object]) -> None:
    """The middle is red and the corners are blue, for several seeds."""
    for seed in range(3):
        picture = colours(model.generate("a red apple on a blue background", seed=seed))
        side = picture.shape[0]
        middle = picture[side // 2 - 12 : side // 2 + 12, side // 2 - 12 : side // 2 + 12].mean((0, 1))
        corners = np.concatenate([picture[:6, :6], picture[:6, -6:], picture[-6:, :6], picture[-6:, -6:]]).mean((0, 1))
        assert middle[0] > middle[1] + 60
        assert middle[0] > middle[2] + 60
        assert corners[2] > corners[0] + 60


def test_different_prompts_draw_different_things(model: calotype.Model[object]) -> None:
    cat, rocket = (colours(model.generate(prompt, seed=1)) for prompt in ("a cat face", "a rocket"))
    assert abs(cat - rocket).mean() > 20


def test_a_picture_is_repeated_from_its_metadata_bit_for_bit(tmp_path: Path) -> None:
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    run = CliRunner().invoke
    assert run(app, ["generate", "two cats", "--seed", "3", "--cfg-scale", "3", "--out", str(first)]).exit_code == 0
    assert run(app, ["generate", "--like", str(first), "--out", str(second)]).exit_code == 0
    assert Image.open(first).tobytes() == Image.open(second).tobytes()
    record = calotype.read_metadata(second)[1]
    assert record["model"] == "flux/builtin"
    assert record["job"]["prompt"] == "two cats"


def test_two_loads_draw_the_same(model: calotype.Model[object]) -> None:
    again = calotype.load()
    pictures = [colours(one.generate("a penguin", seed=9, sampler="dpmpp_2m_sde")) for one in (model, again)]
    assert (pictures[0] == pictures[1]).all()


def test_sizes_follow_the_grain(model: calotype.Model[object]) -> None:
    with pytest.raises(calotype.RequestError, match="nearest valid size is 128x160"):
        model.generate("a cat", width=130, height=150)
    assert colours(model.generate("a cat", width=160, height=128, steps=2)).shape == (128, 160, 3)
