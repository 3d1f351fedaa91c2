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
CLIP_MERGES = {49408: 48894}  # of the published vocabulary: each of its tokens but 2 x 256 bytes and 2 marks is a merge
CLIP_WORDS = Regex(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
)
T5_END, T5_PADDING = "</s>", "<pad>"
# OpenCLIP's bigG was trained with id 0 as padding, which its vocabulary, the same as CLIP-L's, calls "!".
OWN_PADDING = {"clip_g": "!"}


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
    """CLIP's tokenizer (Radford et al. 2021) from its two original files: lower-cased byte-level BPE.

    As transformers 5 reads such a folder, with the special tokens that the files beside them declare. OpenAI's own
    first mends a prompt with ftfy and undoes HTML entities; transformers 4's slow tokenizer did the former where ftfy
    was installed. Neither is done here: curly quotes and "&amp;" are tokens like any others.
    Raises DamagedFile.
    """
    ids: dict[str, Any] = read_json(vocab)
    if not all(type(number) is int and number >= 0 for number in ids.values()):
        raise DamagedFile(f"{vocab}: a vocabulary maps tokens to numbers")
    try:
        model = models.BPE(
            vocab=ids,
            merges=_merges(merges, len(ids)),
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            unk_token=CLIP_END,
        )
    except DamagedFile:
        raise
    except Exception as error:  # the library raises nothing more specific
        raise DamagedFile(f"{merges}: its merges do not fit {vocab.name}: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(CLIP_WORDS, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    declared = _declared(vocab.parent)
    numbered = {number: token for token, number in declared.values() if number is not None}
    tokenizer.add_special_tokens([numbered[number] for number in sorted(numbered)])  # new ones get ids in this order
    for content, (token, number) in declared.items():
        if number is None and content in ids:
            tokenizer.add_special_tokens([token])
        elif number not in (None, tokenizer.token_to_id(content)):
            raise DamagedFile(
                f"{vocab.parent}: {content[:40]!r} is declared as token {number}, but the vocabulary makes it "
                f"{tokenizer.token_to_id(content)}"
            )
    return tokenizer


def _merges(file: Path, vocabulary: int) -> list[tuple[str, str]]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{file}: not text in UTF-8: {error}") from None
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and "#version" in line):
            continue
        first, _, second = line.partition(" ")
        if not first or not second or " " in second:
            raise DamagedFile(
                f"{file}: line {number} is not two tokens: {line[:40]!r}; the file is cut short or no list"
            )
        pairs.append((first, second))
    wanted = CLIP_MERGES.get(vocabulary, len(pairs))
    if len(pairs) < wanted:
        raise DamagedFile(
            f"{file}: cut short: {len(pairs):,} merges, but this vocabulary takes {wanted:,}; fetch it again"
        )
    return pairs


def _declared(folder: Path) -> dict[str, tuple[AddedToken, int | None]]:
    """The special tokens that the files beside a vocabulary declare, with their ids where those are said.

    They are found in a prompt before it is cut into words: where "!" is one, as for SDXL's second encoder in diffusers
    folders, an exclamation mark is that token. `normalized` ones are looked for in lower case.
    """
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    listed: Any = config.get("added_tokens_decoder")
    found: dict[str, tuple[AddedToken, int | None]] = {}
    if isinstance(listed, dict):
        entries: dict[str, Any] = listed  # pyright: ignore[reportUnknownVariableType]
        if not all(number.isdecimal() and len(number) < 10 for number in entries):
            raise DamagedFile(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder must be listed by number")
        for number in sorted(entries, key=int):
            token = _special(entries[number])
            if token is not None:
                found[token.content] = token, int(number)
    else:
        if (folder / "special_tokens_map.json").is_file():
            config = config | read_json(folder / "special_tokens_map.json")
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = _special(config.get(name))
            if token is not None:
                found[token.content] = token, None
        if (folder / "added_tokens.json").is_file():  # before 2024: words learned by textual inversion, mostly
            for content, number in read_json(folder / "added_tokens.json").items():
                if type(number) is not int:
                    raise DamagedFile(f"{folder / 'added_tokens.json'}: it must map tokens to numbers")
                found[content] = AddedToken(content, normalized=content not in found), number
    for mark in (CLIP_START, CLIP_END):
        found.setdefault(mark, (AddedToken(mark, special=True, normalized=False), None))
    return found


def _special(value: Any) -> AddedToken | None:
    """A token as those files write it: its text, or its text with the ways to look for it."""
    if isinstance(value, str) and value:
        return AddedToken(value, special=True, normalized=False)
    if not isinstance(value, dict):
        return None
    said: dict[str, Any] = value  # pyright: ignore[reportUnknownVariableType]
    content = said.get("content")
    if not isinstance(content, str) or not content:
        return None
    flags = {name: said.get(name) is True for name in ("single_word", "lstrip", "rstrip", "normalized")}
    return AddedToken(content, special=True, **flags)


def kind(tokenizer: Tokenizer) -> str | None:
    """Which encoder a published tokenizer is for, clip or t5; None for one of another make."""
    marks = {mark for mark in (CLIP_START, T5_END) if tokenizer.token_to_id(mark) is not None}
    return {CLIP_START: "clip", T5_END: "t5"}[marks.pop()] if len(marks) == 1 else None


def prompt_tokenizer(
    tokenizer: Tokenizer, folder: Path, role: str, vocabulary: int, settings: Settings, *, shared: bool = False
) -> PromptTokenizer:
    """The tokenizer with the ids of its role's start, end and padding.

    They are named by the tokenizer's own configuration, else they are the published tokenizers' own marks, else the
    encoder's configuration gives them. `shared` says that it is not the encoder's own, but one that others of its kind
    have too: a role with a padding of its own (clip_g, "!") then has that. Raises LoadError where nothing settles them,
    or an id does not fit the encoder's vocabulary.
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
    if shared and role in OWN_PADDING:
        padding = tokenizer.token_to_id(OWN_PADDING[role])
    if end is None or (clip and start is None):
        raise LoadError(f"{folder}: nothing says which token ends a prompt ({role}); add a tokenizer_config.json")
    size = tokenizer.get_vocab_size(with_added_tokens=True)
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
