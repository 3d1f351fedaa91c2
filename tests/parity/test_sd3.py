"""Tiny random Stable Diffusion 3 pipelines, saved by diffusers: the same layers and pictures here, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from PIL import Image
from tiny_sd3 import CLIP_G, CLIP_L, LENGTH, POSITIONS, TEXT, build
from torch import Tensor

import calotype
from calotype.families.sd3 import Sd3Model
from calotype.request import Request

PROMPT, NEGATIVE = "a red fox on the table, two cats in snow", "blue dog"
WIDTH, HEIGHT, TOKENS = 96, 64, 24


class Pair(NamedTuple):
    theirs: StableDiffusion3Pipeline
    ours: calotype.Model  # type: ignore[type-arg]

    @property
    def family(self) -> Sd3Model:
        assert isinstance(self.ours.family, Sd3Model)
        return self.ours.family


def loaded(folder: Path, **form: object) -> Pair:
    return Pair(build(folder, **form), calotype.load(folder, device="cpu"))


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return loaded(tmp_path_factory.mktemp("medium"))


@pytest.fixture(scope="module")
def without_t5(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return loaded(tmp_path_factory.mktemp("without_t5"), with_t5=False)


@pytest.fixture(scope="module")
def medium_3_5(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return loaded(tmp_path_factory.mktemp("medium_3_5"), norms=True, dual=(0, 1))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return loaded(tmp_path_factory.mktemp("large"), norms=True)


FORMS = ("medium", "without_t5", "medium_3_5", "large")


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.getfixturevalue(request.param)


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-4 of the reference's largest value."""
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


def theirs_picture(pair: Pair, prompt: str = PROMPT, **settings: object) -> Image.Image:
    fixed = {"height": HEIGHT, "width": WIDTH, "max_sequence_length": TOKENS}
    made = pair.theirs(prompt, **{**fixed, **settings}, generator=torch.Generator().manual_seed(3))
    return made.images[0]


def ours_picture(pair: Pair, prompt: str = PROMPT, **fields: object) -> Image.Image:
    fixed = {"height": HEIGHT, "width": WIDTH, "text_tokens": TOKENS}
    made = pair.ours.generate(prompt, **{**fixed, **fields}, seed=3)
    assert isinstance(made, Image.Image)
    return made


def pixels(picture: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.int_]]:
    return np.asarray(picture.convert("RGB"), dtype=int)


def assert_same_picture(ours: Image.Image, theirs: Image.Image) -> None:
    a, b = pixels(ours), pixels(theirs)
    assert b.std() > 10, "the reference picture is flat: the test would prove nothing"
    assert abs(a - b).max() <= 1


@pytest.mark.parametrize("pair", FORMS, indirect=True)
def test_the_same_picture_with_guidance(pair: Pair) -> None:
    theirs = theirs_picture(pair, num_inference_steps=4, guidance_scale=4.0, negative_prompt=NEGATIVE)
    ours = ours_picture(pair, steps=4, cfg_scale=4.0, negative_prompt=NEGATIVE)
    assert_same_picture(ours, theirs)
    other = theirs_picture(pair, "two dogs", num_inference_steps=4, guidance_scale=4.0, negative_prompt=NEGATIVE)
    assert abs(pixels(other) - pixels(theirs)).max() > 10, "the prompt does not count: the test would prove little"


@pytest.mark.parametrize("pair", FORMS, indirect=True)
def test_the_same_picture_without_guidance(pair: Pair) -> None:
    for steps in (1, 4):
        theirs = theirs_picture(pair, num_inference_steps=steps, guidance_scale=0.0)
        assert_same_picture(ours_picture(pair, steps=steps, cfg_scale=1.0), theirs)


def test_t5_reads_256_tokens_unless_asked_otherwise(medium: Pair) -> None:
    """And CLIP's layers are chosen as elsewhere: diffusers counts from the last but one."""
    theirs = theirs_picture(medium, num_inference_steps=2, guidance_scale=1.0, max_sequence_length=256, clip_skip=1)
    assert_same_picture(ours_picture(medium, steps=2, cfg_scale=1.0, text_tokens=None, clip_skip=3), theirs)
    assert abs(pixels(theirs) - pixels(ours_picture(medium, steps=2, cfg_scale=1.0))).max() > 1


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_a_folder_s_shift_is_honoured(shift: float, tmp_path: Path) -> None:
    pair = loaded(tmp_path, scheduler=FlowMatchEulerDiscreteScheduler(shift=shift))
    theirs = theirs_picture(pair, num_inference_steps=3, guidance_scale=1.0)
    assert_same_picture(ours_picture(pair, steps=3, cfg_scale=1.0), theirs)


