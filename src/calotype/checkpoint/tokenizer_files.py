"""Tokenizers from files, and the ids that frame a prompt.

The files are tokenizer.json, CLIP's vocab.json with merges.txt, BERT's vocab.txt, T5's spiece.model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from calotype.checkpoint.layouts import Settings
from calotype.checkpoint.sources import read_json
from calotype.errors import DamagedFile, LoadError
from calotype.text.tokenizers import PromptTokenizer, SentencePieceTokenizer

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_MERGES = {49408: 48894}  # of the published vocabulary: each of its tokens but 2 x 256 bytes and 2 marks is a merge
CLIP_WORDS = Regex(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
)
T5_END, T5_PADDING = "</s>", "<pad>"
BERT_START, BERT_END, BERT_PADDING = "[CLS]", "[SEP]", "[PAD]"
BERT_MARKS = (BERT_PADDING, "[UNK]", BERT_START, BERT_END, "[MASK]")
# What begins a prompt, ends it and fills it up: as configurations name it, and as published tokenizers spell it.
MARKS = {
    "clip": (("bos", CLIP_START), ("eos", CLIP_END), ("pad", CLIP_END)),
    "t5": (None, ("eos", T5_END), ("pad", T5_PADDING)),
    "bert": (("cls", BERT_START), ("sep", BERT_END), ("pad", BERT_PADDING)),
}
PUBLISHED_SIZE = 20_000  # tokens: no published tokenizer has fewer; tests' have
MAX_VOCABULARY = 16 * 2**20  # bytes; mT5's has 4.3 MB
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
    if (folder / "vocab.txt").is_file():
        return bert_tokenizer(folder / "vocab.txt")
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


def bert_tokenizer(vocab: Path) -> Tokenizer:
    """BERT's tokenizer (Devlin et al. 2018) from its list of word pieces, one a line, the first of them number 0.

    Words are cut at white space, punctuation and every Chinese character; case and accents are dropped unless the
    tokenizer_config.json beside says otherwise; marks like [SEP] are found in a prompt before it is cut. Raises
    DamagedFile.
    """
    if vocab.stat().st_size > MAX_VOCABULARY:
        raise DamagedFile(f"{vocab}: too large for a list of word pieces")
    try:
        # Only line feeds end a line: a piece may be a character that Unicode calls a line's end.
        pieces = vocab.read_bytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{vocab}: not text in UTF-8: {error}") from None
    ids = {piece.removesuffix("\r"): number for number, piece in enumerate(pieces) if piece}
    lacking = [mark for mark in BERT_MARKS[:4] if mark not in ids]
    if lacking:
        raise DamagedFile(f"{vocab}: {lacking[0]} is not among its {len(ids):,} pieces: no BERT's, or cut short")
    file = vocab.parent / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    accents = config.get("strip_accents")
    tokenizer = Tokenizer(models.WordPiece(vocab=ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars") is not False,
        strip_accents=accents if isinstance(accents, bool) else None,  # None: as lowercase
        lowercase=config.get("do_lower_case") is not False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens([mark for mark in BERT_MARKS if mark in ids])
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
    """Which encoder a published tokenizer is for, clip, t5 or bert; None for one of another make."""
    of = {CLIP_START: "clip", T5_END: "t5", BERT_START: "bert"}
    marks = {mark for mark in of if tokenizer.token_to_id(mark) is not None}
    return of[marks.pop()] if len(marks) == 1 else None


def prompt_tokenizer(
    tokenizer: Tokenizer, folder: Path, role: str, vocabulary: int, settings: Settings, *, shared: bool = False
) -> PromptTokenizer:
    """The tokenizer with the ids of its role's start, end and padding.

    They are named by the tokenizer's own configuration, else they are the published tokenizers' own marks, else the
    encoder's configuration gives them. `shared` says that it is not the encoder's own, but one that others of its kind
    have too: a role with a padding of its own (clip_g, "!") then has that. Raises LoadError where nothing settles them,
    or an id does not fit the encoder's vocabulary.
    """
    declared = _marks(folder, tokenizer)
    marks = MARKS["clip" if role.startswith("clip") else role]

    def find(mark: tuple[str, str] | None) -> int | None:
        if mark is None:
            return None
        name, usual = mark
        named = declared.get(name, tokenizer.token_to_id(usual))
        given = settings.get(f"{name}_token_id")
        return named if named is not None else given if isinstance(given, int) else None

    start, end, padding = (find(mark) for mark in marks)
    if shared and role in OWN_PADDING:
        padding = tokenizer.token_to_id(OWN_PADDING[role])
    if end is None or (start is None and marks[0] is not None):
        raise LoadError(f"{folder}: nothing says which token ends a prompt ({role}); add a tokenizer_config.json")
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    largest = max(size - 1, *(number for number in (start, end, padding) if number is not None))
    _check_vocabulary(folder, role, largest + 1, vocabulary)
    return PromptTokenizer(tokenizer, start=start, end=end, padding=end if padding is None else padding)


def sentencepiece_tokenizer(folder: Path, role: str, vocabulary: int) -> SentencePieceTokenizer | None:
    """The tokenizer of a `spiece.model` in a folder; None without one.

    Raises DamagedFile for what sentencepiece cannot read, LoadError for another model's tokenizer.
    """
    path = folder / "spiece.model"
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_VOCABULARY:
        raise DamagedFile(f"{path}: too large for a sentencepiece model")
    try:
        processor = SentencePieceProcessor()
        processor.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError as error:  # the library raises nothing more specific
        raise DamagedFile(f"{path}: not a sentencepiece model, or cut short ({error}); fetch it again") from error
    if processor.eos_id() < 0:
        raise DamagedFile(f"{path}: this sentencepiece model has no end token, which {role} reads at a prompt's end")
    _check_vocabulary(folder, role, processor.vocab_size(), vocabulary)
    end, padding = processor.eos_id(), processor.pad_id()
    return SentencePieceTokenizer(processor, start=None, end=end, padding=end if padding < 0 else padding)


def _check_vocabulary(folder: Path, role: str, has: int, wanted: int) -> None:
    """LoadError for a tokenizer with ids that the encoder does not know, or a published one with few that it knows."""
    if has > wanted or PUBLISHED_SIZE <= has < wanted // 2:
        raise LoadError(
            f"{folder}: this tokenizer has ids up to {has - 1}, but the {role} encoder knows {wanted} tokens: it "
            "belongs to another model"
        )


def _marks(folder: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the start, end and padding tokens that the files beside a tokenizer name."""
    found: dict[str, int] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / file).is_file():
            continue
        named: Mapping[str, Any] = read_json(folder / file)
        for name in ("bos", "eos", "pad", "cls", "sep"):
            token = named.get(f"{name}_token")
            content = token.get("content") if isinstance(token, dict) else token  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            number = tokenizer.token_to_id(content) if isinstance(content, str) else None
            if number is not None:
                found[name] = number
    return found
