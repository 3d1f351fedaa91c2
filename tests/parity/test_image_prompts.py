"""IP-Adapters of tiny random UNets: the same pictures as diffusers', and transformers' image encoder layer by layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline
from PIL import Image
from test_controlnets import controlnet
from test_unets import NEGATIVE, PROMPT, SIZE, assert_near, assert_same
from tiny_image_prompts import SIDE, adapter, encoder
from tiny_unets import sd1, sdxl
from transformers import CLIPImageProcessor

import calotype
from calotype.checkpoint.image_prompts import VISION, found_in
from calotype.checkpoint.sources import open_source
from calotype.control.image_prompts import pixels
from calotype.nn.vision import VisionEncoder
from calotype.request import Control, HighRes, ImagePrompt, Region


def picture(seed: int, width: int = 40, height: int = 31) -> Image.Image:
    rng = torch.Generator().manual_seed(seed)
    noise = (torch.rand(6, 8, 3, generator=rng) * 255).byte().numpy()
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def theirs(
    pipeline: Any,  # noqa: ANN401
    files: list[Path],
    images: list[Any],
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


@pytest.mark.parametrize(("family", "kind"), [("sd1", "base"), ("sd1", "plus"), ("sdxl", "plus"), ("sdxl", "full")])
def test_several_pictures_of_one_adapter_share_its_attention(family: str, kind: str, tmp_path: Path) -> None:
    pipeline = (sd1 if family == "sd1" else sdxl)(tmp_path / "model")
    encoder(tmp_path / "image_encoder")
    file = adapter(tmp_path / "one.bin", pipeline.unet, kind=kind)
    base = adapter(tmp_path / "base.safetensors", pipeline.unet, kind="base", seed=31)
    pictures = [picture(1), picture(2, 31, 50), picture(3)]
    prompts = [ImagePrompt(file, each, 0.7) for each in pictures]
    beside = ImagePrompt(base, picture(4), 0.4)
    reference = theirs(pipeline, [file, base], [pictures, [picture(4)]], [0.7, 0.4])
    got = ours(tmp_path / "model", [prompts[0], beside, *prompts[1:]])
    assert_same(got, reference)
    # Of another scale, one is read by itself.
    apart = ours(tmp_path / "model", [prompts[0], beside, replace(prompts[1], scale=0.69), prompts[2]])
    with pytest.raises(AssertionError):
        assert_same(apart, reference)
    # Twice the same picture is that picture: their attention is one.
    assert_same(ours(tmp_path / "model", [prompts[0]] * 2), ours(tmp_path / "model", prompts[:1]))


def test_with_all_that_a_request_may_have(tmp_path: Path) -> None:
    """A region that is everywhere, with the same words, and tiles as large as the picture change nothing."""
    pipeline = sd1(tmp_path / "model")
    prompt = ImagePrompt(adapter(tmp_path / "ip.bin", pipeline.unet, kind="base"), picture(1), scale=0.7)
    encoder(tmp_path / "image_encoder")
    plain = ours(tmp_path / "model", [prompt])
    everywhere = Region(prompt=PROMPT, mask=Image.new("L", (8, 8), 255), scale=2.0)
    assert_same(ours(tmp_path / "model", [prompt], regions=[everywhere]), plain)
    assert_same(ours(tmp_path / "model", [prompt], tiled=True, tile_size=96), plain)
    controlnet(tmp_path / "control", sdxl=False)
    more: dict[str, Any] = {
        "tiled": True,
        "tile_size": 64,
        "tile_stride": 64,
        "regions": [everywhere],
        "high_res": [HighRes(width=128, height=64, steps=1)],
        "steps": 1,
        "controls": [Control(kind="none", model=str(tmp_path / "control"), image=picture(2))],
    }
    assert ours(tmp_path / "model", [prompt], **more).tobytes() != ours(tmp_path / "model", [], **more).tobytes()


def test_with_a_controlnet(tmp_path: Path) -> None:
    """Which reads text alone, as diffusers has it."""
    parts = sd1(tmp_path / "model").components
    net = controlnet(tmp_path / "control", sdxl=False)
    pipeline = StableDiffusionControlNetPipeline(**parts, controlnet=net, requires_safety_checker=False)
    file = adapter(tmp_path / "ip.bin", pipeline.unet, kind="base")
    encoder(tmp_path / "image_encoder")
    hint = picture(2, SIZE["width"], SIZE["height"])
    reference = theirs(pipeline, [file], [picture(1)], [0.7], image=hint, controlnet_conditioning_scale=0.6)
    control = Control(kind="none", model=str(tmp_path / "control"), image=hint, scale=0.6)
    assert_same(ours(tmp_path / "model", [ImagePrompt(file, picture(1), 0.7)], controls=[control]), reference)


def test_what_was_drawn_can_be_drawn_again(tmp_path: Path) -> None:
    pipeline = sd1(tmp_path / "model")
    file = adapter(tmp_path / "ip.bin", pipeline.unet, kind="base")
    encoder(tmp_path / "elsewhere")
    picture(1).save(tmp_path / "shown.png")
    model = calotype.load(tmp_path / "model", device="cpu")
    prompt = ImagePrompt(file, tmp_path / "shown.png", 0.5, encoder=tmp_path / "elsewhere")
    drawn = model.generate(PROMPT, seed=5, steps=2, **SIZE, image_prompts=[prompt])
    assert isinstance(drawn, Image.Image)
    calotype.save(drawn, tmp_path / "drawn.png")
    request, _ = calotype.read_metadata(tmp_path / "drawn.png")
    assert request.image_prompts == (replace(prompt, image=str(tmp_path / "shown.png")),)
    again = model.generate(request)
    assert isinstance(again, Image.Image)
    assert again.tobytes() == drawn.tobytes()


def test_the_networks_run_once_for_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of steps, passes, tiles and pictures; and one encoder serves two adapters."""
    pipeline = sd1(tmp_path / "model")
    encoder(tmp_path / "image_encoder")
    files = [adapter(tmp_path / f"{kind}.bin", pipeline.unet, kind=kind) for kind in ("base", "plus")]
    seen: list[object] = []
    forward = VisionEncoder.forward
    monkeypatch.setattr(VisionEncoder, "forward", lambda net, x: (seen.append(net), forward(net, x))[1])
    model = calotype.load(tmp_path / "model", device="cpu")
    prompts = [ImagePrompt(file, picture(1)) for file in files]
    fields = {"tiled": True, "tile_size": 64, "tile_stride": 64, "high_res": [HighRes(width=128, height=64)]}
    for seed in (1, 2):
        model.generate(PROMPT, seed=seed, count=2, steps=1, width=64, height=64, image_prompts=prompts, **fields)
    assert len(seen) == 2
    assert len(set(seen)) == 1


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
