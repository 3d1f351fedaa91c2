"""ControlNets of tiny random Hunyuan-DiTs, saved by diffusers: the same pictures here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanDiT2DControlNetModel, HunyuanDiT2DMultiControlNetModel, HunyuanDiTControlNetPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from test_flux_controlnets import apart, means
from tiny_flux import randomised
from tiny_hunyuan import hunyuan

import calotype
from calotype.errors import WrongShape
from calotype.families.hunyuan_dit.controlnet import CONTROL
from calotype.families.hunyuan_dit.controlnet import HunyuanControlNet as Network
from calotype.request import Control

__all__ = ["means"]  # hints are what the encoder says on average

PROMPT, NEGATIVE = "a red fox in the snow", "blue dog"
SIZE: Any = {"width": 64, "height": 64}


def controlnet(folder: Path, seed: int = 7, *, styled: bool, **more: Any) -> Any:  # noqa: ANN401
    fields: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "hidden_size": 48,
        "transformer_num_layers": 6,
        "mlp_ratio": 4.3637,
        "cross_attention_dim": 32,
        "cross_attention_dim_t5": 48,
        "pooled_projection_dim": 40,
        "use_style_cond_and_image_meta_size": styled,
        **more,
    }
    model = HunyuanDiT2DControlNetModel(**fields)
    randomised(model, seed, spread=0.14)
    model.save_pretrained(folder)
    return model


def picture(seed: int) -> Image.Image:
    noise = (torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(seed)) * 255).byte().numpy()
    return Image.fromarray(noise).resize((SIZE["width"], SIZE["height"]), Image.Resampling.NEAREST)


def theirs(pipeline: Any, network: Any, image: Any, **settings: Any) -> Image.Image:  # noqa: ANN401
    parts = {"requires_safety_checker": False, **pipeline.components}
    led = HunyuanDiTControlNetPipeline(**parts, controlnet=network)
    led.set_progress_bar_config(disable=True)
    fields = {"num_inference_steps": 5, "guidance_scale": 4.0, "use_resolution_binning": False, **SIZE, **settings}
    noise = torch.Generator().manual_seed(5)
    return led(PROMPT, negative_prompt=NEGATIVE, control_image=image, generator=noise, **fields).images[0]


def ours(folder: Path, controls: list[Control], memory: str = "auto", **fields: Any) -> Image.Image:  # noqa: ANN401
    model = calotype.load(folder, device="cpu", memory=memory)
    asked: Any = {"seed": 5, "steps": 5, "cfg_scale": 4.0, "negative_prompt": NEGATIVE, **SIZE}
    drawn = model.generate(PROMPT, controls=controls, **asked | fields)
    assert isinstance(drawn, Image.Image)
    return drawn


def control(folder: Path, seed: int, **more: Any) -> Control:  # noqa: ANN401
    return Control(kind="none", model=str(folder), image=picture(seed), **more)


@pytest.mark.parametrize("styled", [True, False], ids=["1.1", "1.2"])
def test_one_on_every_rung(styled: bool, tmp_path: Path) -> None:
    pipeline = hunyuan(tmp_path / "dit", styled=styled)
    network = controlnet(tmp_path / "a", styled=styled)
    reference = theirs(pipeline, network, picture(1), controlnet_conditioning_scale=0.7)
    led = [control(tmp_path / "a", 1, scale=0.7)]
    for memory in ("resident", "components", "stream"):
        assert apart(ours(tmp_path / "dit", led, memory), reference) <= 1
    assert apart(ours(tmp_path / "dit", []), reference) > 8  # it does count


def test_two_at_once(tmp_path: Path) -> None:
    pipeline = hunyuan(tmp_path / "dit", styled=False)
    networks = [controlnet(tmp_path / name, seed, styled=False) for seed, name in enumerate("ab")]
    reference = theirs(
        pipeline,
        HunyuanDiT2DMultiControlNetModel(networks),
        [picture(1), picture(2)],
        controlnet_conditioning_scale=[0.7, 0.4],
    )
    led = [control(tmp_path / "a", 1, scale=0.7), control(tmp_path / "b", 2, scale=0.4)]
    assert apart(ours(tmp_path / "dit", led), reference) <= 1


def test_tencent_s_own_names_give_the_same(tmp_path: Path) -> None:
    hunyuan(tmp_path / "dit", styled=False)
    controlnet(tmp_path / "a", styled=False)
    loaded = calotype.load(tmp_path / "dit", device="cpu", memory="resident").load_control(tmp_path / "a")
    assert isinstance(loaded, Network)
    layout = CONTROL.layout("original")
    assert layout is not None
    _, binding = CONTROL.bind(layout, loaded.config)
    state = dict(binding.save(loaded.state_dict()))
    assert {"before_proj.weight", "after_proj_list.1.bias", "blocks.0.attn1.Wqkv.weight"} <= set(state)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "pytorch_model.safetensors")
    again = control(tmp_path / "pytorch_model.safetensors", 1)
    assert apart(ours(tmp_path / "dit", [again]), ours(tmp_path / "dit", [control(tmp_path / "a", 1)])) == 0
    assert len(load_file(tmp_path / "a" / "diffusion_pytorch_model.safetensors")) > len(state)  # q, k and v apart


def test_one_of_another_version_is_refused(tmp_path: Path) -> None:
    hunyuan(tmp_path / "dit", styled=True)
    controlnet(tmp_path / "a", styled=False)
    with pytest.raises(WrongShape, match=r"made for version 1\.2, where the transformer is of 1\.0 or 1\.1"):
        ours(tmp_path / "dit", [control(tmp_path / "a", 1)])
