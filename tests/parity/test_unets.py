"""Tiny random Stable Diffusion and SDXL pipelines, saved by diffusers: the same layers and pictures here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from tiny_unets import LENGTH, SCHEDULE, sd1, sdxl, vae
from torch import Tensor

import calotype
from calotype.families.sd1 import Sd1Model
from calotype.families.sdxl import SdxlModel
from calotype.families.unets import with_sizes

PROMPT, NEGATIVE = "a red fox on the table", "blue dog"
SIZE = {"width": 96, "height": 64}

SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "ddim-v-zero-snr-trailing": DDIMScheduler(
        **SCHEDULE,
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ),
    "ddim-linspace": DDIMScheduler(**SCHEDULE, clip_sample=False, timestep_spacing="linspace"),
    "pndm": PNDMScheduler(**SCHEDULE, skip_prk_steps=True, steps_offset=1),
    "euler": EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1),
    "euler-linspace": EulerDiscreteScheduler(**SCHEDULE),
    "euler-karras": EulerDiscreteScheduler(**SCHEDULE, use_karras_sigmas=True),
    "euler-v": EulerDiscreteScheduler(**SCHEDULE, prediction_type="v_prediction", timestep_spacing="trailing"),
    "euler-v-zero-snr": EulerDiscreteScheduler(
        **SCHEDULE, prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
    ),
    "euler-ancestral": EulerAncestralDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"),
    "dpmpp-2m": DPMSolverMultistepScheduler(**SCHEDULE),
    "dpmpp-2m-karras": DPMSolverMultistepScheduler(**SCHEDULE, use_karras_sigmas=True),
    "dpmpp-2m-leading": DPMSolverMultistepScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1),
    "dpmpp-2m-v": DPMSolverMultistepScheduler(
        **SCHEDULE, prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
    ),
    "dpmpp-2m-sde": DPMSolverMultistepScheduler(**SCHEDULE, algorithm_type="sde-dpmsolver++"),
    "unipc": UniPCMultistepScheduler(**SCHEDULE),
    "heun": HeunDiscreteScheduler(**SCHEDULE),
}


def theirs(pipeline: Any, *, seed: int = 5, **settings: object) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return pipeline(PROMPT, generator=generator, **SIZE, **settings).images[0]


def ours(folder: Path, *, seed: int = 5, **fields: object) -> Image.Image:
    picture = calotype.load(folder, device="cpu").generate(PROMPT, seed=seed, **SIZE, **fields)
    assert isinstance(picture, Image.Image)
    return picture


def assert_same(a: Image.Image, b: Image.Image, within: int = 1) -> None:
    x, y = np.asarray(a, dtype=int), np.asarray(b.convert("RGB"), dtype=int)
    assert y.std() > 10, "the reference picture is flat: the test would prove nothing"
    assert abs(x - y).max() <= within


def assert_near(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max() / b.abs().max()) < 1e-4


@pytest.mark.parametrize("name", SCHEDULERS)
def test_sd1_draws_diffusers_picture(name: str, tmp_path: Path) -> None:
    pipeline = sd1(tmp_path, SCHEDULERS[name])
    reference = theirs(pipeline, num_inference_steps=6, guidance_scale=4.0, negative_prompt=NEGATIVE)
    assert_same(ours(tmp_path, steps=6, cfg_scale=4.0, negative_prompt=NEGATIVE), reference)


@pytest.mark.parametrize("name", ["ddim", "euler", "euler-ancestral", "dpmpp-2m-karras", "euler-v-zero-snr"])
def test_sdxl_draws_diffusers_picture(name: str, tmp_path: Path) -> None:
    pipeline = sdxl(tmp_path, SCHEDULERS[name])
    reference = theirs(pipeline, num_inference_steps=6, guidance_scale=4.0, negative_prompt=NEGATIVE)
    # From nearly pure noise diffusers' Euler carries x at 4096 times its size, in float32.
    within = 2 if "zero-snr" in name else 1
    assert_same(ours(tmp_path, steps=6, cfg_scale=4.0, negative_prompt=NEGATIVE), reference, within)
    told = {"original_size": (200, 300), "crops_coords_top_left": (16, 8), "target_size": (128, 64)}
    reference = theirs(pipeline, num_inference_steps=3, guidance_scale=5.0, **told)
    mine = {"original_height": 200, "original_width": 300, "crop_top": 16, "crop_left": 8}
    assert_same(
        ours(tmp_path, steps=3, cfg_scale=5.0, target_height=128, target_width=64, **mine),
        reference,
    )


def test_one_step_without_guidance(tmp_path: Path) -> None:
    """SDXL Turbo's way."""
    pipeline = sdxl(tmp_path, SCHEDULERS["euler-ancestral"])
    reference = theirs(pipeline, num_inference_steps=1, guidance_scale=0.0)
    assert_same(ours(tmp_path, steps=1, cfg_scale=1.0), reference)


