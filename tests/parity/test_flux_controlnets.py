"""ControlNets of tiny random FLUX transformers, saved by diffusers: the same additions and pictures here."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxMultiControlNetModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_flux import build, randomised

import calotype
from calotype.control.hints import Hint
from calotype.errors import RequestError, WrongShape
from calotype.families.flux import FluxModel
from calotype.families.flux.controlnet import FluxControlNet
from calotype.image import to_tensor
from calotype.request import Control

PROMPT = "a red fox in the snow"
SIZE: Any = {"width": 64, "height": 48}


@pytest.fixture(autouse=True)
def means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hints are what the encoder says on average, and not drawn at random around it, as diffusers does here."""

    def sample(self: DiagonalGaussianDistribution, generator: Any = None) -> torch.Tensor:
        return self.mode()

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", sample)


def controlnet(folder: Path, seed: int = 7, *, joint: int = 2, single: int = 3, **more: Any) -> Any:  # noqa: ANN401
    fields: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": joint,
        "num_single_layers": single,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
        "axes_dims_rope": (8, 12, 12),
        **more,
    }
    model = FluxControlNetModel(**fields)
    randomised(model, seed, spread=0.1)
    model.save_pretrained(folder)
    return model


def picture(seed: int) -> Image.Image:
    noise = (torch.rand(6, 8, 3, generator=torch.Generator().manual_seed(seed)) * 255).byte().numpy()
    return Image.fromarray(noise).resize((SIZE["width"], SIZE["height"]), Image.Resampling.NEAREST)


def theirs(pipeline: Any, network: Any, image: Any, **settings: Any) -> Image.Image:  # noqa: ANN401
    led = FluxControlNetPipeline(**pipeline.components, controlnet=network)
    led.set_progress_bar_config(disable=True)
    fields = {"num_inference_steps": 4, "guidance_scale": 3.5, "max_sequence_length": 16, **SIZE, **settings}
    noise = torch.Generator().manual_seed(5)
    return led(PROMPT, control_image=image, generator=noise, **fields).images[0]


def ours(folder: Path, controls: list[Control], memory: str = "auto", **fields: Any) -> Image.Image:  # noqa: ANN401
    model = calotype.load(folder, device="cpu", memory=memory)
    drawn = model.generate(PROMPT, seed=5, steps=4, text_tokens=16, controls=controls, **{**SIZE, **fields})
    assert isinstance(drawn, Image.Image)
    return drawn


