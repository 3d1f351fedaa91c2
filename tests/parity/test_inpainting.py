"""Inpainting, with models made for it and with others, against diffusers' pipelines for it, on tiny random ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_flux
import tiny_sd3
import tiny_unets
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FluxFillPipeline,
    FluxInpaintPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image, ImageDraw

import calotype
from calotype.errors import RequestError
from calotype.generate import Picture, stream
from calotype.image import filled, mask_tensor, to_tensor
from calotype.request import Request

PROMPT = "a red fox on the table"
SIDE, STEPS, SEED = 64, 3, 3


@pytest.fixture
def picture(mask: Image.Image) -> Image.Image:
    """The mask's place is what it would be filled with, to have the references encode the same."""
    small = np.random.default_rng(5).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    large = Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return filled(large, mask)


@pytest.fixture
def mask() -> Image.Image:
    """On the grid of latents: what is between is a matter of taste."""
    made = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(made).rectangle((0, 16, 31, 63), fill=255)
    return made


@pytest.fixture(autouse=True)
def middle_of_the_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The references draw latents from the autoencoder's spread; we take its middle, as DiffSynth-Studio does."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


def ours(folder: Path, picture: Image.Image, mask: Image.Image, **fields: Any) -> np.ndarray:
    model = calotype.load(folder, device="cpu", dtype="float32")
    size = {"width": SIDE, "height": SIDE}
    chosen = {"cfg_scale": 3.0} | size | fields
    drawn = model.generate(PROMPT, seed=SEED, steps=STEPS, input_image=picture, mask_image=mask, **chosen)
    return np.asarray(drawn, dtype=int)


def theirs(pipeline: Any, picture: Image.Image, mask: Image.Image, **settings: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    chosen = {"num_inference_steps": STEPS} | settings
    drawn = pipeline(
        PROMPT,
        image=picture,
        mask_image=mask,
        height=SIDE,
        width=SIDE,
        generator=torch.Generator().manual_seed(SEED),
        **chosen,
    ).images[0]
    return np.asarray(drawn, dtype=int)


def assert_same(mine: np.ndarray, peer: np.ndarray, without_mask: np.ndarray) -> None:
    assert abs(mine - peer).max() <= 1
    assert abs(without_mask - peer)[:, 32:].max() > 20  # it is the mask that makes them the same


def test_flux(tmp_path: Path, picture: Image.Image, mask: Image.Image) -> None:
    pipeline = FluxInpaintPipeline(**tiny_flux.build(tmp_path, guidance=True).components)
    fields = {"text_tokens": 16, "embedded_guidance": 3.5, "cfg_scale": 1.0}
    peer = theirs(pipeline, picture, mask, strength=1.0, guidance_scale=3.5, max_sequence_length=16)
    assert_same(ours(tmp_path, picture, mask, **fields), peer, ours(tmp_path, picture, white(), **fields))


def test_stable_diffusion_3(tmp_path: Path, picture: Image.Image, mask: Image.Image) -> None:
    """The reference leaves out the autoencoder's shift when it decodes (in 0.42.1): it is put back here."""
    pipeline = StableDiffusion3InpaintPipeline(**tiny_sd3.build(tmp_path).components)
    decode, shift = pipeline.vae.decode, pipeline.vae.config.shift_factor
    pipeline.vae.decode = lambda latents, **more: decode(latents + shift, **more)
    fields = {"text_tokens": 16}
    peer = theirs(pipeline, picture, mask, strength=1.0, guidance_scale=3.0, max_sequence_length=16)
    assert_same(ours(tmp_path, picture, mask, **fields), peer, ours(tmp_path, picture, white(), **fields))


PROCESS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FROM_NOISE = {
    "sd1": DDIMScheduler(**PROCESS, clip_sample=False, timestep_spacing="trailing"),
    "sd1, leading": EulerDiscreteScheduler(**PROCESS, timestep_spacing="leading", steps_offset=1),
    "sdxl": EulerDiscreteScheduler(**PROCESS, timestep_spacing="leading", steps_offset=1),
}


@pytest.mark.parametrize("name", FROM_NOISE)
def test_noise_alone_where_the_mask_is(tmp_path: Path, picture: Image.Image, mask: Image.Image, name: str) -> None:
    """At strength 1, for processes whose noisiest level holds some of the picture.

    The references begin with noise alone also where the picture is kept, and put that back after the first step; here
    it is there from the start, as at all other levels. What they begin with is made so.
    """
    scheduler = FROM_NOISE[name]
    if name == "sdxl":
        built = tiny_unets.sdxl(tmp_path, scheduler)
        parts = {part: value for part, value in built.components.items() if part != "image_encoder"}
        pipeline = StableDiffusionXLInpaintPipeline(**parts)
    else:
        pipeline = StableDiffusionInpaintPipeline(
            **tiny_unets.sd1(tmp_path, scheduler).components, requires_safety_checker=False
        )
    prepare: Any = pipeline.prepare_latents

    def prepared(*given: Any, **settings: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        begun, noise, known = prepare(*given, **settings)
        hidden = mask_tensor(mask, *begun.shape[2:])
        kept = pipeline.scheduler.add_noise(known, noise, pipeline.scheduler.timesteps[:1])
        return kept.lerp(begun, hidden), noise, known

    pipeline.prepare_latents = prepared
    peer = theirs(pipeline, picture, mask, strength=1.0, guidance_scale=3.0)
    assert_same(ours(tmp_path, picture, mask), peer, ours(tmp_path, picture, white()))
    other = picture.copy()
    other.paste((0, 0, 255), (8, 24, 24, 56))
    assert np.array_equal(ours(tmp_path, other, mask), ours(tmp_path, picture, mask))


def test_sdxl(tmp_path: Path, picture: Image.Image, mask: Image.Image) -> None:
    """At half strength, over the same levels: the reference takes the second half of those that it is given."""
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    built = tiny_unets.sdxl(tmp_path, scheduler)
    parts = {name: part for name, part in built.components.items() if name not in ("image_encoder",)}
    pipeline = StableDiffusionXLInpaintPipeline(**parts)
    family = calotype.load(tmp_path, device="cpu").family
    request = Request(prompt=PROMPT, width=SIDE, height=SIDE, steps=STEPS, input_image=picture, denoising_strength=0.5)
    path = family.levels(request.complete(family.defaults, seed=0, opened={"input_image": picture})).path
    times = [level.time for level in path[:-1]]
    peer = theirs(
        pipeline,
        picture,
        mask,
        strength=0.5,
        num_inference_steps=2 * STEPS,
        timesteps=[*range(999, 999 - STEPS, -1), *map(int, times)],
        guidance_scale=3.0,
    )
    fields = {"denoising_strength": 0.5}
    assert_same(ours(tmp_path, picture, mask, **fields), peer, ours(tmp_path, picture, white(), **fields))


def test_a_unet_that_takes_the_mask(tmp_path: Path, picture: Image.Image, mask: Image.Image) -> None:
    """Stable Diffusion 1.x with nine channels."""
    built = tiny_unets.sd1(tmp_path, DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False), in_channels=9)
    pipeline = StableDiffusionInpaintPipeline(**built.components, requires_safety_checker=False)
    peer = theirs(pipeline, picture, mask, strength=1.0, guidance_scale=3.0)
    for batched in (True, False):
        model = calotype.load(tmp_path, device="cpu", dtype="float32")
        assert model.name == "sd1/inpainting"
        request = Request(
            prompt=PROMPT, seed=SEED, steps=STEPS, input_image=picture, mask_image=mask, cfg_scale=3.0, width=SIDE,
            height=SIDE,
        )  # fmt: skip
        *_, last = stream(model.family, request, batched_guidance=batched)
        assert isinstance(last, Picture)
        assert_same(np.asarray(last.image, dtype=int), peer, ours(tmp_path, picture, white()))


def test_a_thin_place_is_drawn_too(tmp_path: Path, picture: Image.Image) -> None:
    """The references look at every eighth pixel of a mask, and may miss all of it without a word."""
    tiny_unets.sd1(tmp_path, DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False), in_channels=9)
    thin = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(thin).rectangle((3, 0, 5, SIDE), fill=255)
    family = calotype.load(tmp_path).family
    beside = family.beside(to_tensor(picture)[None], mask_tensor(thin, SIDE, SIDE))
    assert beside[0, 0, :, 0].min() == 1
    assert beside[0, 0, :, 1:].max() == 0
    with pytest.raises(RequestError, match="mask_image: .*half white somewhere"):
        ours(tmp_path, picture, Image.new("L", (SIDE, SIDE), 100))


