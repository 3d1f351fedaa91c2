from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
from tokenizers import pre_tokenizers

from calotype.checkpoint.tokenizer_files import kind, prompt_tokenizer, read_tokenizer
from calotype.errors import DamagedFile, LoadError
from calotype.text.tokenizers import PromptTokenizer

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


MERGES = ["f o", "fo x</w>", "r e", "re d</w>", ", ,</w>", "! !</w>"]


def originals(
    folder: Path, merges: list[str] = MERGES, *, header: str = "#version: 0.2\n", extra: tuple[str, ...] = ()
) -> Path:
    """CLIP's two original files, with the byte alphabet and a few merges; "!" is 0, as in the published one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = [merge.replace(" ", "") for merge in MERGES]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *made, *extra, "<|startoftext|>", "<|endoftext|>"]
    tiny.write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    (folder / "merges.txt").write_text(header + "\n".join(merges) + "\n", encoding="utf-8")
    return folder


def opened(folder: Path, role: str = "clip_l", *, shared: bool = False) -> PromptTokenizer:
    tokenizer = read_tokenizer(folder)
    assert tokenizer is not None
    return prompt_tokenizer(tokenizer, folder, role, 1000, {}, shared=shared)


def tokens(made: PromptTokenizer, prompt: str) -> list[str | None]:
    return [made.tokenizer.id_to_token(number) for number in made.words(prompt)]


def test_clips_original_files(tmp_path: Path) -> None:
    made = opened(originals(tmp_path))
    assert tokens(made, "Fox,  red!!") == ["fox</w>", ",</w>", "red</w>", "!!</w>"]
    assert (made.start, made.end, made.padding) == (518, 519, 519)
    assert made("fox", 5).tolist() == [[518, 513, 519, 519, 519]]
    assert made.comma == made.words(",")[0]


@pytest.mark.parametrize("header", ["", "#version: 0.2\n", '"bpe_simple_vocab_16e6.txt#version: 0.2\r\n'])
def test_merges_with_any_first_line(tmp_path: Path, header: str) -> None:
    assert tokens(opened(originals(tmp_path, header=header)), "fox red") == ["fox</w>", "red</w>"]


@pytest.mark.parametrize(
    ("merges", "complaint"),
    [
        ([*MERGES, "n"], "line 8 is not two tokens: 'n'; the file is cut short"),
        ([*MERGES, "a b c"], "line 8 is not two tokens"),
        ([*MERGES, " b"], "line 8 is not two tokens"),
        ([*MERGES, "q z"], "its merges do not fit vocab.json"),
        (["<!DOCTYPE html>"], "its merges do not fit vocab.json"),
    ],
)
def test_damaged_merges_are_refused(tmp_path: Path, merges: list[str], complaint: str) -> None:
    with pytest.raises(DamagedFile, match=complaint):
        read_tokenizer(originals(tmp_path, merges))


def test_merges_that_are_no_text_are_refused(tmp_path: Path) -> None:
    originals(tmp_path)
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DamagedFile, match="not text in UTF-8"):
        read_tokenizer(tmp_path)


def test_the_published_vocabulary_takes_all_its_merges(tmp_path: Path) -> None:
    """Cut at the end of a line, nothing else would show it: words would only fall apart into other tokens."""
    originals(tmp_path, extra=tuple(f"<{number}>" for number in range(49408 - 520)))
    with pytest.raises(DamagedFile, match="cut short: 6 merges, but this vocabulary takes 48,894; fetch it again"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("number", ["one", 1.5, -1, None, [1]])
def test_a_vocabulary_of_nonsense_is_refused(tmp_path: Path, number: object) -> None:
    originals(tmp_path)
    tiny.write_json(tmp_path / "vocab.json", {"a": number})
    with pytest.raises(DamagedFile, match="maps tokens to numbers"):
        read_tokenizer(tmp_path)


BANG = {"content": "!", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


def test_declared_tokens_are_found_before_words(tmp_path: Path) -> None:
    """As transformers does with SDXL's second tokenizer: its padding, "!", is a token wherever it stands."""
    originals(tmp_path)
    assert tokens(opened(tmp_path), "fox!!") == ["fox</w>", "!!</w>"]
    tiny.write_json(tmp_path / "tokenizer_config.json", {"pad_token": "!", "added_tokens_decoder": {"0": BANG}})
    made = opened(tmp_path, "clip_g")
    assert made.padding == 0
    assert tokens(made, "fox!!") == ["fox</w>", "!", "!"]


