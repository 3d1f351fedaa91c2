"""ControlNets as files: what is refused says by which name it is known, and what to give instead."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError
from strangers import SD1, SDXL, Shapes, controlnet, controlnet_diffusers, header_only, unet

from calotype.errors import SourceNotFound, UnknownModel, UnsupportedModel
from calotype.loading import describe
from calotype.loading.controls import _found

WHOLE = "give the whole ControlNet"
FLUX_INSTEAD = "give one of InstantX"


def control_lora() -> Shapes:
    """As Stability AI publishes for SDXL: most matrices of the way down in two."""
    shapes: Shapes = {"lora_controlnet": (), "input_hint_block.0.weight": (16, 3, 3, 3)}
    for key, shape in unet("original", SDXL).items():
        if key.startswith(("time_embed.", "label_emb.", "input_blocks.", "middle_block.")):
            if key.endswith(".weight") and len(shape) > 1:
                stem = key.removesuffix("weight")
                shapes |= {f"{stem}up": (shape[0], 128), f"{stem}down": (128, *shape[1:])}
            else:
                shapes[key] = shape
    return shapes


def flux(*more: str) -> Shapes:
    return dict.fromkeys(("double_blocks.0.img_attn.qkv.weight", "img_in.weight", *more), (64, 64))


# What it is, its family, what is said: in "info" and on loading.
STRANGERS: dict[str, tuple[Shapes, str | None, str]] = {
    "a difference": ({**controlnet(), "difference": ()}, "sd1", rf"\(difference\) for sd1.*UNet's own; {WHOLE}"),
    "a difference without a prefix": (
        {**{key.removeprefix("control_model."): shape for key, shape in controlnet().items()}, "difference": ()},
        "sd1",
        rf"\(difference\) for sd1.*UNet's own; {WHOLE}",
    ),
    "a Control-LoRA": (control_lora(), "sdxl", rf"\(Control-LoRA\) for sdxl.*cut into two.*; {WHOLE}"),
    "Stability AI's own for SD 3.5": (
        {
            "control_type": (),
            "controlnet_blocks.0.weight": (64, 64),
            "pos_embed_input.proj.weight": (64, 16, 2, 2),
            "transformer_blocks.0.attn.qkv.weight": (192, 64),
            "y_embedder.mlp.0.weight": (64, 64),
        },
        "sd3",
        r"\(original, Stability AI's\) for sd3.*diffusers' layout",
    ),
    "XLabs'": (
        flux("controlnet_blocks.0.weight", "input_hint_block.0.weight", "pos_embed_input.weight"),
        "flux",
        rf"\(XLabs\) for flux.*{FLUX_INSTEAD}",
    ),
    "XLabs' for diffusers": (
        dict.fromkeys(
            (
                "controlnet_blocks.0.weight",
                "controlnet_x_embedder.weight",
                "input_hint_block.conv_in.weight",
                "time_text_embed.text_embedder.linear_1.weight",
                "transformer_blocks.0.attn.add_q_proj.weight",
            ),
            (64, 64),
        ),
        "flux",
        rf"\(XLabs\) for flux.*{FLUX_INSTEAD}",
    ),
    "MistoLine's for FLUX": (
        flux("controlnet_blocks.0.linear.weight", "input_hint_block.0.weight"),
        "flux",
        rf"\(MistoLine\) for flux.*{FLUX_INSTEAD}",
    ),
    "ControlNet-LLLite": (
        {"lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight": (32, 640)},
        "sdxl",
        rf"\(lllite\) for sdxl.*{WHOLE}",
    ),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_what_does_not_run_is_named(name: str, tmp_path: Path) -> None:
    shapes, family, said = STRANGERS[name]
    path = header_only(tmp_path / "x.safetensors", shapes)
    seen = describe(path)
    assert (seen.kind, seen.family, seen.supported) == ("controlnet", family, False)
    assert "does not run here yet: " in seen.note
    with pytest.raises(UnsupportedModel, match=rf"a ControlNet {said}"):
        _found(str(path))


@pytest.mark.parametrize(
    "shapes",
    [
        {"body.0.in_conv.weight": (16, 192, 1, 1), "body.0.body.0.block1.weight": (16, 16, 3, 3)},
        {
            "style_embedding": (1, 8, 1024),
            "transformer_layes.0.attn.in_proj_weight": (3072, 1024),
        },
    ],
)
def test_small_t2i_adapters_are_named(shapes: Shapes, tmp_path: Path) -> None:
    """Those of colours, whose first layer is another, and of style."""
    path = header_only(tmp_path / "x.safetensors", shapes)
    assert describe(path).kind == "t2i_adapter"
    with pytest.raises(UnknownModel, match=r"a T2I-Adapter.*and no ControlNet"):
        _found(str(path))


def test_a_whole_one_is_none_of_them(tmp_path: Path) -> None:
    found = _found(str(header_only(tmp_path / "x.safetensors", controlnet())))
    assert found.config().unet.widths == SD1.widths


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("control_v11p_sd15_canny_fp16.safetensors", None),
        ("sd15/diffusion_pytorch_model.safetensors", {"attention_head_dim": 4}),
        ("sd15/diffusion_pytorch_model.fp16.safetensors", {"attention_head_dim": 4}),
        ("diffusion_pytorch_model_promax.safetensors", {"attention_head_dim": 16}),
    ],
)
def test_a_file_of_a_hub_model(
    file: str, settings: dict[str, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the configuration beside it, where its name says that there is one."""
    hub = tmp_path / "hub"
    header_only(hub / file, controlnet() if settings is None else controlnet_diffusers())
    if settings is not None:
        (hub / file).with_name("config.json").write_text(json.dumps(settings))
    fetched: list[str] = []

    def hf_hub_download(name: str, file: str, *, local_files_only: bool) -> str:
        fetched.append(file)
        if name != "org/name" or not (hub / file).is_file():
            raise EntryNotFoundError(file)
        return str(hub / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    config = _found(f"org/name/{file}").config()
    assert config.unet.heads == ((settings or {}).get("attention_head_dim", 8),) * 4
    assert len(fetched) == 1 + (settings is not None)
    with pytest.raises(SourceNotFound, match="the hub model org/name has no file other.pth"):
        _found("org/name/other.pth")
