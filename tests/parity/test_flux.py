"""Tiny random FLUX pipelines, saved by diffusers: the same layers and pictures here, in float32 on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from tiny_flux import build
from torch import Tensor

import calotype
from calotype.families.flux import FluxModel
from calotype.families.flux.network import positions, to_latent, to_tokens
from calotype.nn.autoencoder import Autoencoder
from calotype.request import Request

PROMPT = "a red fox on the table, two cats in snow"
WIDTH, HEIGHT, TOKENS = 96, 64, 24


class Pair(NamedTuple):
    theirs: FluxPipeline
    ours: calotype.Model  # type: ignore[type-arg]

    @property
    def family(self) -> FluxModel:
        assert isinstance(self.ours.family, FluxModel)
        return self.ours.family


def loaded(folder: Path, **form: bool) -> Pair:
    return Pair(build(folder, **form), calotype.load(folder, device="cpu"))


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return loaded(tmp_path_factory.mktemp("dev"), guidance=True)


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return loaded(tmp_path_factory.mktemp("schnell"), guidance=False, dynamic=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return loaded(tmp_path_factory.mktemp("small"), guidance=True, tiny_vae=True)


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-4 of the reference's largest value."""
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


def theirs_picture(pair: Pair, **settings: object) -> Image.Image:
    made = pair.theirs(
        PROMPT,
        height=HEIGHT,
        width=WIDTH,
        max_sequence_length=TOKENS,
        generator=torch.Generator().manual_seed(3),
        **settings,
    )
    return made.images[0]


def ours_picture(pair: Pair, **fields: object) -> Image.Image:
    made = pair.ours.generate(PROMPT, width=WIDTH, height=HEIGHT, text_tokens=TOKENS, seed=3, **fields)
    assert isinstance(made, Image.Image)
    return made


def assert_same_picture(ours: Image.Image, theirs: Image.Image) -> None:
    a, b = np.asarray(ours, dtype=int), np.asarray(theirs.convert("RGB"), dtype=int)
    assert b.std() > 10, "the reference picture is flat: the test would prove nothing"
    assert abs(a - b).max() <= 1


@pytest.mark.parametrize("steps", [1, 4])
def test_dev_draws_diffusers_picture(dev: Pair, steps: int) -> None:
    assert_same_picture(
        ours_picture(dev, steps=steps, embedded_guidance=3.5),
        theirs_picture(dev, num_inference_steps=steps, guidance_scale=3.5),
    )


def test_dev_with_true_guidance_draws_diffusers_picture(dev: Pair) -> None:
    assert_same_picture(
        ours_picture(dev, steps=3, embedded_guidance=2.0, cfg_scale=4.0, negative_prompt="blue dog"),
        theirs_picture(dev, num_inference_steps=3, guidance_scale=2.0, true_cfg_scale=4.0, negative_prompt="blue dog"),
    )


def test_schnell_draws_diffusers_picture(schnell: Pair) -> None:
    assert_same_picture(ours_picture(schnell, steps=4), theirs_picture(schnell, num_inference_steps=4))


def test_the_tiny_autoencoder_draws_diffusers_picture(small: Pair) -> None:
    assert_same_picture(
        ours_picture(small, steps=2, embedded_guidance=3.5),
        theirs_picture(small, num_inference_steps=2, guidance_scale=3.5),
    )


def test_a_whole_picture_to_the_edge_of_float32(dev: Pair) -> None:
    """The same through our own encoders, transformer and decoder, compared before rounding to 8 bits."""
    family = dev.family
    job = Request(prompt=PROMPT, width=WIDTH, height=HEIGHT, text_tokens=TOKENS).complete(family.defaults, seed=0)
    with torch.inference_mode():
        text, pooled, _ = dev.theirs.encode_prompt(PROMPT, PROMPT, max_sequence_length=TOKENS)
        ours = family.condition(PROMPT, job, negative=False)
    assert_near(ours.text, text)
    assert_near(ours.pooled, pooled)


