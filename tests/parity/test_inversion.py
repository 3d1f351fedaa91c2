"""Textual inversion against diffusers: files with vectors for both CLIPs, tiny random networks.

diffusers loads such files for SDXL; for Stable Diffusion 3 it does not, and vectors are put in the place of words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sd3
import tiny_unets
import torch
from safetensors.torch import save_file
from torch import Tensor

import calotype
from calotype.errors import LoadError
from calotype.generate import Model

VECTORS = 2
FIELDS: dict[str, Any] = {"width": 64, "height": 64, "steps": 2, "cfg_scale": 3.0, "negative_prompt": "a cat"}


@pytest.fixture(scope="module")
def vectors() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(5)
    return 0.5 * torch.randn(VECTORS, 768, generator=rng), 0.5 * torch.randn(VECTORS, 1280, generator=rng)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """SDXL with encoders of the real widths, which tell the vectors of a file apart, and little else."""
    folder = tmp_path_factory.mktemp("sdxl")
    made = tiny_unets.sdxl(folder, cross_attention_dim=768 + 1280)
    made.text_encoder = tiny_unets.clip(768, seed=1)
    made.text_encoder_2 = tiny_unets.clip(1280, seed=2, projection=40, act="gelu")
    made.save_pretrained(folder)
    return folder, made


def written(folder: Path, layout: str, vectors: tuple[Tensor, Tensor]) -> Path:
    names = {"comfyui": ("clip_l", "clip_g"), "diffusers": ("text_encoders_0", "text_encoders_1")}[layout]
    path = folder / "thing.safetensors"
    save_file(dict(zip(names, vectors, strict=True)), path)
    return path


def drawn(model: Model[Any], prompt: str) -> np.ndarray[Any, Any]:
    return np.asarray(model.generate(prompt, seed=1, **FIELDS), dtype=int)


def drawn_by(theirs: Any, prompt: str, *, channels: int) -> np.ndarray:  # noqa: ANN401
    """diffusers' picture with the same settings; `channels` of its latents."""
    picture = theirs(
        prompt,
        negative_prompt="a cat",
        width=64,
        height=64,
        num_inference_steps=2,
        guidance_scale=3.0,
        latents=torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(1)),
    ).images[0]
    return np.asarray(picture, dtype=int)


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_a_word_of_both_encoders_is_diffusers(
    layout: str, pipeline: tuple[Path, Any], vectors: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    folder, theirs = pipeline
    if "thing" not in theirs.tokenizer.get_vocab():
        for one, encoder, tokenizer in zip(
            vectors,
            (theirs.text_encoder, theirs.text_encoder_2),
            (theirs.tokenizer, theirs.tokenizer_2),
            strict=True,
        ):
            theirs.load_textual_inversion({"thing": one}, text_encoder=encoder, tokenizer=tokenizer)
    ours = calotype.load(folder, written(tmp_path, layout, vectors), dtype="float32")
    wanted = drawn_by(theirs, "a red thing in the snow", channels=4)
    got = drawn(ours, "a red thing in the snow")
    assert abs(got - wanted).max() <= 1
    assert abs(got - drawn(ours, "a red fox in the snow")).max() > 1


def test_vectors_for_one_encoder_leave_the_other_its_word(
    pipeline: tuple[Path, Any], vectors: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    folder, _ = pipeline
    path = tmp_path / "thing.safetensors"
    save_file({"clip_g": vectors[1]}, path)
    one = drawn(calotype.load(folder, path, dtype="float32"), "a red thing in the snow")
    both = drawn(
        calotype.load(folder, written(tmp_path, "comfyui", vectors), dtype="float32"), "a red thing in the snow"
    )
    assert abs(one - both).max() > 1


def test_a_word_of_stable_diffusion_3_is_its_vectors(vectors: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    clip_l = tiny_sd3.clip(768, seed=1, act="quick_gelu")
    theirs = tiny_sd3.build(folder, with_t5=False, clip_l=clip_l, text=768 + 1280, pooled=768 + 1280)
    theirs.text_encoder_2 = tiny_sd3.clip(1280, seed=2)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder)
    ours = calotype.load(folder, written(tmp_path, "comfyui", vectors), dtype="float32")
    got = drawn(ours, "a thing on the table")
    plain = drawn(ours, "a red fox on the table")
    for encoder, tokenizer, rows in zip(
        (theirs.text_encoder, theirs.text_encoder_2), (theirs.tokenizer, theirs.tokenizer_2), vectors, strict=True
    ):
        ids = tokenizer("red fox", add_special_tokens=False).input_ids
        assert len(ids) == VECTORS
        with torch.no_grad():
            encoder.get_parameter("text_model.embeddings.token_embedding.weight")[ids] = rows
    wanted = drawn_by(theirs, "a red fox on the table", channels=16)
    assert abs(got - wanted).max() <= 1
    assert abs(got - plain).max() > 1


def test_an_embedding_that_no_encoder_takes_is_refused(pipeline: tuple[Path, Any], tmp_path: Path) -> None:
    path = tmp_path / "thing.safetensors"
    save_file({"emb_params": torch.ones(2, 1024)}, path)
    with pytest.raises(LoadError, match=r"of width 1024, but this model of SDXL.* takes 768 and 1280"):
        calotype.load(pipeline[0], path)
