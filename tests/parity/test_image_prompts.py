"""IP-Adapters of tiny random UNets: the same pictures as diffusers', and transformers' image encoder layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_unets import NEGATIVE, PROMPT, SIZE, assert_near, assert_same
from tiny_image_prompts import SIDE, adapter, encoder
from tiny_unets import sd1, sdxl
from transformers import CLIPImageProcessor

import calotype
from calotype.checkpoint.image_prompts import VISION, found_in
from calotype.checkpoint.sources import open_source
from calotype.control.image_prompts import pixels
from calotype.nn.vision import VisionEncoder
from calotype.request import ImagePrompt


def picture(seed: int, width: int = 40, height: int = 31) -> Image.Image:
    rng = torch.Generator().manual_seed(seed)
    noise = (torch.rand(6, 8, 3, generator=rng) * 255).byte().numpy()
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def theirs(
    pipeline: Any,  # noqa: ANN401
    files: list[Path],
    images: list[Image.Image],
    scales: list[float],
    **more: Any,  # noqa: ANN401
) -> Image.Image:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_ip_adapter(
        [str(file.parent) for file in files], subfolder="", weight_name=[file.name for file in files]
    )
    pipeline.set_ip_adapter_scale(scales)
    fields = {"num_inference_steps": 6, "guidance_scale": 4.0, "negative_prompt": NEGATIVE, **SIZE, **more}
    drawn = pipeline(PROMPT, generator=torch.Generator().manual_seed(5), ip_adapter_image=images, **fields)
    return drawn.images[0]


def ours(folder: Path, prompts: list[ImagePrompt], memory: str = "auto", **fields: Any) -> Image.Image:  # noqa: ANN401
    asked = {"steps": 6, "cfg_scale": 4.0, "negative_prompt": NEGATIVE, **SIZE, **fields}
    drawn = calotype.load(folder, device="cpu", memory=memory).generate(PROMPT, seed=5, image_prompts=prompts, **asked)
    assert isinstance(drawn, Image.Image)
    return drawn


@pytest.mark.parametrize(
    ("family", "kind", "ending"),
    [
        ("sd1", "base", "bin"),
        ("sd1", "plus", "safetensors"),
        ("sd1", "full", "bin"),
        ("sdxl", "base", "safetensors"),
        ("sdxl", "plus", "bin"),
    ],
)
def test_pictures(family: str, kind: str, ending: str, tmp_path: Path) -> None:
    pipeline = (sd1 if family == "sd1" else sdxl)(tmp_path / "model")
    more = {"tokens": 6} if kind == "plus" else {}
    file = adapter(tmp_path / f"ip-adapter.{ending}", pipeline.unet, kind=kind, **more)
    encoder(tmp_path / "image_encoder")
    prompt = ImagePrompt(file, picture(1), scale=0.7)
    got = ours(tmp_path / "model", [prompt])
    assert_same(got, theirs(pipeline, [file], [picture(1)], [0.7]))
    plain = ours(tmp_path / "model", [])
    with pytest.raises(AssertionError):
        assert_same(got, plain)  # it does count
    assert ours(tmp_path / "model", [ImagePrompt(file, picture(1), scale=0)]).tobytes() == plain.tobytes()


def test_two_at_once_and_one_pass(tmp_path: Path) -> None:
    pipeline = sd1(tmp_path / "model")
    encoder(tmp_path / "image_encoder")
    base = adapter(tmp_path / "base.safetensors", pipeline.unet, kind="base")
    plus = adapter(tmp_path / "plus.bin", pipeline.unet, kind="plus", seed=31)
    prompts = [ImagePrompt(base, picture(1), 0.7), ImagePrompt(plus, picture(2, 31, 50), 0.4)]
    reference = theirs(pipeline, [base, plus], [picture(1), picture(2, 31, 50)], [0.7, 0.4])
    for memory in ("resident", "components", "stream"):
        assert_same(ours(tmp_path / "model", prompts, memory), reference)
    pipeline.unload_ip_adapter()
    reference = theirs(pipeline, [base], [picture(1)], [0.7], guidance_scale=1.0)
    assert_same(ours(tmp_path / "model", prompts[:1], cfg_scale=1.0), reference)


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_the_image_encoder(act: str, tmp_path: Path) -> None:
    net = encoder(tmp_path, hidden_act=act)
    group = open_source(tmp_path).groups[0]
    found = found_in(group.weights, group.settings, VISION)
    assert found is not None
    mine, binding = found.bind(found.config())
    assert isinstance(mine, VisionEncoder)
    mine.load_state_dict(binding.load(found.weights, torch.float32, mapped=False), assign=True)
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        states, reference = mine(x), net(x, output_hidden_states=True)
    assert_near(states.penultimate, reference.hidden_states[-2])
    assert_near(states.embedding, reference.image_embeds)


@pytest.mark.parametrize("size", [(40, 31), (31, 40), (300, 225), (17, 17), (500, 100)])
@pytest.mark.parametrize("side", [28, 224])
def test_what_it_is_shown(size: tuple[int, int], side: int) -> None:
    shown = picture(3, *size)
    wanted = CLIPImageProcessor(size=side, crop_size=side)(shown, return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels(shown, side), wanted, atol=1e-5, rtol=0)