def apart(a: Image.Image, b: Image.Image) -> int:
    return int(abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


def control(folder: Path, seed: int, kind: str = "none", **more: Any) -> Control:  # noqa: ANN401
    return Control(kind=kind, model=str(folder), image=picture(seed), **more)


def test_one_and_two_on_every_rung(tmp_path: Path) -> None:
    pipeline = build(tmp_path / "flux", guidance=True)
    a = controlnet(tmp_path / "a")
    reference = theirs(pipeline, a, picture(1), controlnet_conditioning_scale=0.7)
    led = [control(tmp_path / "a", 1, scale=0.7)]
    for memory in ("resident", "components", "stream"):
        assert apart(ours(tmp_path / "flux", led, memory), reference) <= 1
    assert apart(ours(tmp_path / "flux", []), reference) > 8  # it does count
    b = controlnet(tmp_path / "b", 8)
    both = theirs(
        pipeline,
        FluxMultiControlNetModel([a, b]),
        [picture(1), picture(2)],
        controlnet_conditioning_scale=[0.7, 0.4],
        control_guidance_start=[0.0, 0.25],
        control_guidance_end=[0.5, 1.0],
    )
    led = [control(tmp_path / "a", 1, scale=0.7, end=0.5), control(tmp_path / "b", 2, scale=0.4, start=0.25)]
    assert apart(ours(tmp_path / "flux", led), both) <= 1


def test_fewer_blocks_than_the_model_has(tmp_path: Path) -> None:
    pipeline = build(tmp_path / "flux", guidance=True)
    some = controlnet(tmp_path / "some", joint=1, single=2)
    reference = theirs(pipeline, some, picture(1))
    assert apart(ours(tmp_path / "flux", [control(tmp_path / "some", 1)]), reference) <= 1
    joint_only = controlnet(tmp_path / "joint", joint=2, single=0, guidance_embeds=False)
    reference = theirs(pipeline, joint_only, picture(1))
    assert apart(ours(tmp_path / "flux", [control(tmp_path / "joint", 1)]), reference) <= 1


@pytest.mark.parametrize(("kind", "number"), [("none:canny", 0), ("none:depth", 2), ("none:lq", 6)])
def test_a_union_is_told_what_it_sees(kind: str, number: int, tmp_path: Path) -> None:
    pipeline = build(tmp_path / "flux", guidance=True)
    union = controlnet(tmp_path / "union", num_mode=7)
    reference = theirs(pipeline, union, picture(1), control_mode=number)
    assert apart(ours(tmp_path / "flux", [control(tmp_path / "union", 1, kind)]), reference) <= 1
    with pytest.raises(RequestError, match="none:KIND"):
        ours(tmp_path / "flux", [control(tmp_path / "union", 1, "none")])


def test_with_a_negative_prompt_a_controlnet_reads_what_the_side_reads_that_it_leads(tmp_path: Path) -> None:
    """Where diffusers lets it read the prompt on both: one that reads nothing gives the same picture."""
    pipeline = build(tmp_path / "flux", guidance=True)
    network = controlnet(tmp_path / "a", 8)
    words: Any = {"negative_prompt": "blue dog", "cfg_scale": 2.0}
    theirs_of = partial(theirs, pipeline, network, picture(1), true_cfg_scale=2.0, negative_prompt="blue dog")
    reading = ours(tmp_path / "flux", [control(tmp_path / "a", 1)], **words)
    assert apart(reading, theirs_of()) > 8
    with torch.no_grad():
        for layer in (network.context_embedder, network.time_text_embed.text_embedder.linear_2):
            layer.weight.zero_()
            layer.bias.zero_()
    network.save_pretrained(tmp_path / "blind")
    assert apart(ours(tmp_path / "flux", [control(tmp_path / "blind", 1)], **words), theirs_of()) <= 1
    model = calotype.load(tmp_path / "flux", device="cpu")
    family, mine = model.family, model.load_control(tmp_path / "a")
    assert isinstance(family, FluxModel)
    request = calotype.Request(prompt=PROMPT, seed=5, steps=4, text_tokens=16, **SIZE)
    job = request.complete(family.defaults, 5, {})
    with torch.inference_mode():
        sides = [family.condition(text, job, negative=text != PROMPT) for text in (PROMPT, "blue dog")]
        levels = family.levels(job).path[:2]
        hint = Hint(network=mine, picture=family.encode(to_tensor(picture(1))[None]))
        x = torch.randn(1, *family.noise_shape(job), generator=torch.Generator().manual_seed(1))
        both = family.joined(sides)
        assert both is not None
        rows = family.denoiser(both, levels, [job, job], hints=[hint])(x, levels[1])
        for row, side in zip(rows, sides, strict=True):
            alone = family.denoiser(side, levels, [job], hints=[hint])(x, levels[1])
            torch.testing.assert_close(row[None], alone, atol=1e-4, rtol=1e-4)


def test_one_for_inpainting_sees_what_the_mask_leaves(tmp_path: Path) -> None:
    """alimama's layout: 4 more numbers in each token of the hint, the mask's."""
    build(tmp_path / "flux", guidance=True)
    model = controlnet(tmp_path / "a", single=0)
    state = load_file(tmp_path / "a" / "diffusion_pytorch_model.safetensors")
    rng = torch.Generator().manual_seed(1)
    state["controlnet_x_embedder.weight"] = 0.1 * torch.randn(64, 20, generator=rng)
    save_file(state, tmp_path / "a" / "diffusion_pytorch_model.safetensors")
    settings = json.loads((tmp_path / "a" / "config.json").read_text()) | {"extra_condition_channels": 4}
    (tmp_path / "a" / "config.json").write_text(json.dumps(settings))
    loaded = calotype.load(tmp_path / "flux", device="cpu")
    family, network = loaded.family, loaded.load_control(tmp_path / "a")
    assert isinstance(network, FluxControlNet)
    assert network.sees == "masked"
    mask = torch.zeros(1, 1, 48, 64)
    mask[..., :24] = 1
    pixels = to_tensor(picture(1))[None]
    with torch.inference_mode():
        seen = family.seen_by(network, pixels, mask)
        kept = family.encode(pixels * (mask == 0))
    assert torch.equal(seen[:, :4], kept)
    assert torch.equal(seen[0, 4], 1 - mask[0, 0, ::8, ::8])
    tokens = seen.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(1, 12, 20)
    wanted = tokens @ state["controlnet_x_embedder.weight"].T + model.controlnet_x_embedder.bias
    torch.testing.assert_close(network.embed(tokens), wanted)
    led = [Control(kind="none", model=str(tmp_path / "a"))]
    fields: Any = {"input_image": picture(1), "denoising_strength": 1.0}
    box = Image.new("L", (64, 48), 0)
    box.paste(255, (0, 0, 24, 48))
    masked = ours(tmp_path / "flux", led, mask_image=box, **fields)
    assert apart(masked, ours(tmp_path / "flux", [], mask_image=box, **fields)) > 4
    with pytest.raises(RequestError, match="mask_image.*inpainting"):
        ours(tmp_path / "flux", led, **fields)


def test_one_of_another_size_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "flux", guidance=True)
    controlnet(tmp_path / "wide", joint_attention_dim=64)
    with pytest.raises(WrongShape, match="no family here: text of width 64, where the transformer has 48"):
        ours(tmp_path / "flux", [control(tmp_path / "wide", 1)])


def test_tiles_are_led_by_their_part_of_the_hint(tmp_path: Path) -> None:
    build(tmp_path / "flux", guidance=True)
    controlnet(tmp_path / "a")
    fields: Any = {"width": 128, "height": 48, "tiled": True, "tile_size": 64, "tile_stride": 64}
    wide = Image.new("RGB", (128, 48))
    wide.paste(picture(1), (0, 0))
    wide.paste(picture(2), (64, 0))
    led = [Control(kind="none", model=str(tmp_path / "a"), image=wide)]
    other = [Control(kind="none", model=str(tmp_path / "a"), image=wide.transpose(Image.Transpose.FLIP_LEFT_RIGHT))]
    assert apart(ours(tmp_path / "flux", led, **fields), ours(tmp_path / "flux", other, **fields)) > 8