def test_marks_are_looked_for_as_declared(tmp_path: Path) -> None:
    """A `normalized` mark is found in any case."""
    originals(tmp_path)
    assert tokens(opened(tmp_path), "<|startoftext|>") == ["<|startoftext|>"]
    assert tokens(opened(tmp_path), "<|StartOfText|>") != ["<|startoftext|>"]
    start = {"__type": "AddedToken", "content": "<|startoftext|>", "normalized": True}
    tiny.write_json(tmp_path / "tokenizer_config.json", {"bos_token": start})
    assert tokens(opened(tmp_path), "<|StartOfText|>") == ["<|startoftext|>"]


def test_learned_words_beside_a_vocabulary(tmp_path: Path) -> None:
    originals(tmp_path)
    tiny.write_json(tmp_path / "added_tokens.json", {"<cat-toy_1>": 521, "<cat-toy>": 520})
    made = opened(tmp_path)
    assert made.words("a <cat-toy> <cat-toy_1>") == [*made.words("a"), 520, 521]
    tiny.write_json(tmp_path / "added_tokens.json", {"<cat-toy>": 900})
    with pytest.raises(DamagedFile, match="'<cat-toy>' is declared as token 900, but the vocabulary makes it 520"):
        read_tokenizer(tmp_path)
    tiny.write_json(tmp_path / "added_tokens.json", {"<cat-toy>": "x"})
    with pytest.raises(DamagedFile, match="must map tokens to numbers"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("listed", [{"one": BANG}, {"-1": BANG}, {"": BANG}])
def test_declarations_of_nonsense_are_refused(tmp_path: Path, listed: dict[str, object]) -> None:
    originals(tmp_path)
    tiny.write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": listed})
    with pytest.raises(DamagedFile, match="must be listed by number"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("value", [None, 3, [], {}, {"content": 5}, {"content": ""}, ""])
def test_declarations_without_a_token_are_passed_over(tmp_path: Path, value: object) -> None:
    originals(tmp_path)
    tiny.write_json(tmp_path / "tokenizer_config.json", {"pad_token": value, "added_tokens_decoder": {"7": value}})
    tiny.write_json(tmp_path / "special_tokens_map.json", {"pad_token": value})
    assert opened(tmp_path).padding == 519


def test_a_learned_word_that_the_encoder_lacks_is_refused(tmp_path: Path) -> None:
    originals(tmp_path)
    tiny.write_json(tmp_path / "added_tokens.json", {"<cat-toy>": 520})
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer is not None
    assert prompt_tokenizer(tokenizer, tmp_path, "clip_l", 521, {}).end == 519
    with pytest.raises(LoadError, match="ids up to 520, but the clip_l encoder knows 520 tokens"):
        prompt_tokenizer(tokenizer, tmp_path, "clip_l", 520, {})


def test_a_shared_tokenizer_pads_bigg_with_its_own_padding(tmp_path: Path) -> None:
    """Single files bring no tokenizer: both encoders of SDXL then have the one that CLIP-L is published with."""
    originals(tmp_path)
    tiny.write_json(tmp_path / "tokenizer_config.json", {"pad_token": "<|endoftext|>"})
    assert opened(tmp_path, "clip_l", shared=True).padding == 519
    assert opened(tmp_path, "clip_g", shared=True).padding == 0
    assert opened(tmp_path, "clip_g").padding == 519  # its own folder says so
    assert tokens(opened(tmp_path, "clip_g", shared=True), "fox!!") == ["fox</w>", "!!</w>"]


def test_the_second_role_names_the_padding_of_its_folder(tmp_path: Path) -> None:
    originals(tmp_path)
    tiny.write_json(tmp_path / "special_tokens_map.json", {"pad_token": "!"})
    made = opened(tmp_path, "clip_g")
    assert made("fox", 5).tolist() == [[518, 513, 519, 0, 0]]
