from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import tiny_checkpoints as tiny

from calotype.checkpoint.tokenizer_files import kind, prompt_tokenizer, read_tokenizer
from calotype.errors import DamagedFile, LoadError

PROMPTS = (
    "a red fox in the snow",
    "",
    "  spaces   and\nlines\t",
    "It's 3 o'clock, isn't it? 100% (yes)!",
    "café CRÈME naïve ﬁancé",
    "雪の中の狐 🦊 — «guillemets»",
    "a" * 300,
    "<|endoftext|> <|startoftext|> </s> <pad>",
)


def real(name: str) -> Path:
    """Published tokenizers, where a library that ships them is installed."""
    spec = importlib.util.find_spec("diffsynth")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the tokenizers that diffsynth 1.1 ships")
    return Path(next(iter(spec.submodule_search_locations))) / "tokenizer_configs" / "flux" / name


@pytest.mark.parametrize("prompt", PROMPTS)
def test_clip_from_its_original_files_equals_transformers(prompt: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = real("tokenizer_1")
    tokenizer = read_tokenizer(folder)
    assert tokenizer is not None
    ours = prompt_tokenizer(tokenizer, folder, "clip", 49408, {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1})
    assert (ours.start, ours.end, ours.padding) == (49406, 49407, 49407)
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    wanted = theirs(prompt, padding="max_length", max_length=77, truncation=True).input_ids
    assert ours(prompt, 77)[0].tolist() == wanted


@pytest.mark.parametrize("prompt", PROMPTS)
def test_t5_equals_transformers(prompt: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = real("tokenizer_2")
    tokenizer = read_tokenizer(folder)
    assert tokenizer is not None
    ours = prompt_tokenizer(tokenizer, folder, "t5", 32128, {})
    assert (ours.start, ours.end, ours.padding) == (None, 1, 0)
    theirs = transformers.T5TokenizerFast.from_pretrained(folder)
    wanted = theirs(prompt, padding="max_length", max_length=64, truncation=True).input_ids
    assert ours(prompt, 64)[0].tolist() == wanted


def test_kinds_are_told_apart(tmp_path: Path) -> None:
    clip, t5 = read_tokenizer(tiny.clip_tokenizer(tmp_path / "a")), read_tokenizer(tiny.t5_tokenizer(tmp_path / "b"))
    other = read_tokenizer(tiny.tokenizer(tmp_path / "c", ["<end>"]))
    assert clip is not None
    assert t5 is not None
    assert other is not None
    assert (kind(clip), kind(t5), kind(other)) == ("clip", "t5", None)


def test_marks_come_from_the_tokenizer_then_from_the_encoder(tmp_path: Path) -> None:
    folder = tiny.tokenizer(tmp_path, ["<x>", "<y>", "<z>"])
    tokenizer = read_tokenizer(folder)
    assert tokenizer is not None
    settings = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    made = prompt_tokenizer(tokenizer, folder, "clip", 40, settings)
    assert (made.start, made.end, made.padding) == (2, 1, 0)
    with pytest.raises(LoadError, match="which token ends a prompt"):
        prompt_tokenizer(tokenizer, folder, "t5", 40, {})
    tiny.write_json(folder / "tokenizer_config.json", {"eos_token": {"content": "<z>"}, "pad_token": "<y>"})
    made = prompt_tokenizer(tokenizer, folder, "t5", 40, settings)
    assert (made.start, made.end, made.padding) == (None, 2, 1)


def test_a_tokenizer_too_large_for_its_encoder_is_refused(tmp_path: Path) -> None:
    folder = tiny.t5_tokenizer(tmp_path)
    tokenizer = read_tokenizer(folder)
    assert tokenizer is not None
    with pytest.raises(LoadError, match="the t5 encoder knows 10 tokens"):
        prompt_tokenizer(tokenizer, folder, "t5", 10, {})


def test_nonsense_is_damaged(tmp_path: Path) -> None:
    assert read_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DamagedFile, match="not a tokenizer"):
        read_tokenizer(tmp_path)
