"""Tiny random checkpoints in every layout, written by the safetensors library itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from calotype.checkpoint.autoencoders import AUTOENCODER, TINY_AUTOENCODER
from calotype.checkpoint.layouts import Part
from calotype.checkpoint.text_encoders import CLIP, T5
from calotype.families.flux.config import FluxConfig
from calotype.families.flux.keys import TRANSFORMER
from calotype.nn.autoencoder import AutoencoderConfig
from calotype.nn.tiny_autoencoder import TinyAutoencoderConfig
from calotype.text.clip import ClipConfig
from calotype.text.t5 import T5Config

FLUX = FluxConfig(
    image_width=64,
    image_width_out=64,
    text_width=48,
    pooled_width=64,
    width=256,
    heads=2,
    mlp_ratio=2,
    joint_blocks=2,
    single_blocks=3,
    axes=(16, 56, 56),
    theta=10_000,
    guidance_input=True,
    patch=2,
)
CLIP_TEXT = ClipConfig(
    vocabulary=40,
    width=64,
    layers=2,
    heads=1,
    mlp_width=96,
    positions=16,
    quick_gelu=False,
    projection=None,
    end=39,
)
T5_TEXT = T5Config(vocabulary=40, width=48, layers=2, heads=3, head_width=16, mlp_width=64, buckets=8, distance=128)
VAE = AutoencoderConfig(
    latent_channels=16, widths=(32, 64, 64, 64), blocks=1, quant_convs=False, scale=0.3611, shift=0.1159
)
TINY_VAE = TinyAutoencoderConfig(
    latent_channels=16, width=16, encoder_blocks=(1, 2, 1, 1), decoder_blocks=(2, 1, 1, 1), scale=1.0, shift=0.0
)
WORDS = ["a", "red", "apple", "on", "the", "blue", "table", "two", "cats", "and", "dog", "in", "snow", "fox"]


def tensors(
    part: Part[Any],
    layout: str,
    config: object,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    extras: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Random tensors under a layout's keys."""
    rng = torch.Generator().manual_seed(seed)
    chosen = part.layout(layout)
    assert chosen is not None
    _, binding = part.bind(chosen, config)
    return {key: (torch.randn(shape, generator=rng) * 0.1).to(dtype) for key, shape in binding.manifest(extras)}


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


def save(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(state), path, metadata)
    return path


def write_json(path: Path, content: Mapping[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(content)))
    return path


def tokenizer(folder: Path, marks: list[str]) -> Path:
    """A word tokenizer of 40 tokens or fewer, whose special tokens are `marks`."""
    vocabulary = {word: number for number, word in enumerate([*marks, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=marks[0]))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder


def clip_tokenizer(folder: Path) -> Path:
    return tokenizer(folder, ["<|startoftext|>", "<|endoftext|>"])


def t5_tokenizer(folder: Path) -> Path:
    return tokenizer(folder, ["<pad>", "</s>"])


def originals(folder: Path, *, dtype: torch.dtype = torch.float32) -> dict[str, Path]:
    """A FLUX model as loose original files, with tokenizers beside them."""
    return {
        "transformer": save(folder / "flux1-dev.safetensors", tensors(TRANSFORMER, "original", FLUX, dtype=dtype)),
        "clip": save(folder / "clip_l.safetensors", tensors(CLIP, "transformers", CLIP_TEXT, seed=1, dtype=dtype)),
        "t5": save(folder / "t5xxl.safetensors", tensors(T5, "transformers", T5_TEXT, seed=2, dtype=dtype)),
        "vae": save(folder / "ae.safetensors", tensors(AUTOENCODER, "original", VAE, seed=3, dtype=dtype)),
        "tokenizer": clip_tokenizer(folder / "tokenizer"),
        "tokenizer_2": t5_tokenizer(folder / "tokenizer_2"),
    }


def pipeline(folder: Path, *, tiny_vae: bool = False) -> Path:
    """The same as a diffusers folder, with the configurations that diffusers would write."""
    parts: dict[str, tuple[Part[Any], str, object, str]] = {
        "transformer": (TRANSFORMER, "diffusers", FLUX, "diffusion_pytorch_model"),
        "text_encoder": (CLIP, "transformers-bare", CLIP_TEXT, "model"),
        "text_encoder_2": (T5, "transformers", T5_TEXT, "model"),
        "vae": (AUTOENCODER, "diffusers", VAE, "diffusion_pytorch_model"),
    }
    if tiny_vae:
        parts["vae"] = (TINY_AUTOENCODER, "diffusers-tiny", TINY_VAE, "diffusion_pytorch_model")
    index: dict[str, object] = {"_class_name": "FluxPipeline", "image_encoder": [None, None]}
    for seed, (name, (part, layout_name, config, file)) in enumerate(parts.items()):
        save(folder / name / f"{file}.safetensors", tensors(part, layout_name, config, seed=seed))
        layout = part.layout(layout_name)
        assert layout is not None
        assert layout.settings is not None
        write_json(folder / name / "config.json", layout.settings(config))
        index[name] = ["library", "Class"]
    clip_tokenizer(folder / "tokenizer")
    t5_tokenizer(folder / "tokenizer_2")
    write_json(
        folder / "scheduler" / "scheduler_config.json",
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.5, "use_dynamic_shifting": False},
    )
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        index[name] = ["library", "Class"]
    write_json(folder / "model_index.json", index)
    return folder


def everything(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A whole model in one file, as ComfyUI saves it."""
    return {
        **under("model.diffusion_model.", tensors(TRANSFORMER, "original", FLUX, dtype=dtype)),
        **under("vae.", tensors(AUTOENCODER, "original", VAE, seed=3, dtype=dtype)),
        **under(
            "text_encoders.clip_l.transformer.",
            tensors(CLIP, "transformers", CLIP_TEXT, seed=1, dtype=dtype, extras=("text_projection.weight",)),
        ),
        **under("text_encoders.t5xxl.transformer.", tensors(T5, "transformers", T5_TEXT, seed=2, dtype=dtype)),
        "text_encoders.clip_l.logit_scale": torch.zeros(()),
        "text_encoders.t5xxl.logit_scale": torch.zeros(()),
    }
