"""ControlNets of tiny random SD3 transformers, saved by diffusers: the same additions and pictures here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3ControlNetModel, SD3MultiControlNetModel, StableDiffusion3ControlNetPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from test_flux_controlnets import apart, means
from tiny_flux import randomised
from tiny_sd3 import CLIP_G, CLIP_L, POSITIONS, TEXT, build

import calotype
from calotype.control.annotators import annotate
from calotype.errors import WrongShape
from calotype.families.sd3 import Sd3Model
from calotype.families.sd3.controlnet import Sd3ControlNet
from calotype.image import to_tensor
from calotype.request import Control

__all__ = ["means"]  # hints are what the encoder says on average

PROMPT, NEGATIVE = "a red fox on the table, two cats in snow", "blue dog"
SIZE: Any = {"width": 96, "height": 64}


def controlnet(folder: Path, seed: int = 7, *, norms: bool = False, **more: Any) -> Any:  # noqa: ANN401
    fields: dict[str, Any] = {
        "sample_size": 12,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": TEXT,
        "caption_projection_dim": 64,
        "pooled_projection_dim": CLIP_L + CLIP_G,
        "pos_embed_max_size": POSITIONS,
        "qk_norm": "rms_norm" if norms else None,
        **more,
    }
    model = SD3ControlNetModel(**fields)
    randomised(model, seed, spread=0.1)
    model.save_pretrained(folder)
    return model


def picture(seed: int) -> Image.Image:
    noise = (torch.rand(8, 12, 3, generator=torch.Generator().manual_seed(seed)) * 255).byte().numpy()
    return Image.fromarray(noise).resize((SIZE["width"], SIZE["height"]), Image.Resampling.NEAREST)


def theirs(
    pipeline: Any,  # noqa: ANN401
    network: Any,  # noqa: ANN401
    image: Any,  # noqa: ANN401
    processor: VaeImageProcessor | None = None,
    **settings: Any,  # noqa: ANN401
) -> Image.Image:
    led = StableDiffusion3ControlNetPipeline(**pipeline.components, controlnet=network)
    led.image_processor = processor or led.image_processor
    led.set_progress_bar_config(disable=True)
    fields = {"num_inference_steps": 4, "guidance_scale": 4.0, "max_sequence_length": 24, **SIZE, **settings}
    noise = torch.Generator().manual_seed(5)
    return led(PROMPT, negative_prompt=NEGATIVE, control_image=image, generator=noise, **fields).images[0]


def ours(folder: Path, controls: list[Control], memory: str = "auto", **fields: Any) -> Image.Image:  # noqa: ANN401
    model = calotype.load(folder, device="cpu", memory=memory)
    asked: Any = {"seed": 5, "steps": 4, "cfg_scale": 4.0, "negative_prompt": NEGATIVE, "text_tokens": 24, **SIZE}
    drawn = model.generate(PROMPT, controls=controls, **asked | fields)
    assert isinstance(drawn, Image.Image)
    return drawn


def control(folder: Path, seed: int, kind: str = "none", **more: Any) -> Control:  # noqa: ANN401
    return Control(**{"kind": kind, "model": str(folder), "image": picture(seed), **more})


def test_one_and_two_on_every_rung(tmp_path: Path) -> None:
    pipeline = build(tmp_path / "sd3")
    a = controlnet(tmp_path / "a")
    reference = theirs(pipeline, a, picture(1), controlnet_conditioning_scale=0.7)
    led = [control(tmp_path / "a", 1, scale=0.7)]
    for memory in ("resident", "components", "stream"):
        assert apart(ours(tmp_path / "sd3", led, memory), reference) <= 1
    assert apart(ours(tmp_path / "sd3", []), reference) > 8  # it does count
    b = controlnet(tmp_path / "b", 8)
    both = theirs(
        pipeline,
        SD3MultiControlNetModel([a, b]),
        [picture(1), picture(2)],
        controlnet_conditioning_scale=[0.7, 0.4],
        control_guidance_start=[0.0, 0.25],
        control_guidance_end=[0.5, 1.0],
    )
    led = [control(tmp_path / "a", 1, scale=0.7, end=0.5), control(tmp_path / "b", 2, scale=0.4, start=0.25)]
    assert apart(ours(tmp_path / "sd3", led), both) <= 1
    reference = theirs(pipeline, a, picture(1), guidance_scale=1.0)
    assert apart(ours(tmp_path / "sd3", [control(tmp_path / "a", 1)], cfg_scale=1.0), reference) <= 1


def test_with_norms_dual_attention_and_the_pooled_text(tmp_path: Path) -> None:
    pipeline = build(tmp_path / "sd3", norms=True, dual=(0,))
    fields: Any = {"dual_attention_layers": (1,), "force_zeros_for_pooled_projection": False}
    network = controlnet(tmp_path / "a", norms=True, **fields)
    reference = theirs(pipeline, network, picture(1))
    assert apart(ours(tmp_path / "sd3", [control(tmp_path / "a", 1)]), reference) <= 1


@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_one_that_reads_no_text(memory: str, tmp_path: Path) -> None:
    """As Stability AI's for 3.5 large: noisy tokens come from the model."""
    pipeline = build(tmp_path / "sd3", norms=True)
    fields: Any = {"joint_attention_dim": None, "use_pos_embed": False, "force_zeros_for_pooled_projection": False}
    network = controlnet(tmp_path / "a", **fields)
    reference = theirs(pipeline, network, picture(1))
    assert apart(ours(tmp_path / "sd3", [control(tmp_path / "a", 1)], memory), reference) <= 1