def test_a_folder_s_growing_shift_is_honoured(tmp_path: Path) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)
    pair = loaded(tmp_path, scheduler=scheduler)
    theirs = theirs_picture(pair, num_inference_steps=3, guidance_scale=1.0)
    assert_same_picture(ours_picture(pair, steps=3, cfg_scale=1.0), theirs)


@pytest.mark.parametrize("pair", ["medium", "without_t5"], indirect=True)
def test_conditioning(pair: Pair) -> None:
    job = Request(prompt=PROMPT, text_tokens=TOKENS).complete(pair.family.defaults, seed=0)
    with torch.inference_mode():
        text, _, pooled, _ = pair.theirs.encode_prompt(
            PROMPT, PROMPT, PROMPT, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
        ours = pair.family.condition(PROMPT, job, negative=False)
    assert ours.text.shape == (1, LENGTH + TOKENS, TEXT)
    assert_near(ours.text, text)
    assert_near(ours.pooled, pooled)


def test_encoders(medium: Pair) -> None:
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 32, (3, LENGTH), generator=rng)
    ids[0, 5:] = 1  # an end, then padding with the same piece
    ids[1, -1] = 1
    ids[2, 9] = 1
    family = medium.family
    assert family.clip_l is not None
    assert family.clip_g is not None
    assert family.t5 is not None
    with torch.inference_mode():
        for ours, theirs in (
            (family.clip_l.encoder, medium.theirs.text_encoder),
            (family.clip_g.encoder, medium.theirs.text_encoder_2),
        ):
            mine, reference = ours(ids), theirs(ids, output_hidden_states=True)
            assert_near(mine.pooled, reference.text_embeds)
            for state, wanted in zip(mine.hidden[:-1], reference.hidden_states[:-1], strict=True):
                assert_near(state, wanted)
        assert_near(family.t5.encoder(ids), medium.theirs.text_encoder_3(ids).last_hidden_state)


@pytest.mark.parametrize("pair", FORMS, indirect=True)
@pytest.mark.parametrize(("rows", "columns"), [(5, 7), (POSITIONS, 3), (POSITIONS, POSITIONS)])
def test_transformer(pair: Pair, rows: int, columns: int) -> None:
    """At sizes whose crop of the position table is off its middle by a half, too."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16, 2 * rows, 2 * columns, generator=rng)
    text = torch.randn(2, 11, TEXT, generator=rng)
    pooled = torch.randn(2, CLIP_L + CLIP_G, generator=rng)
    with torch.inference_mode():
        theirs = pair.theirs.transformer(
            hidden_states=x,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=torch.full((2,), 630.0),
        ).sample
        network = pair.family.transformer
        prepared = network.prepare(text, pooled, torch.tensor([1.0, 0.63, 0.2]), rows, columns)
        assert_near(network(x, prepared, 1), theirs)
        # One row of latents for two prompts gives two answers.
        alone = network(x[:1], prepared, 1)
        again = pair.theirs.transformer(
            hidden_states=x[:1].expand(2, -1, -1, -1),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=torch.full((2,), 630.0),
        ).sample
        assert_near(alone, again)


def test_autoencoder(medium: Pair) -> None:
    rng = torch.Generator().manual_seed(2)
    picture, latent = torch.rand(2, 3, 48, 64, generator=rng), torch.randn(2, 16, 6, 8, generator=rng)
    theirs, ours = medium.theirs.vae, medium.family.vae
    scale, shift = theirs.config.scaling_factor, theirs.config.shift_factor
    with torch.inference_mode():
        mean = theirs.encode(picture * 2 - 1).latent_dist.mean
        assert_near(ours.encode(picture), (mean - shift) * scale)
        assert_near(ours.decode(latent), theirs.decode(latent / scale + shift).sample / 2 + 0.5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near(dtype: str, tmp_path: Path) -> None:
    """The same picture but for rounding: random networks magnify it, so the mean difference is what counts."""
    build(tmp_path, norms=True, dual=(0, 1))
    exact, half = (Pair(None, calotype.load(tmp_path, dtype=kind)) for kind in ("float32", dtype))  # type: ignore[arg-type]
    a, b = (pixels(ours_picture(pair, steps=2, cfg_scale=3.0)) for pair in (exact, half))
    assert abs(a - b).mean() < 8
    assert (a != b).any()