@pytest.mark.parametrize("skip", [1, 2, 3])
def test_clip_skip(skip: int, tmp_path: Path) -> None:
    """Against transformers' hidden states: diffusers' own clip_skip does not run with transformers 5."""
    pipeline, model = sd1(tmp_path / "sd1"), calotype.load(tmp_path / "sd1").family
    assert isinstance(model, Sd1Model)
    ids = model.tokenizer(PROMPT, LENGTH)
    job = calotype.Request(prompt=PROMPT, clip_skip=skip).complete(model.defaults, seed=0)
    with torch.inference_mode():
        hidden = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states[-skip]
        norm = dict(pipeline.text_encoder.named_modules())
        final = next(module for name, module in norm.items() if name.endswith("final_layer_norm"))
        assert_near(model.condition(PROMPT, job, negative=False).texts[0], final(hidden))
        theirs_2, mine = sdxl(tmp_path / "sdxl"), calotype.load(tmp_path / "sdxl").family
        assert isinstance(mine, SdxlModel)
        job = calotype.Request(prompt=PROMPT, clip_skip=skip).complete(mine.defaults, seed=0)
        first = theirs_2.text_encoder(ids, output_hidden_states=True).hidden_states[-skip]
        assert_near(mine.condition(PROMPT, job, negative=False).texts[0][..., :32], first)


def test_unets_and_encoders(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(1)
    x, time = torch.randn(1, 4, 10, 6, generator=rng), torch.tensor([401.0])
    with torch.inference_mode():
        pipeline = sd1(tmp_path / "sd1")
        model = calotype.load(tmp_path / "sd1").family
        assert isinstance(model, Sd1Model)
        text = torch.randn(2, 16, 32, generator=rng)
        reference = pipeline.unet(x.expand(2, -1, -1, -1), time, encoder_hidden_states=text).sample
        prepared = model.unet.prepare([text], None, torch.tensor([981.0, 401.0]))
        assert_near(model.unet(x, *prepared.at(1)), reference)
        # Prompts of different lengths, each row on its own.
        prepared = model.unet.prepare([text[:1], text[1:, :12]], None, time)
        both = model.unet(x, *prepared.at(0))
        assert_near(both[1:], pipeline.unet(x, time, encoder_hidden_states=text[1:, :12]).sample)

        pipeline = sdxl(tmp_path / "sdxl")
        model = calotype.load(tmp_path / "sdxl").family
        assert isinstance(model, SdxlModel)
        job = calotype.Request(prompt=PROMPT, **SIZE).complete(model.defaults, seed=0)
        embeds, _, pooled, _ = pipeline.encode_prompt(PROMPT, device="cpu")
        conditioning = model.condition(PROMPT, job, negative=False)
        assert_near(conditioning.texts[0], embeds)
        assert conditioning.vector is not None
        assert_near(conditioning.vector[:, :40], pooled)
        sizes = torch.tensor([[64.0, 96.0, 0.0, 0.0, 64.0, 96.0]])
        added = {"text_embeds": pooled, "time_ids": sizes}
        reference = pipeline.unet(x, time, encoder_hidden_states=embeds, added_cond_kwargs=added).sample
        told = with_sizes(conditioning.vector, [job], model.unet.config.size_width)
        prepared = model.unet.prepare(conditioning.texts, told, time)
        assert_near(model.unet(x, *prepared.at(0)), reference)


def test_another_autoencoder_stands_before_the_models_own(tmp_path: Path) -> None:
    """In any order; two that are given by themselves are one too many."""
    sdxl(tmp_path / "sdxl")
    other = vae(seed=9)
    other.save_pretrained(tmp_path / "vae")
    plain = calotype.load(tmp_path / "sdxl").family
    with torch.inference_mode():
        latent = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        wanted = other.decode(latent / other.config.scaling_factor).sample / 2 + 0.5
        for sources in ((tmp_path / "sdxl", tmp_path / "vae"), (tmp_path / "vae", tmp_path / "sdxl")):
            assert_near(calotype.load(*sources).family.decode(latent), wanted)
        assert not torch.allclose(plain.decode(latent), wanted)
    with pytest.raises(calotype.CalotypeError, match="given twice"):
        calotype.load(tmp_path / "sdxl", tmp_path / "vae", tmp_path / "vae")
