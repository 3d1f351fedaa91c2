from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch

from calotype.checkpoint.autoencoders import AUTOENCODER, TINY_AUTOENCODER
from calotype.checkpoint.files import Entry, SafetensorsFile, Shape, Weights
from calotype.checkpoint.layouts import Found, Part, Signature
from calotype.checkpoint.text_encoders import CLIP, T5
from calotype.families.flux.keys import TRANSFORMER
from calotype.loading import Description, describe, manifest

REFINER = Signature(has=("label_emb.0.0.weight",), shapes=(("label_emb.0.0.weight", (1280, 2816)),))


def file_of(path: Path, shapes: dict[str, Shape]) -> Path:
    """A sound file of these shapes, sparse on disk: nothing reads its tensors."""
    from calotype.checkpoint.writing import Planned, header

    plan = [Planned(key, torch.float16, shape) for key, shape in shapes.items()]
    head = header(plan, {})
    size = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)
    return path


def described(path: Path, shapes: dict[str, Shape]) -> Description:
    return describe(file_of(path / "x.safetensors", shapes))


def test_a_signature_says_why_not() -> None:
    assert REFINER.objection({"label_emb.0.0.weight": (1280, 2816)}) is None
    assert REFINER.objection({}) == "label_emb.0.0.weight is missing"
    refiner = {"label_emb.0.0.weight": (1536, 2560)}
    assert REFINER.objection(refiner) == "label_emb.0.0.weight is (1536, 2560), not (1280, 2816)"
    assert Signature(has=("a",), lacks=("b",)).objection({"a": (1,), "b": (1,)}) == "b is present"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "transformer."])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_transformer_is_found_under_any_prefix(tmp_path: Path, prefix: str, layout: str) -> None:
    state = tiny.under(prefix, tiny.tensors(TRANSFORMER, layout, tiny.FLUX))
    seen = describe(tiny.save(tmp_path / "x.safetensors", state))
    assert (seen.family, seen.variant, seen.layout, seen.kind) == ("flux", "dev", layout, "part")
    (part,) = seen.parts
    assert (part.name, part.prefix, part.tensors) == ("transformer", prefix, len(state))
    assert part.parameters == sum(tensor.numel() for tensor in state.values())
    assert part.bytes == 4 * part.parameters
    assert part.dtypes == {"F32": len(state)}
    assert seen.supported
    assert "clip, t5, vae" in seen.note


@pytest.mark.parametrize(
    ("part", "layout", "config", "prefix"),
    [
        (CLIP, "transformers", tiny.CLIP_TEXT, ""),
        (CLIP, "transformers-bare", tiny.CLIP_TEXT, ""),
        (CLIP, "transformers", tiny.CLIP_TEXT, "cond_stage_model.transformer."),
        (T5, "transformers", tiny.T5_TEXT, ""),
        (AUTOENCODER, "original", tiny.VAE, ""),
        (AUTOENCODER, "original", tiny.VAE, "first_stage_model."),
        (AUTOENCODER, "diffusers", tiny.VAE, ""),
        (TINY_AUTOENCODER, "diffusers-tiny", tiny.TINY_VAE, ""),
    ],
)
def test_a_part_alone_is_described(tmp_path: Path, part: Part[Any], layout: str, config: object, prefix: str) -> None:
    seen = describe(tiny.save(tmp_path / "x.safetensors", tiny.everything()))
    assert (seen.family, seen.kind, seen.note) == ("flux", "model", "complete")
    assert {part.name: part.prefix for part in seen.parts} == {
        "transformer": "model.diffusion_model.",
        "vae": "vae.",
        "clip": "text_encoders.clip_l.transformer.",
        "t5": "text_encoders.t5xxl.transformer.",
        "other": "",
    }


TEXT_1 = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
TEXT_2 = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
THEIR_TEXT_1 = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
THEIR_TEXT_2 = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
COMING: dict[str, dict[str, Shape]] = {
    "sd2 2.x": {TEXT_1: (320, 1024), "out.2.weight": (4, 320, 3, 3)},
    "sdxl refiner": {"label_emb.0.0.weight": (1536, 2560), TEXT_2: (768, 1280)},
    "sd2 2.x diffusers": {THEIR_TEXT_1: (320, 1024), "conv_out.weight": (4, 320, 3, 3)},
}


@pytest.mark.parametrize("name", COMING)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_families_to_come_are_named(tmp_path: Path, name: str, prefix: str) -> None:
    seen = described(tmp_path, {prefix + key: shape for key, shape in COMING[name].items()})
    family, variant, *layout = name.split()
    assert (seen.family, seen.variant, seen.supported) == (family, variant, False)
    assert seen.note.startswith("not supported yet")
    assert seen.layout == (layout[0] if layout else "original")


def test_a_stable_diffusion_file_shows_all_its_parts(tmp_path: Path) -> None:
    seen = described(tmp_path, {**dict(manifest("sd1")), "model_ema.decay": ()})
    assert (seen.family, seen.variant, seen.kind, seen.supported) == ("sd1", "1.x", "model", True)
    assert {part.name for part in seen.parts} == {"unet", "clip", "vae", "other"}


