from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_checkpoints
import torch
from torch import Tensor

from calotype.checkpoint.embeddings import embedding_keys, read_embedding
from calotype.checkpoint.files import Shape, Weights
from calotype.checkpoint.known import attachment
from calotype.errors import DamagedFile, LoadError, UnsupportedModel
from calotype.loading import describe
from calotype.text.clip import VIT_L, ClipEncoder
from calotype.text.clip_prompts import encode
from calotype.text.tokenizers import PromptTokenizer


def written(folder: Path, state: dict[str, Tensor]) -> Weights:
    path = tiny_checkpoints.save(folder / "word.safetensors", state)
    return Weights.of(str(path), [path])


FORMS: dict[str, dict[str, Shape]] = {
    "A1111": {"emb_params": (4, 768)},
    "SDXL": {"clip_l": (3, 768), "clip_g": (3, 1280)},
    "SDXL, one encoder": {"clip_g": (2, 1280)},
    "diffusers' SDXL trainer": {"text_encoders_0": (2, 768), "text_encoders_1": (2, 1280)},
    "diffusers, one vector": {"<cat-toy>": (768,)},
    "diffusers, several": {"sks": (5, 768)},
    "a word with a dot": {"<v1.5>": (1, 768)},
    "Stable Diffusion 2": {"emb_params": (1, 1024)},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_form_is_read(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    state = {key: torch.randn(shape).to(dtype) for key, shape in FORMS[form].items()}
    weights = written(tmp_path, state)
    found = read_embedding(weights)
    assert sorted(found) == sorted(shape[-1] for shape in FORMS[form].values())
    for tensor in state.values():
        vectors = found[tensor.shape[-1]]
        assert vectors.dtype == torch.float32
        assert torch.equal(vectors, tensor.float().reshape(-1, tensor.shape[-1]))
    attached = attachment(weights.shapes)
    assert attached is not None
    assert attached.kind == "embedding"
    widths = {shape[-1] for shape in FORMS[form].values()}
    assert attached.family == ("sdxl" if 1280 in widths else "sd2" if 1024 in widths else None)


def test_a_pickles_flattened_keys_are_known() -> None:
    shapes: dict[str, Shape] = {"string_to_param.*": (8, 768), "string_to_token.*": ()}
    assert embedding_keys(shapes) == {768: "string_to_param.*"}
    attached = attachment(shapes)
    assert attached is not None
    assert attached.kind == "embedding"


@pytest.mark.parametrize(
    ("shapes", "family"),
    [
        ({"clip_l": (2, 768), "clip_g": (2, 1280), "t5xxl": (2, 4096)}, "sd3"),
        ({"clip_l": (2, 768), "t5": (2, 4096)}, None),
        ({"<cat-toy>": (4096,)}, None),
    ],
)
def test_vectors_for_t5_are_known_and_refused(shapes: dict[str, Shape], family: str | None, tmp_path: Path) -> None:
    weights = written(tmp_path, {key: torch.ones(shape) for key, shape in shapes.items()})
    attached = attachment(weights.shapes)
    assert attached is not None
    assert (attached.kind, attached.family) == ("embedding", family)
    assert describe(weights.files[0]).note.startswith("with vectors for T5")
    with pytest.raises(UnsupportedModel, match=r"with vectors for T5 \('(t5xxl|t5|<cat-toy>)'\)"):
        read_embedding(weights)


OTHERS: dict[str, dict[str, Shape]] = {
    "nothing": {},
    "a linear layer": {"proj.weight": (8, 768)},
    "a bare layer": {"weight": (8, 768), "bias": (768,)},
    "a bare tensor": {"weight": (768,)},
    "a network's vector": {"vision_model.embeddings.class_embedding": (1024,)},
    "too many vectors": {"table": (77, 768)},
    "no vectors": {"sks": (0, 768)},
    "another width": {"sks": (2, 320)},
    "three axes": {"sks": (1, 2, 768)},
    "two words": {"<a>": (768,), "<b>": (768,)},
    "two words for two encoders": {"<a>": (768,), "<b>": (1280,)},
    "a word and a stranger": {"<a>": (768,), "logit_scale": ()},
    "twice the same width": {"clip_l": (2, 768), "emb_params": (2, 768)},
    "an encoder under a prefix": {"clip_l.text_model.embeddings.token_embedding.weight": (49408, 768)},
    "an encoder's name": {"clip_l": (49408, 768)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_else_is_taken_for_one(tmp_path: Path, name: str) -> None:
    shapes = OTHERS[name]
    assert embedding_keys(shapes) is None
    attached = attachment(shapes)
    assert attached is None or attached.kind != "embedding"
    if name != "an encoder under a prefix" and name != "an encoder's name":
        with pytest.raises(LoadError, match="no textual inversion embedding"):
            read_embedding(written(tmp_path, {key: torch.zeros(shape) for key, shape in shapes.items()}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_damage(tmp_path: Path, value: float) -> None:
    with pytest.raises(DamagedFile, match="no finite numbers"):
        read_embedding(written(tmp_path, {"emb_params": torch.full((1, 768), value)}))
    with pytest.raises(DamagedFile, match="no finite numbers"):
        read_embedding(written(tmp_path, {"emb_params": torch.zeros(1, 768, dtype=torch.int64)}))


def test_what_is_read_does_not_hang_on_the_file(tmp_path: Path) -> None:
    weights = written(tmp_path, {"emb_params": torch.ones(1, 768)})
    vectors = read_embedding(weights)[768]
    vectors.zero_()
    assert float(weights.mapped("emb_params").sum()) == 768


def test_from_a_file_to_states(tmp_path: Path) -> None:
    """A word's own vectors, through a file, give the word's own states."""
    encoder = tiny.scattered(ClipEncoder(replace(VIT_L, vocabulary=16, layers=1, mlp_width=32, end=1)), seed=1)
    assert isinstance(encoder, ClipEncoder)
    tokenizer = PromptTokenizer(tiny.tokenizer(), start=3, end=1, padding=0)
    path = tiny_checkpoints.save(tmp_path / "beast.safetensors", {"<x>": encoder.tokens.weight[[5, 7]].clone()})
    vectors = read_embedding(Weights.of(str(path), [path]))[encoder.config.width]
    made, wanted = (
        encode(prompt, encoder, tokenizer, lambda states: states.last, embeddings={path.stem: vectors})
        for prompt in ("a (beast:1.2) in the snow", "a (red fox:1.2) in the snow")
    )
    assert torch.equal(made.text, wanted.text)
    assert made.text.shape == (1, 77, 768)
