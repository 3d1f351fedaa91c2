"""A tiny random Kolors, saved by diffusers: the same conditioning and pictures here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from test_unets import assert_near, assert_same
from tiny_unets import kolors

import calotype
from calotype.families.kolors import KolorsModel
from calotype.nn import quantized

PROMPT, NEGATIVE = "一只红色的狐狸在雪地里, a red fox in the snow", "模糊, blurry"
SIZE = {"width": 96, "height": 64}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.014, "beta_schedule": "scaled_linear", "num_train_timesteps": 1100}
SCHEDULERS: dict[str, Any] = {
    "euler": EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1),
    "dpmpp-2m-karras": DPMSolverMultistepScheduler(**SCHEDULE, use_karras_sigmas=True),
}


@pytest.fixture(scope="module")
def tokenizer() -> Path:
    spec = importlib.util.find_spec("diffsynth")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the tokenizers that diffsynth 1.1.9's wheel carries: pip install --no-deps diffsynth==1.1.9")
    return Path(next(iter(spec.submodule_search_locations))) / "tokenizer_configs" / "kolors" / "tokenizer"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_kolors_draws_diffusers_picture(name: str, tokenizer: Path, tmp_path: Path) -> None:
    pipeline = kolors(tmp_path, tokenizer, SCHEDULERS[name])
    generator = torch.Generator().manual_seed(5)
    settings: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 4.0, "negative_prompt": NEGATIVE}
    reference = pipeline(PROMPT, generator=generator, **SIZE, **settings).images[0]
    model = calotype.load(tmp_path, device="cpu")
    picture = model.generate(PROMPT, seed=5, **SIZE, steps=6, cfg_scale=4.0, negative_prompt=NEGATIVE)
    assert not isinstance(picture, list)
    assert_same(picture, reference)


def test_conditioning(tokenizer: Path, tmp_path: Path) -> None:
    pipeline, model = kolors(tmp_path, tokenizer), calotype.load(tmp_path).family
    assert isinstance(model, KolorsModel)
    job = calotype.Request(prompt=PROMPT, **SIZE).complete(model.defaults, seed=0)
    with torch.inference_mode():
        text, _, pooled, _ = pipeline.encode_prompt(PROMPT, device="cpu")
        ours = model.condition(PROMPT, job, negative=False)
    assert_near(ours.texts[0], text)
    assert ours.vector is not None
    assert_near(ours.vector[:, :32], pooled)


@pytest.mark.parametrize(("bits", "error"), [("int8", 0.01), ("int4", 0.1)])
def test_storage_in_fewer_bits(
    bits: str, error: float, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder's states are off by no more than its matrices, and the model says by how much those are."""
    kolors(tmp_path, tokenizer)
    monkeypatch.setattr(quantized, "LEAST", 256)
    exact, kept = calotype.load(tmp_path), calotype.load(tmp_path, storage={"chatglm": bits})
    assert 0 < kept.storage_errors["chatglm"] < error
    assert not exact.storage_errors
    job = calotype.Request(prompt=PROMPT, **SIZE).complete(exact.family.defaults, seed=0)
    with torch.inference_mode():
        a, b = (model.family.condition(PROMPT, job, negative=False).texts[0] for model in (exact, kept))
    assert 0 < float((a - b).norm() / a.norm()) < 20 * error  # three layers and their softmax magnify it
    for storage, said in (({"chatglm": "int3"}, "int8, int4"), ({"vae": "int8"}, "unet, chatglm")):
        with pytest.raises(calotype.RequestError, match=said):
            calotype.load(tmp_path, storage=storage)