LORAS: dict[str, tuple[str, str | None, dict[str, Shape]]] = {
    "kohya flux": ("kohya", "flux", {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 3072)}),
    "diffusers flux": (
        "diffusers",
        "flux",
        {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (4, 3072)},
    ),
    "bfl flux": ("bfl", "flux", {"double_blocks.0.img_attn.qkv.lora_A.weight": (4, 3072)}),
    "kohya sd1": (
        "kohya",
        "sd1",
        {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 768)},
    ),
    "kohya sdxl": (
        "kohya",
        "sdxl",
        {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 2048)},
    ),
    "kohya sdxl text": ("kohya", "sdxl", {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (4, 1280)}),
    "peft sdxl": (
        "diffusers",
        "sdxl",
        {"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 2048)},
    ),
    "old diffusers sd1": (
        "diffusers",
        "sd1",
        {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight": (4, 768)},
    ),
    "sd3": ("diffusers", "sd3", {"transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight": (4, 1536)}),
    "hunyuan": ("peft", "hunyuan_dit", {"blocks.0.attn1.Wqkv.lora_A.default.weight": (4, 1408)}),
    "loha": ("lycoris", None, {"lora_unet_mid_block.hada_w1_a": (4, 4)}),
    "lokr": ("lycoris", None, {"lycoris_x.lokr_w1": (4, 4)}),
}


@pytest.mark.parametrize("name", LORAS)
def test_loras_are_recognised(tmp_path: Path, name: str) -> None:
    spelling, family, shapes = LORAS[name]
    seen = described(tmp_path, shapes)
    assert (seen.kind, seen.family, seen.supported) == ("lora", family, False)
    if name != "loha":
        assert seen.layout == spelling


OTHERS: dict[str, tuple[str, str | None, dict[str, Shape]]] = {
    "controlnet sd1": ("controlnet", "sd1", {"control_model." + TEXT_1: (320, 768)}),
    "controlnet diffusers": (
        "controlnet",
        "sdxl",
        {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), THEIR_TEXT_2: (640, 2048)},
    ),
    "controlnet flux": (
        "controlnet",
        "flux",
        {"controlnet_blocks.0.weight": (3072, 3072), "transformer_blocks.0.attn.add_q_proj.weight": (3072, 3072)},
    ),
    "controlnet sd3": ("controlnet", "sd3", {"controlnet_blocks.0.weight": (1, 1), "pos_embed_input.proj.bias": (1,)}),
    "ip adapter": ("ip_adapter", "sd1", {"image_proj.norm.weight": (768,), "ip_adapter.1.to_k_ip.weight": (320, 768)}),
    "embedding": ("embedding", None, {"emb_params": (4, 768)}),
    "image encoder": ("image_encoder", None, {"vision_model.embeddings.class_embedding": (1024,)}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_attachments_are_recognised(tmp_path: Path, name: str) -> None:
    kind, family, shapes = OTHERS[name]
    seen = described(tmp_path, shapes)
    assert (seen.kind, seen.family, seen.supported) == (kind, family, False)


def test_quantised_models_are_named(tmp_path: Path) -> None:
    state = tiny.tensors(TRANSFORMER, "original", tiny.FLUX)
    state["double_blocks.0.img_attn.qkv.weight.absmax"] = torch.zeros(3)
    seen = describe(tiny.save(tmp_path / "x.safetensors", state))
    assert not seen.supported
    assert "bitsandbytes" in seen.note


def test_what_nobody_claims_is_unknown_with_reasons(tmp_path: Path) -> None:
    seen = described(tmp_path, {"double_blocks.0.img_attn.qkv.weight": (9, 3)})
    assert (seen.kind, seen.family, seen.supported) == ("unknown", None, False)
    assert "not transformer/original: double_blocks.0.img_mod.lin.weight is missing" in seen.note
    assert described(tmp_path, {"layers.0.weight": (1,)}).note == "no known model"


def test_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(60))
    seen = describe(tmp_path / "x.gguf")
    assert not seen.supported
    assert "GGUF" in seen.note


def test_half_a_tiny_autoencoder_is_named(tmp_path: Path) -> None:
    state = tiny.tensors(TINY_AUTOENCODER, "taesd", tiny.TINY_VAE)
    half = {key.removeprefix("decoder."): value for key, value in state.items() if key.startswith("decoder.")}
    seen = describe(tiny.save(tmp_path / "taef1_decoder.safetensors", half))
    assert (seen.kind, seen.supported) == ("part", False)
    assert "its encoder is in another file" in seen.note


def test_configurations_are_read_from_shapes(tmp_path: Path) -> None:
    for part, layout_name, config in (
        (TRANSFORMER, "original", tiny.FLUX),
        (TRANSFORMER, "diffusers", tiny.FLUX),
        (CLIP, "transformers", tiny.CLIP_TEXT),
        (T5, "transformers", tiny.T5_TEXT),
        (AUTOENCODER, "original", tiny.VAE),
        (AUTOENCODER, "diffusers", tiny.VAE),
        (TINY_AUTOENCODER, "taesd", tiny.TINY_VAE),
        (TINY_AUTOENCODER, "diffusers-tiny", tiny.TINY_VAE),
    ):
        layout = part.layout(layout_name)
        assert layout is not None
        path = tiny.save(tmp_path / "x.safetensors", tiny.tensors(part, layout_name, config))
        found = Found(part, layout, "", Weights.of("x", [path]))
        assert (
            found.config({"scaling_factor": config.scale, "shift_factor": config.shift} if part.name == "vae" else {})
            == config
        )


def test_detection_is_quick_for_many_keys() -> None:
    import time

    from calotype.checkpoint.detect import detect
    from calotype.families import COMING
    from calotype.loading.gather import PARTS

    entry = Entry(object.__new__(SafetensorsFile), "x", torch.float16, (1, 1), 0, 2)
    weights = Weights("x", {f"block.{number}.inner.layer.weight": entry for number in range(100_000)})
    start = time.process_time()
    assert detect(weights, PARTS, COMING, {}).found == ()
    assert time.process_time() - start < 20
