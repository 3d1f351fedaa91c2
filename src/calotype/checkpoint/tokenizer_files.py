"""Tokenizers from files: tokenizer.json, or CLIP's vocab.json with merges.txt, and the ids that frame a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from calotype.checkpoint.layouts import Settings
from calotype.checkpoint.sources import read_json
from calotype.errors import DamagedFile, LoadError
from calotype.text.tokenizers import PromptTokenizer

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
T5_END, T5_PADDING = "</s>", "<pad>"


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in a folder; None where there is none of a known form."""
    whole = folder / "tokenizer.json"
    if whole.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(whole))
        except Exception as error:  # the library raises nothing more specific
            raise DamagedFile(f"{whole}: not a tokenizer: {error}") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return clip_tokenizer(folder / "vocab.json", folder / "merges.txt")
    return None


def clip_tokenizer(vocab: Path, merges: Path) -> Tokenizer:
    """CLIP's tokenizer (Radford et al. 2021) from its two original files: lower-cased byte-level BPE."""
    ids: dict[str, int] = read_json(vocab)
    lines = merges.read_text(encoding="utf-8").split("\n")
    pairs = [(first, second) for first, _, second in (line.partition(" ") for line in lines[1:]) if second]
    try:
        model = models.BPE(
            vocab=ids,
            merges=pairs,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=CLIP_END,
        )
    except Exception as error:  # the library raises nothing more specific
        raise DamagedFile(f"{merges}: its merges do not fit {vocab.name}: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in (CLIP_START, CLIP_END) if mark in ids])
    return tokenizer


def kind(tokenizer: Tokenizer) -> str | None:
    """Which encoder a published tokenizer is for, clip or t5; None for one of another make."""
    marks = {mark for mark in (CLIP_START, T5_END) if tokenizer.token_to_id(mark) is not None}
    return {CLIP_START: "clip", T5_END: "t5"}[marks.pop()] if len(marks) == 1 else None


def prompt_tokenizer(
    tokenizer: Tokenizer, folder: Path, role: str, vocabulary: int, settings: Settings
) -> PromptTokenizer:
    """The tokenizer with the ids of its role's start, end and padding.

    They are named by the tokenizer's own configuration, else they are the published tokenizers' own marks, else the
    encoder's configuration gives them. Raises LoadError where that does not settle them, or an id does not fit the
    encoder's vocabulary.
    """
    marks = _marks(folder, tokenizer)
    clip = role.startswith("clip")
    usual = {"bos": CLIP_START, "eos": CLIP_END, "pad": CLIP_END} if clip else {"eos": T5_END, "pad": T5_PADDING}

    def find(name: str) -> int | None:
        named = marks.get(name)
        if named is None and usual.get(name):
            named = tokenizer.token_to_id(usual[name])
        given = settings.get(f"{name}_token_id")
        return named if named is not None else given if isinstance(given, int) else None

    start, end, padding = find("bos") if clip else None, find("eos"), find("pad")
    if end is None or (clip and start is None):
        raise LoadError(f"{folder}: nothing says which token ends a prompt ({role}); add a tokenizer_config.json")
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    largest = max(size - 1, *(number for number in (start, end, padding) if number is not None))
    if largest >= vocabulary:
        raise LoadError(
            f"{folder}: this tokenizer has ids up to {largest}, but the {role} encoder knows {vocabulary} tokens: it "
            "belongs to another model"
        )
    return PromptTokenizer(tokenizer, start=start, end=end, padding=end if padding is None else padding)


def _marks(folder: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the start, end and padding tokens that the files beside a tokenizer name."""
    found: dict[str, int] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / file).is_file():
            continue
        named: Mapping[str, Any] = read_json(folder / file)
        for name in ("bos", "eos", "pad"):
            token = named.get(f"{name}_token")
            content = token.get("content") if isinstance(token, dict) else token  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            number = tokenizer.token_to_id(content) if isinstance(content, str) else None
            if number is not None:
                found[name] = number
    return found
