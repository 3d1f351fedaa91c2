"""LoRA files as peft and diffusers write them, on tiny pipelines: diffusers' own picture with the same file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_flux
import tiny_sd3
import tiny_unets
import torch
from PIL import Image

import calotype

peft = pytest.importorskip("peft")

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
ENCODER = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]
PROMPT = "a red fox on the table"


class Form:
    """A pipeline, what its LoRA is of, and how it draws."""

    def __init__(self, build: Callable[[Path], Any], targets: dict[str, list[str]], **settings: object) -> None:
        self.build = build
        self.targets = targets
        self.settings = settings


FORMS = {
    "sd1": Form(
        tiny_unets.sd1,
        {"unet": [*ATTENTION, "proj_in", "ff.net.0.proj", "conv1", "time_emb_proj"], "text_encoder": ENCODER},
        guidance_scale=5.0,
    ),
    "sdxl": Form(
        tiny_unets.sdxl,
        {
            "unet": [*ATTENTION, "proj_in", "ff.net.2", "conv2", "conv_shortcut"],
            "text_encoder": ENCODER,
            "text_encoder_2": ENCODER,
        },
        guidance_scale=5.0,
    ),
    "flux": Form(
        lambda folder: tiny_flux.build(folder, guidance=True),
        {
            # Two of the single blocks' fused three, and modulation, whose last shift and scale change places.
            "transformer": ["to_q", "add_k_proj", "proj_mlp", "proj_out", "norm_out.linear", "norm1.linear"],
            "text_encoder": ENCODER,
        },
        guidance_scale=3.5,
    ),
    "sd3": Form(
        tiny_sd3.build,
        {
            "transformer": ["to_k", "to_v", "add_q_proj", "to_add_out", "ff.net.0.proj", "norm_out.linear"],
            "text_encoder": ENCODER,
            "text_encoder_2": ENCODER,
        },
        guidance_scale=5.0,
    ),
}


def adapted(pipeline: Any, form: Form, file: Path, **config: Any) -> None:
    """Give a pipeline a random LoRA and save that with diffusers."""
    layers: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    rng = torch.Generator().manual_seed(11)
    for name, modules in form.targets.items():
        if config.get("use_dora") and name.startswith("text"):
            continue  # transformers 5 loses these magnitudes when it loads them
        module = copy.deepcopy(getattr(pipeline, name))  # the pipeline itself stays plain
        settings = peft.LoraConfig(r=4, target_modules=modules, init_lora_weights=True, **config)
        peft.inject_adapter_in_model(settings, module)
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                if "lora_A" in key or "lora_B" in key:
                    parameter.copy_(0.15 * torch.randn(parameter.shape, generator=rng))
                elif "lora_magnitude" in key:
                    parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=rng))
        layers[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(module)
        metadata[f"{name}_lora_adapter_metadata"] = settings.to_dict()
    pipeline.save_lora_weights(file.parent, weight_name=file.name, **layers, **metadata)


def theirs(pipeline: Any, form: Form) -> Image.Image:
    generator = torch.Generator().manual_seed(5)
    return pipeline(
        PROMPT, generator=generator, width=96, height=64, num_inference_steps=3, **form.settings, **more(pipeline)
    ).images[0]


def more(pipeline: Any) -> dict[str, int]:
    name = type(pipeline).__name__
    return {"max_sequence_length": 24} if name in ("FluxPipeline", "StableDiffusion3Pipeline") else {}


def ours(model: calotype.Model[Any]) -> Image.Image:
    fields: dict[str, Any] = {"width": 96, "height": 64, "steps": 3, "seed": 5}
    fields |= {"text_tokens": 24} if model.family.family in ("flux", "sd3") else {"cfg_scale": 5.0}
    if model.family.family == "sd3":
        fields["cfg_scale"] = 5.0
    picture = model.generate(PROMPT, **fields)
    assert isinstance(picture, Image.Image)
    return picture


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max())


@pytest.mark.parametrize(("dora", "memory"), [(False, "resident"), (True, "stream")], ids=["lora", "dora-apart"])
@pytest.mark.parametrize("name", FORMS)
def test_the_picture_with_a_lora_is_diffusers(name: str, dora: bool, memory: str, tmp_path: Path) -> None:
    form = FORMS[name]
    pipeline = form.build(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    file = tmp_path / "style.safetensors"
    adapted(pipeline, form, file, lora_alpha=6, use_dora=dora)
    model = calotype.load(tmp_path / "model", device="cpu", memory=memory)
    plain = ours(model)
    assert difference(plain, theirs(pipeline, form)) <= 1
    assert model.attach(file) == "style"
    pipeline.load_lora_weights(file)
    wanted = theirs(pipeline, form)
    assert difference(plain, wanted) > 8  # the file counts
    assert difference(ours(model), wanted) <= 1
    if not dora:
        # Strengths between say different things of lengths: PEFT's change at 0 too.
        model.scale("style", 0.6)
        pipeline.set_adapters(pipeline.get_active_adapters(), 0.6)
        assert difference(ours(model), theirs(pipeline, form)) <= 1
    model.detach("style")
    assert difference(ours(model), plain) == 0


KINDS = {
    "loha": peft.LoHaConfig(r=4, alpha=2),
    "loha, convolutions with a core": peft.LoHaConfig(r=4, alpha=3, use_effective_conv2d=True),
    "lokr": peft.LoKrConfig(r=4, alpha=2, rank_pattern={"to_v": 100}),  # whole matrices there
    "lokr, both in two": peft.LoKrConfig(
        r=2, alpha=1, decompose_both=True, decompose_factor=4, use_effective_conv2d=True
    ),
    "lokr, alphas by module": peft.LoKrConfig(r=4, alpha=2, alpha_pattern={"attn1.to_q": 8, r"^conv_in$": 1}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_with_peft_s_loha_and_lokr_is_peft_s(kind: str, tmp_path: Path) -> None:
    pipeline = tiny_unets.sd1(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    config = copy.deepcopy(KINDS[kind])
    config.target_modules = ["to_q", "to_v", "conv1", "conv_in", "proj_in", "ff.net.2"]
    adapted_unet = peft.get_peft_model(copy.deepcopy(pipeline.unet), config)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapted_unet.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=rng))
    adapted_unet.save_pretrained(tmp_path / "style")
    model = calotype.load(tmp_path / "model", device="cpu", dtype="float32")
    plain = ours(model)
    assert model.attach(tmp_path / "style") == "style"
    pipeline.unet = adapted_unet.merge_and_unload()
    wanted = theirs(pipeline, FORMS["sd1"])
    assert difference(plain, wanted) > 8
    assert difference(ours(model), wanted) <= 1
