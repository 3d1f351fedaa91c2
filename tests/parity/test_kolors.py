"""A tiny random Kolors, saved by diffusers: the same conditioning and pictures here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from PIL import Image
from test_controlnets import union
from test_image_prompts import ours, picture, theirs
from test_unets import assert_near, assert_same
from tiny_image_prompts import adapter, encoder
from tiny_unets import kolors

import calotype
from calotype.families.kolors import KolorsModel
from calotype.families.unets import reader_for
from calotype.image import to_tensor
from calotype.nn import quantized
from calotype.nn.controlnet import ControlNet
from calotype.nn.embeddings import sinusoid
from calotype.nn.unet import UNet
from calotype.request import Control

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


def test_image_prompts(tokenizer: Path, tmp_path: Path) -> None:
    """Their tokens do not go through the projection of the text."""
    pipeline = kolors(tmp_path / "model", tokenizer)
    file = adapter(tmp_path / "ip_adapter_plus_general.bin", pipeline.unet, kind="plus")
    encoder(tmp_path / "image_encoder", hidden_act="quick_gelu")
    reference = theirs(pipeline, [file], [picture(1)], [0.7])
    assert_same(ours(tmp_path / "model", [calotype.ImagePrompt(file, picture(1), scale=0.7)]), reference)


@pytest.mark.parametrize("kind", range(8))
def test_a_union_of_sdxl(kind: int, tokenizer: Path, tmp_path: Path) -> None:
    """xinsir's, which read the text and the sizes as Kolors' UNet has them."""
    theirs = kolors(tmp_path / "model", tokenizer).unet
    of_unet = ("block_out_channels", "down_block_types", "attention_head_dim", "transformer_layers_per_block")
    net = union(tmp_path / "u", **{name: theirs.config[name] for name in (*of_unet, "cross_attention_dim")})
    model = calotype.load(tmp_path / "model", device="cpu")
    mine, unet = model.load_control(tmp_path / "u"), model.family.backbone
    assert isinstance(mine, ControlNet)
    assert isinstance(unet, UNet)
    rng = torch.Generator().manual_seed(1)
    pooled_width = theirs.config.projection_class_embeddings_input_dim - 6 * 8
    x, text = torch.randn(1, 4, 8, 12, generator=rng), torch.randn(1, 7, theirs.config.encoder_hid_dim, generator=rng)
    pooled, sizes = torch.randn(1, pooled_width, generator=rng), torch.tensor([[64.0, 96.0, 0.0, 0.0, 64.0, 96.0]])
    hint, time = to_tensor(picture(1, 96, 64))[None], torch.tensor([401.0])
    net.add_embedding = theirs.add_embedding
    with torch.inference_mode():
        down, middle = net(
            x,
            time,
            encoder_hidden_states=theirs.encoder_hid_proj(text),
            controlnet_cond=[hint],
            control_type=torch.eye(8)[kind : kind + 1],
            control_type_idx=[kind],
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
            return_dict=False,
        )
        vector = torch.cat([pooled, sinusoid(sizes, 8).flatten(1)], dim=1)
        reader = reader_for(mine, unet.config, unet)
        assert reader is unet
        prepared = mine.prepare_hinted([text], vector, time, [kind], reader)
        for got, wanted in zip(mine(x, *prepared.at(0), mine.embed(hint, kind)), [*down, middle], strict=True):
            assert_near(got, wanted)


def test_a_picture_led_by_a_union_of_sdxl(tokenizer: Path, tmp_path: Path) -> None:
    """By two kinds in one pass, on each rung, and by what a mask leaves."""
    theirs = kolors(tmp_path / "model", tokenizer).unet
    of_unet = ("block_out_channels", "down_block_types", "attention_head_dim", "transformer_layers_per_block")
    union(tmp_path / "u", **{name: theirs.config[name] for name in (*of_unet, "cross_attention_dim")})
    one = Control(kind="none:depth", model=tmp_path / "u", image=picture(1), scale=0.6)
    two = Control(kind="tile", model=tmp_path / "u", image=picture(2), start=0.3)
    drawn = [ours(tmp_path / "model", [], memory, controls=[one, two]) for memory in ("resident", "stream")]
    assert_same(*drawn)
    box = Image.new("L", (96, 64), 0)
    box.paste(255, (0, 0, 40, 40))
    inpaint = {"input_image": picture(3, 96, 64), "mask_image": box, "steps": 2}
    plain = ours(tmp_path / "model", [], **inpaint)
    led = ours(tmp_path / "model", [], controls=[Control(kind="inpaint", model=tmp_path / "u")], **inpaint)
    assert led.tobytes() != plain.tobytes()


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