class CannyProcessor(VaeImageProcessor):
    """What the model card of Stability AI's canny ControlNet puts in the place of the pipeline's own."""

    def __init__(self) -> None:
        super().__init__(do_normalize=False)

    def preprocess(self, image: Any, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().preprocess(image, **options) * 255 * 0.5 + 0.5

    def postprocess(self, image: Any, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().postprocess(image, **options, do_denormalize=[True] * len(image))


def test_the_one_for_canny_that_reads_no_text_sees_it_as_its_authors_gave_it(tmp_path: Path) -> None:
    pipeline = build(tmp_path / "sd3", norms=True)
    fields: Any = {"joint_attention_dim": None, "use_pos_embed": False, "force_zeros_for_pooled_projection": False}
    network = controlnet(tmp_path / "a", **fields)
    edges = annotate("canny", picture(1), low=10, high=40)
    reference = theirs(pipeline, network, edges, processor=CannyProcessor())
    led = control(tmp_path / "a", 1, "none:canny", image=edges)
    assert apart(ours(tmp_path / "sd3", [led]), reference) <= 1
    drawn = control(tmp_path / "a", 1, "canny")
    assert apart(ours(tmp_path / "sd3", [replace(led, kind="none")]), reference) > 8
    assert apart(ours(tmp_path / "sd3", [replace(led, kind="none:depth")]), theirs(pipeline, network, edges)) <= 1
    reference = theirs(pipeline, network, annotate("canny", picture(1)), processor=CannyProcessor())
    assert apart(ours(tmp_path / "sd3", [drawn]), reference) <= 1
    other = controlnet(tmp_path / "b")  # InstantX's sees all kinds alike
    led = replace(led, model=str(tmp_path / "b"))
    assert apart(ours(tmp_path / "sd3", [led]), theirs(pipeline, other, edges)) <= 1


def test_one_for_inpainting(tmp_path: Path) -> None:
    """alimama's: the mask, 1 where the picture is kept, stands behind the latents of what it leaves."""
    build(tmp_path / "sd3")
    network = controlnet(tmp_path / "a", extra_conditioning_channels=1)
    loaded = calotype.load(tmp_path / "sd3", device="cpu")
    family, mine = loaded.family, loaded.load_control(tmp_path / "a")
    assert isinstance(family, Sd3Model)
    assert isinstance(mine, Sd3ControlNet)
    mask = torch.zeros(1, 1, 64, 96)
    mask[..., :40] = 1
    pixels = to_tensor(picture(1))[None]
    rng = torch.Generator().manual_seed(2)
    x, text = torch.randn(1, 16, 8, 12, generator=rng), torch.randn(1, 20, TEXT, generator=rng)
    pooled = torch.randn(1, CLIP_L + CLIP_G, generator=rng)
    with torch.inference_mode():
        seen = family.seen_by(mine, pixels, mask)
        assert torch.equal(seen[:, :16], family.encode(pixels * (mask == 0)))
        assert torch.equal(seen[0, 16], 1 - mask[0, 0, ::8, ::8])
        prepared = mine.prepare_hinted(text, pooled, torch.tensor([0.9, 0.4]), 4, 6)
        made = mine(x, prepared, 1, mine.embed(seen), 0.5)
        wanted = network(
            hidden_states=x,
            controlnet_cond=seen,
            conditioning_scale=0.5,
            encoder_hidden_states=text,
            pooled_projections=0 * pooled,
            timestep=torch.tensor([400.0]),
            return_dict=False,
        )[0]
    for a, b in zip(made, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_one_of_another_size_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "sd3")
    controlnet(tmp_path / "wide", num_attention_heads=5, caption_projection_dim=80)
    with pytest.raises(WrongShape, match="no family here: tokens of width 80, where the transformer has 64"):
        ours(tmp_path / "sd3", [control(tmp_path / "wide", 1)])
