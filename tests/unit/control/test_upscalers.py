"""Networks that enlarge: tiles, sizes and errors by a stand-in for spandrel; a tiny ESRGAN where the library is."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import calotype
from calotype.control import upscalers
from calotype.control.upscalers import load_upscaler
from calotype.errors import NonFiniteImage, RequestError, SourceNotFound, UnknownModel, UnsafeFile
from calotype.image import to_tensor
from calotype.request import HighRes, Size


class Blurring(nn.Module):
    """Twice as large, each pixel the mean of its neighbours: what a tile lacks at its border would show."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        mean = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        return F.interpolate(mean * self.weight, scale_factor=2, mode="nearest")


class Descriptor:
    """As much of spandrel's ImageModelDescriptor as is used."""

    scale, purpose, input_channels, output_channels = 2, "SR", 3, 3

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.model = Blurring(tensors["weight"])
        self.tiling = SimpleNamespace(name="SUPPORTED")

    def to(self, _: torch.dtype) -> Descriptor:
        return self

    def eval(self) -> Descriptor:
        return self

    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x)


class Loader:
    made: type[Descriptor] = Descriptor

    def __init__(self, device: str) -> None:
        assert device == "cpu"

    def load_from_state_dict(self, tensors: dict[str, Tensor]) -> Descriptor:
        if set(tensors) != {"weight"}:
            raise ValueError("an architecture that nobody knows")
        return Loader.made(tensors)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ModuleType("spandrel")
    made.__dict__["ModelLoader"] = Loader
    made.__spec__ = SimpleNamespace(name="spandrel")  # what find_spec asks of a module that is there
    monkeypatch.setitem(sys.modules, "spandrel", made)


def written(folder: Path, key: str = "weight", value: float = 1.0) -> Path:
    path = folder / "2x.safetensors"
    save_file({key: torch.tensor([value])}, path)
    return path


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.usefixtures("library")
def test_tiles_are_the_whole_and_sizes_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upscaler = load_upscaler(written(tmp_path))
    picture = noise(51, 23)
    whole = upscaler.enlarge(picture, Size(102, 46))
    assert torch.equal(to_tensor(whole)[None], (upscaler.network(to_tensor(picture)[None]) * 255).round() / 255)
    monkeypatch.setattr(upscalers, "TILE", 8)
    monkeypatch.setattr(upscalers, "MARGIN", 2)
    assert np.array_equal(upscaler.enlarge(picture, Size(102, 46)), whole)
    assert upscaler.enlarge(picture, Size(300, 64)).size == (300, 64)  # three passes, and back
    assert np.array_equal(upscaler.enlarge(picture, Size(51, 23)), picture)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("prefix", ["params_ema.", "params.", "module."])
def test_tensors_within_a_trainers_dict_are_found(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "2x.pth"
    torch.save({prefix.rstrip("."): {"weight": torch.ones(1)}}, path)
    assert load_upscaler(path).enlarge(noise(4, 4), Size(8, 8)).size == (8, 8)


@pytest.mark.usefixtures("library")
def test_what_is_no_upscaler_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceNotFound):
        load_upscaler(tmp_path / "none.pth")
    hostile = tmp_path / "hostile.pth"
    torch.save({"weight": torch.ones(1), "run": print}, hostile)
    with pytest.raises(UnsafeFile):
        load_upscaler(hostile)
    with pytest.raises(UnknownModel, match="no upscaler .an architecture that nobody knows"):
        load_upscaler(written(tmp_path, "other"))
    with pytest.raises(NonFiniteImage):
        load_upscaler(written(tmp_path, value=float("nan"))).enlarge(noise(4, 4), Size(8, 8))

    class Restoring(Descriptor):
        scale, purpose = 1, "Restoration"

    monkeypatch.setattr(Loader, "made", Restoring)
    with pytest.raises(UnknownModel, match="a network for Restoration"):
        load_upscaler(written(tmp_path))


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(RequestError, match=r"calotype\[upscale\]"):
        load_upscaler(written(tmp_path))


@pytest.mark.usefixtures("library")
def test_a_pass_is_a_start_from_the_picture_that_it_enlarges(tmp_path: Path) -> None:
    model = calotype.load()
    path = written(tmp_path)
    fields: dict[str, Any] = {"prompt": "a red apple", "seed": 3, "steps": 2}
    first = model.generate(**fields)
    assert isinstance(first, Image.Image)
    side = first.width * 3 // 2
    larger = load_upscaler(path).enlarge(first, Size(side, side))
    sized = {"input_image": larger, "width": side, "height": side, "denoising_strength": 0.4}
    by_hand = model.generate(**fields, **sized)
    at_once = model.generate(**fields, high_res=[HighRes(width=side, height=side, strength=0.4, upscaler=str(path))])
    assert np.array_equal(at_once, by_hand)
    gone = HighRes(width=side, height=side, upscaler=str(tmp_path / "gone.pth"))
    with pytest.raises(SourceNotFound):
        next(model.stream(calotype.Request(**fields, high_res=[gone])))  # before any step


def test_a_tiny_esrgan_draws_what_spandrel_draws(tmp_path: Path) -> None:
    try:
        from spandrel.architectures.ESRGAN import ESRGAN  # pyright: ignore
    except (ImportError, RuntimeError):  # torchvision for another torch raises the second
        pytest.skip("spandrel does not run here")
    torch.manual_seed(0)
    network: Any = ESRGAN(num_filters=4, num_blocks=1, scale=4)
    path = tmp_path / "4x.pth"
    torch.save({"params_ema": network.state_dict()}, path)
    picture = noise(20, 12)
    with torch.inference_mode():
        wanted = (network(to_tensor(picture)[None]).clamp(0, 1)[0] * 255).round() / 255
    assert (to_tensor(load_upscaler(path).enlarge(picture, Size(80, 48))) - wanted).abs().max() <= 1.01 / 255