def test_t5_and_clip(dev: Pair) -> None:
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 32, (3, 40), generator=rng)
    with torch.inference_mode():
        assert_near(dev.family.t5(ids), dev.theirs.text_encoder_2(ids).last_hidden_state)
        ids = torch.randint(1, 32, (3, 16), generator=rng)
        ids[0, 5:] = 0  # an end, then padding with the same piece
        ids[1, -1] = 0
        ids[2, 9] = 0
        theirs = dev.theirs.text_encoder(ids, output_hidden_states=True)
        ours = dev.family.clip(ids)
    assert_near(ours.last, theirs.last_hidden_state)
    assert_near(ours.pooled, theirs.pooler_output)
    assert len(ours.hidden) == len(theirs.hidden_states)
    for mine, reference in zip(ours.hidden[:-1], theirs.hidden_states[:-1], strict=True):
        assert_near(mine, reference)


@pytest.mark.parametrize("which", ["dev", "schnell"])
def test_transformer(which: str, request: pytest.FixtureRequest) -> None:
    pair: Pair = request.getfixturevalue(which)
    rng = torch.Generator().manual_seed(1)
    rows, columns, text_tokens = 5, 7, 11
    image = torch.randn(2, rows * columns, 16, generator=rng)
    text = torch.randn(2, text_tokens, 48, generator=rng)
    pooled = torch.randn(2, 32, generator=rng)
    where = positions(text_tokens, rows, columns)
    guided = which == "dev"
    with torch.inference_mode():
        theirs = pair.theirs.transformer(
            hidden_states=image,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=torch.full((2,), 0.63),
            guidance=torch.full((2,), 3.5) if guided else None,
            img_ids=where[text_tokens:],
            txt_ids=where[:text_tokens],
        ).sample
        network = pair.family.transformer
        levels = torch.tensor([1.0, 0.63, 0.2])
        prepared = network.prepare(text, pooled, 3.5 if guided else None, levels, rows, columns)
        assert_near(network(image, prepared, 1), theirs)


def test_autoencoders(dev: Pair, small: Pair) -> None:
    rng = torch.Generator().manual_seed(2)
    picture, latent = torch.rand(2, 3, 48, 64, generator=rng), torch.randn(2, 4, 6, 8, generator=rng)
    with torch.inference_mode():
        theirs, ours = dev.theirs.vae, dev.family.vae
        assert isinstance(ours, Autoencoder)
        scale, shift = theirs.config.scaling_factor, theirs.config.shift_factor
        mean = theirs.encode(picture * 2 - 1).latent_dist.mean
        assert_near(ours.encode(picture), (mean - shift) * scale)
        assert_near(ours.decode(latent), theirs.decode(latent / scale + shift).sample / 2 + 0.5)
        assert_near(small.family.vae.encode(picture), small.theirs.vae.encode(picture * 2 - 1).latents)
        assert_near(small.family.vae.decode(latent), small.theirs.vae.decode(latent).sample / 2 + 0.5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near(dtype: str, tmp_path: Path) -> None:
    """The same picture but for rounding: random networks magnify it, so the mean difference is what counts."""
    build(tmp_path, guidance=True)
    exact, half = (Pair(None, calotype.load(tmp_path, dtype=kind)) for kind in ("float32", dtype))  # type: ignore[arg-type]
    a, b = (np.asarray(ours_picture(pair, steps=2), dtype=int) for pair in (exact, half))
    assert abs(a - b).mean() < 8
    assert (a != b).any()


def test_packing_is_diffusers() -> None:
    latent = torch.randn(2, 4, 6, 10)
    theirs = FluxPipeline._pack_latents(latent, 2, 4, 6, 10)
    assert torch.equal(to_tokens(latent, 2), theirs)
    assert torch.equal(to_latent(theirs, 3, 5, 2), latent)
