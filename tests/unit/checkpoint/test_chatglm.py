from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch
from tiny_glm import CHATGLM as CONFIG
from tiny_glm import PIECES, tokenizer_model
from torch import Tensor

from calotype.checkpoint.chatglm import CHATGLM, read_glm_tokenizer
from calotype.checkpoint.detect import detect
from calotype.checkpoint.files import Weights
from calotype.checkpoint.layouts import Found
from calotype.errors import DamagedFile, LoadError, MissingKeys, UnexpectedKeys, UnsupportedModel, WrongShape
from calotype.text.chatglm import CHATGLM3_6B, ChatGlmConfig

ENDS = ("encoder.final_layernorm.weight", "output_layer.weight", "rotary_pos_emb.inv_freq")
LAYOUTS = {"transformers": "transformer.", "diffusers": ""}


def state_of(name: str, config: ChatGlmConfig = CONFIG) -> dict[str, Tensor]:
    """A file with all that a language model's has, in the layout of this name."""
    return tiny.tensors(CHATGLM, name, config, extras=tuple(LAYOUTS[name] + end for end in ENDS))


def found(path: Path, state: dict[str, Tensor], settings: dict[str, Any] | None = None) -> Found[Any]:
    tiny.save(path / "x.safetensors", state)
    detected = detect(Weights.of("x", [path / "x.safetensors"]), (CHATGLM,), (), settings or {})
    assert detected.rest == ()
    return detected.found[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_are_recognised_and_their_shapes_are_the_configuration(tmp_path: Path, name: str) -> None:
    part = found(tmp_path, state_of(name))
    assert part.title == f"chatglm/{name}"
    assert part.prefix == ""
    assert part.config() == CONFIG


def test_a_head_has_128_channels_unless_something_says_otherwise(tmp_path: Path) -> None:
    wide = replace(CONFIG, heads=4, groups=2, head_width=128)
    bare = {key: value for key, value in state_of("diffusers", wide).items() if key not in ENDS}
    assert found(tmp_path, bare).config() == wide
    assert found(tmp_path, bare, {"kv_channels": 64}).config() == replace(wide, heads=8, groups=4, head_width=64)


@pytest.mark.parametrize("name", LAYOUTS)
def test_saving_what_was_loaded_gives_the_same_tensors(tmp_path: Path, name: str) -> None:
    state = state_of(name)
    part = found(tmp_path, state)
    network, binding = part.bind(part.config())
    network.load_state_dict(binding.load(part.weights), assign=True)
    saved = dict(binding.save(network.state_dict()))
    assert set(state) - set(saved) == {LAYOUTS[name] + end for end in ENDS}
    for key, value in saved.items():
        assert torch.equal(value, state[key])


def test_both_layouts_are_one_network(tmp_path: Path) -> None:
    loaded: list[dict[str, Tensor]] = []
    for name, prefix in LAYOUTS.items():
        state = {prefix + key: value for key, value in state_of("diffusers").items()}
        part = found(tmp_path / name, state)
        assert part.title == f"chatglm/{name}"
        loaded.append(part.bind(part.config())[1].load(part.weights))
    one, other = loaded
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_written_configuration_is_the_one_read(tmp_path: Path, name: str) -> None:
    layout = CHATGLM.layout(name)
    assert layout is not None
    assert layout.settings is not None
    written = layout.settings(CONFIG)
    bare = {key: value for key, value in state_of(name).items() if not key.endswith("inv_freq")}
    assert found(tmp_path, bare, written).config() == CONFIG


@pytest.mark.parametrize(
    "setting",
    [
        {"add_bias_linear": True},
        {"add_qkv_bias": False},
        {"apply_residual_connection_post_layernorm": True},
        {"layernorm_epsilon": 1e-6},
        {"multi_query_attention": False},
        {"pre_seq_len": 128},
        {"quantization_bit": 4},
        {"rmsnorm": False},
        {"rope_ratio": 50},
    ],
)
def test_other_kinds_of_glm_are_refused(tmp_path: Path, setting: dict[str, object]) -> None:
    part = found(tmp_path, state_of("diffusers"), setting)
    with pytest.raises(UnsupportedModel, match=next(iter(setting))):
        part.config()


@pytest.mark.parametrize("width", [0, 48, 200])
def test_nonsense_is_damage(tmp_path: Path, width: int) -> None:
    with pytest.raises(DamagedFile, match="x: its shapes or its config.json make no chatglm/diffusers"):
        found(tmp_path, state_of("diffusers"), {"kv_channels": width}).config()


def test_incomplete_and_strange_files_are_refused(tmp_path: Path) -> None:
    state = state_of("diffusers")
    del state["encoder.layers.1.mlp.dense_4h_to_h.weight"]
    part = found(tmp_path / "a", state)
    with pytest.raises(MissingKeys, match="dense_4h_to_h"):
        part.bind(part.config())[1].load(part.weights)
    state = state_of("diffusers") | {"encoder.layers.1.self_attention.dense.bias": torch.zeros(48)}
    part = found(tmp_path / "b", state)
    with pytest.raises(UnexpectedKeys, match="dense.bias"):
        part.bind(part.config())[1].load(part.weights)
    state = state_of("diffusers") | {"encoder.layers.2.mlp.dense_4h_to_h.weight": torch.zeros(48, 28)}
    part = found(tmp_path / "c", state)
    with pytest.raises(WrongShape, match="dense_4h_to_h"):
        part.bind(part.config())[1].load(part.weights)


# The tokenizer


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert read_glm_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.model").mkdir()
    assert read_glm_tokenizer(tmp_path) is None


def test_a_tokenizer_is_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model())
    tokenizer = read_glm_tokenizer(tmp_path, CONFIG.vocabulary)
    assert tokenizer is not None
    assert tokenizer.vocabulary == PIECES + 9


@pytest.mark.parametrize("vocabulary", [PIECES + 8, PIECES + 9 + 512, CHATGLM3_6B.vocabulary])
def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, vocabulary: int) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model())
    with pytest.raises(LoadError, match=f"tokenizer.model: this tokenizer has 299 tokens.*{vocabulary:,}"):
        read_glm_tokenizer(tmp_path, vocabulary)


def test_damaged_tokenizers_are_refused(tmp_path: Path) -> None:
    whole = tokenizer_model()
    path = tmp_path / "tokenizer.model"
    for content in (b"", b"x", whole[:1000], whole[:-1], b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"):
        path.write_bytes(content)
        with pytest.raises(DamagedFile, match="tokenizer.model: not a sentencepiece model"):
            read_glm_tokenizer(tmp_path, CONFIG.vocabulary)
    with path.open("wb") as file:
        file.truncate(17 * 2**20)
    with pytest.raises(DamagedFile, match="17,825,792 bytes"):
        read_glm_tokenizer(tmp_path, CONFIG.vocabulary)


def test_the_tokenizer_of_t5_is_not_chatglms(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("diffsynth")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the tokenizers that diffsynth 1.1 ships")
    root = Path(next(iter(spec.submodule_search_locations))) / "tokenizer_configs"
    (tmp_path / "tokenizer.model").write_bytes((root / "flux" / "tokenizer_2" / "spiece.model").read_bytes())
    with pytest.raises(LoadError, match="belongs to another model"):
        read_glm_tokenizer(tmp_path)
