"""Adapters come and go: fused and apart give the same answers, and nothing of them is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import calotype
from calotype.errors import RequestError, UnexpectedKeys, WrongShape
from calotype.generate import Model
from calotype.loading.sharing import PROMPTS
from calotype.memory.ladder import RUNGS

FIELDS: dict[str, Any] = {"width": 64, "height": 64, "steps": 2, "seed": 3}
BLOCK = "transformer.transformer_blocks.0"


def picture(model: Model[Any], **more: object) -> NDArray[np.uint8]:
    return np.asarray(model.generate("a red fox", **FIELDS, **more)).copy()


def states() -> dict[str, dict[str, Tensor]]:
    """Files by name, one of each kind, that meet in some layers."""
    rng = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    clip = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    single = "lora_unet_single_blocks_1_linear1"
    return {
        "ink": {
            f"{BLOCK}.attn.to_q.lora_A.weight": draw(4, 256),
            f"{BLOCK}.attn.to_q.lora_B.weight": draw(256, 4),
            f"{clip}.lora_A.weight": draw(4, 64),
            f"{clip}.lora_B.weight": draw(64, 4),
        },
        "line": {
            f"{BLOCK}.attn.to_k.lora_A.weight": draw(4, 256),
            f"{BLOCK}.attn.to_k.lora_B.weight": draw(256, 4),
            f"{BLOCK}.attn.to_q.lora_A.weight": draw(2, 256),
            f"{BLOCK}.attn.to_q.lora_B.weight": draw(256, 2),
            f"{BLOCK}.attn.to_q.lora_magnitude_vector": draw(256).abs(),
        },
        "wash": {
            "lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a": draw(768, 2),
            "lora_unet_double_blocks_0_img_attn_qkv.hada_w1_b": draw(2, 256),
            "lora_unet_double_blocks_0_img_attn_qkv.hada_w2_a": draw(768, 2),
            "lora_unet_double_blocks_0_img_attn_qkv.hada_w2_b": draw(2, 256),
            f"{single}.lokr_w1": draw(4, 4),
            f"{single}.lokr_w2": draw(320, 64),
        },
        "wax": {
            "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": draw(768, 3),
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": draw(3, 256),
            "lora_unet_double_blocks_0_img_attn_qkv.dora_scale": draw(1, 256).abs(),
        },
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("lora")
    for name, state in states().items():
        tiny.save(made / f"{name}.safetensors", state)
    tiny.pipeline(made / "model")
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> Model[Any]:
    return calotype.load(folder / "model", device="cpu")


def weights(model: Model[Any]) -> dict[str, Tensor]:
    networks = (model.family.backbone, *model.family.encoders)
    return {f"{n} {key}": value for n, one in enumerate(networks) for key, value in one.state_dict().items()}


def answers(model: Model[Any]) -> Tensor:
    """What a layer with all kinds of changes says, and how bits of it look."""
    assert model.family.adapters is not None
    model.family.adapters.apply()
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(1, 5, 256, generator=rng)
    joint = model.family.backbone.get_submodule("joint.0.image.qkv")
    single = model.family.backbone.get_submodule("single.1.inward")
    with torch.inference_mode(), model.family.memory.holding(model.family.backbone):
        return torch.cat([joint(x), single(x)], dim=-1)


steps = st.lists(
    st.tuples(st.sampled_from(["attach", "scale", "detach"]), st.sampled_from(sorted(states())), st.floats(-2, 2)),
    max_size=8,
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps, end=st.permutations(sorted(states())))
@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_any_order_leaves_nothing_behind(
    memory: str, steps: list[tuple[str, str, float]], end: list[str], folder: Path
) -> None:
    model = MODELS.setdefault((folder, memory), calotype.load(folder / "model", device="cpu", memory=memory))
    plain = {key: value.clone() for key, value in weights(model).items() if not value.is_meta}
    before = answers(model)
    for do, name, scale in steps:
        if do == "attach" and name not in model.attached:
            assert model.attach(folder / f"{name}.safetensors", scale) == name
        elif do == "scale" and name in model.attached:
            model.scale(name, scale)
        elif do == "detach" and name in model.attached:
            model.detach(name)
    held = model.attached
    now = answers(model)
    # The same set in another order gives the same numbers, bit for bit.
    for name in [name for name in end if name in held]:
        model.detach(name)
    for name in [name for name in end if name in held]:
        model.attach(folder / f"{name}.safetensors", held[name])
    assert torch.equal(answers(model), now)
    for name in held:
        model.detach(name)
    assert torch.equal(answers(model), before)
    after = weights(model)
    assert all(torch.equal(after[key], value) for key, value in plain.items())


MODELS: dict[tuple[Path, str], Model[Any]] = {}


@pytest.mark.parametrize("name", states())
def test_apart_is_fused(name: str, folder: Path) -> None:
    found: list[Tensor] = []
    for memory in ("resident", "stream"):
        model = calotype.load(folder / "model", device="cpu", memory=memory)
        model.attach(folder / f"{name}.safetensors", 0.8)
        found.append(answers(model))
    plain = answers(calotype.load(folder / "model", device="cpu"))
    assert not torch.allclose(found[0], plain, atol=1e-2)
    assert torch.allclose(found[0], found[1], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("memory", RUNGS)
def test_a_picture_with_and_without(memory: str, folder: Path) -> None:
    model = calotype.load(folder / "model", device="cpu", memory=memory)
    plain = picture(model)
    model.attach(folder / "ink.safetensors", 3)
    model.attach(folder / "wash.safetensors", name="water")
    assert model.attached == {"ink": 3, "water": 1}
    changed = picture(model)
    assert not np.array_equal(changed, plain)
    model.scale("ink", 0)
    model.scale("water", 0)
    assert np.array_equal(picture(model), plain)
    model.scale("ink", 3)
    model.scale("water", 1)
    assert np.array_equal(picture(model), changed)
    model.detach("ink")
    model.detach("water")
    assert np.array_equal(picture(model), plain)


def test_lower_rungs_take_over_what_was_fused(folder: Path) -> None:
    model = calotype.load(folder / "model", device="cpu", memory="resident")
    plain = picture(model)
    model.attach(folder / "ink.safetensors", 3)
    changed = picture(model)
    assert model.family.memory.lower()
    assert model.family.memory.lower()
    assert np.abs(picture(model).astype(int) - changed).max() <= 1  # no longer merged
    model.detach("ink")
    assert np.array_equal(picture(model), plain)


def test_weights_in_fewer_bits_are_left_alone(folder: Path) -> None:
    model = calotype.load(folder / "model", device="cpu", storage={"transformer": "int8"}, memory="resident")
    before = answers(model)
    model.attach(folder / "ink.safetensors")
    model.attach(folder / "line.safetensors")
    model.attach(folder / "wax.safetensors")
    plain = calotype.load(folder / "model", device="cpu")
    for name in ("ink", "line", "wax"):
        plain.attach(folder / f"{name}.safetensors")
    near = (answers(model) - answers(plain)).norm() / answers(plain).norm()
    assert near < 0.02
    for name in ("line", "ink", "wax"):
        model.detach(name)
    assert torch.equal(answers(model), before)


def test_an_encoder_of_two_models_is_changed_for_one_of_them(folder: Path, tmp_path: Path) -> None:
    PROMPTS.clear()
    first = calotype.load(folder / "model", device="cpu", memory="resident")
    second = calotype.load(folder / "model", device="cpu", memory="resident")
    assert first.family.encoders[1] is second.family.encoders[1]
    rng = torch.Generator().manual_seed(2)
    v = "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wo"
    text = {
        f"{v}.lora_A.weight": torch.randn(4, 64, generator=rng),
        f"{v}.lora_B.weight": torch.randn(48, 4, generator=rng),
    }
    inner = {
        f"{BLOCK}.attn.to_q.lora_A.weight": torch.zeros(1, 256),
        f"{BLOCK}.attn.to_q.lora_B.weight": torch.zeros(256, 1),
    }
    file = tiny.save(tmp_path / "words.safetensors", {**text, **inner})
    plain = picture(second)
    first.attach(file, 30)
    changed = picture(first)
    assert not np.array_equal(changed, plain)
    assert np.array_equal(picture(second), plain)
    PROMPTS.clear()
    assert np.array_equal(picture(second), plain)  # encoded anew
    assert np.array_equal(picture(first), changed)
    first.detach("words")
    assert np.array_equal(picture(first), plain)


def test_a_request_s_loras_are_there_for_it_alone(folder: Path) -> None:
    model = calotype.load(folder / "model", device="cpu")
    plain = picture(model)
    ink, wash = folder / "ink.safetensors", folder / "wash.safetensors"
    model.attach(ink, 3)
    model.attach(wash)
    both = picture(model)
    model.detach("wash")
    one = picture(model)
    assert np.array_equal(picture(model, loras=[{"file": str(wash)}]), both)
    assert model.attached == {"ink": 3}
    assert np.array_equal(picture(model), one)
    model.detach("ink")
    drawn = model.generate("a red fox", loras=[calotype.Lora(ink, 3), calotype.Lora(wash)], **FIELDS)
    assert np.abs(np.asarray(drawn).astype(int) - both).max() <= 1  # added up in another order
    assert '"loras": [{"file"' in drawn.info["calotype"]
    assert np.array_equal(picture(model), plain)
    with pytest.raises(RequestError, match="each file once"):
        picture(model, loras=[calotype.Lora(ink), calotype.Lora(ink)])


def test_a_picture_tells_what_was_attached(folder: Path, tmp_path: Path) -> None:
    model = calotype.load(folder / "model", device="cpu")
    ink, wash = str(folder / "ink.safetensors"), str(folder / "wash.safetensors")
    model.attach(ink, 2, name="black")
    model.attach(wash, 0)  # without effect
    drawn = model.generate("a red fox", loras=[calotype.Lora(ink, 0.5)], **FIELDS)
    assert isinstance(drawn, Image.Image)
    calotype.save(drawn, tmp_path / "fox.png")
    request, record = calotype.read_metadata(tmp_path / "fox.png")
    assert record["attached"] == [{"name": "black", "file": ink, "scale": 2.0}]
    assert request.loras == (calotype.Lora(ink, 2.5),)
    for name in ("black", "wash"):
        model.detach(name)
    again = np.asarray(model.generate(request)).astype(int)
    assert np.abs(again - np.asarray(drawn)).max() <= 1  # added up in another order
    plain = model.generate("a red fox", **FIELDS)
    assert isinstance(plain, Image.Image)
    assert "attached" not in plain.info["calotype"]


def test_a_request_s_file_that_was_written_anew_is_read_anew(folder: Path, tmp_path: Path) -> None:
    model = calotype.load(folder / "model", device="cpu")
    file = tmp_path / "style.safetensors"
    for name in ("ink", "line"):
        file.write_bytes((folder / f"{name}.safetensors").read_bytes())
        drawn = picture(model, loras=[calotype.Lora(file)])
        assert np.array_equal(drawn, picture(model, loras=[calotype.Lora(folder / f"{name}.safetensors")]))
        assert np.array_equal(drawn, picture(model, loras=[calotype.Lora(file)]))


def test_what_cannot_be_changes_nothing(folder: Path, tmp_path: Path, model: Model[Any]) -> None:
    before = answers(model)
    unet = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    other = tiny.save(
        tmp_path / "sd1.safetensors",
        {f"{unet}.lora_up.weight": torch.ones(320, 2), f"{unet}.lora_down.weight": torch.ones(2, 768)},
    )
    with pytest.raises(UnexpectedKeys, match=r"fits Stable Diffusion 1\.x"):
        model.attach(other)
    wide = tiny.save(
        tmp_path / "wide.safetensors",
        {
            f"{BLOCK}.attn.to_q.lora_A.weight": torch.ones(2, 3072),
            f"{BLOCK}.attn.to_q.lora_B.weight": torch.ones(3072, 2),
        },
    )
    with pytest.raises(WrongShape, match=r"other sizes, or damaged$"):
        model.attach(wide)
    for layer, title in (("attn.to_q", "Stable Diffusion 3"), ("attn.to_x", "")):
        state = {
            f"{BLOCK}.{layer}.lora_A.weight": torch.ones(2, 1536),
            f"{BLOCK}.{layer}.lora_B.weight": torch.ones(1536, 2),
        }
        with pytest.raises(
            WrongShape if title else UnexpectedKeys, match=f"fits {title}" if title else "calotype info"
        ):
            model.attach(tiny.save(tmp_path / "large.safetensors", state))
    for scale in (float("nan"), 101, "strong"):
        with pytest.raises(RequestError, match="scale"):
            model.attach(folder / "ink.safetensors", scale)
    for name in ("", " ", "\0x", "a\nb", 5):
        with pytest.raises(RequestError, match="text that can be read"):
            model.attach(folder / "ink.safetensors", name=name)  # pyright: ignore[reportArgumentType]
    assert model.attach(folder / "ink.safetensors", np.float32(0.5)) == "ink"  # pyright: ignore[reportArgumentType]
    assert type(model.attached["ink"]) is float
    model.detach("ink")
    assert model.attach(folder / "ink.safetensors", 0) == "ink"
    assert model.attach(folder / "ink.safetensors", 0) == "ink-2"
    with pytest.raises(RequestError, match="a name other than"):
        model.attach(folder / "ink.safetensors", name="ink")
    with pytest.raises(RequestError, match="attached: ink, ink-2"):
        model.detach("line")
    for name in ("ink", "ink-2"):
        model.detach(name)
    with pytest.raises(RequestError, match="nothing is attached"):
        model.scale("ink", 1)
    assert torch.equal(answers(model), before)


def test_not_while_a_job_runs(folder: Path, model: Model[Any]) -> None:
    events = model.stream(calotype.Request(prompt="a red fox", **FIELDS))
    next(events)
    with pytest.raises(RequestError, match="between jobs"):
        model.attach(folder / "ink.safetensors")
    events.close()
    model.attach(folder / "ink.safetensors")
    model.detach("ink")