def test_flux_fill(tmp_path: Path, picture: Image.Image, mask: Image.Image) -> None:
    built = tiny_flux.build(tmp_path, guidance=True, beside=16 + 4 * 64)
    unused = ("image_encoder", "feature_extractor")
    pipeline = FluxFillPipeline(**{name: part for name, part in built.components.items() if name not in unused})
    peer = theirs(pipeline, picture, mask, guidance_scale=30.0, max_sequence_length=16)
    fields = {"text_tokens": 16, "embedded_guidance": 30.0, "cfg_scale": 1.0}
    assert calotype.load(tmp_path).name == "flux/fill-dev"
    assert_same(ours(tmp_path, picture, mask, **fields), peer, ours(tmp_path, picture, white(), **fields))


def white() -> Image.Image:
    return Image.new("L", (SIDE, SIDE), 255)


def test_a_controlnet_that_is_shown_what_the_mask_leaves(
    tmp_path: Path, picture: Image.Image, mask: Image.Image
) -> None:
    """ControlNet 1.1's, beside a UNet that takes the mask too; the peer is given what its docs make."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    built = tiny_unets.sd1(tmp_path / "sd1", scheduler, in_channels=9)
    network = ControlNetModel.from_unet(
        tiny_unets.unet(sdxl=False), conditioning_embedding_out_channels=(8, 12, 16, 24)
    )
    tiny_flux.randomised(network, 7, spread=0.12)
    network.save_pretrained(tmp_path / "control")
    pipeline = StableDiffusionControlNetInpaintPipeline(
        **built.components, controlnet=network, requires_safety_checker=False
    )
    shown = torch.tensor(np.asarray(picture)).movedim(2, 0)[None] / 255
    shown[:, :, np.asarray(mask) > 127] = -1
    peer = theirs(
        pipeline,
        picture,
        mask,
        strength=1.0,
        guidance_scale=3.0,
        control_image=shown,
        controlnet_conditioning_scale=1.0,
    )
    led = {"controls": [{"kind": "inpaint", "model": str(tmp_path / "control")}]}
    mine = ours(tmp_path / "sd1", picture, mask, **led)
    assert_same(mine, peer, ours(tmp_path / "sd1", picture, white(), **led))
    with pytest.raises(RequestError, match="this one was made for inpainting"):
        calotype.load(tmp_path / "sd1").generate(PROMPT, input_image=picture, **led)
