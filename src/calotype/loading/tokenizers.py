"""Where an encoder's tokenizer comes from: the sources, the files beside it, or the published one from the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from calotype.checkpoint.chatglm import read_glm_tokenizer
from calotype.checkpoint.hub import fetch_tokenizer
from calotype.checkpoint.tokenizer_files import kind, prompt_tokenizer, read_tokenizer, sentencepiece_tokenizer
from calotype.errors import LoadError, MissingPart
from calotype.loading.gather import Chosen, Opened
from calotype.text.glm_tokenizer import GlmTokenizer
from calotype.text.tokenizers import PaddedTokenizer


class Published(NamedTuple):
    """A tokenizer that all encoders of a kind share."""

    name: str
    files: tuple[str, ...]


KOLORS = "Kwai-Kolors/Kolors-diffusers"
HUNYUAN = "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers"
PUBLISHED = {  # by the encoder's kind and vocabulary
    ("clip", 49408): Published("openai/clip-vit-large-patch14", ("tokenizer.json", "tokenizer_config.json")),
    ("t5", 32128): Published("google-t5/t5-small", ("tokenizer.json",)),
    ("t5", 250112): Published(HUNYUAN, ("tokenizer_2/spiece.model",)),
    ("bert", 47020): Published(HUNYUAN, ("tokenizer/vocab.txt",)),
}


def tokenizer_for(part: Chosen, config: Any, opened: Opened) -> PaddedTokenizer | GlmTokenizer:  # noqa: ANN401
    """The tokenizer of an encoder; MissingPart where there is none to be had, LoadError where it does not fit."""
    role, vocabulary = part.role.name, config.vocabulary
    if role == "chatglm":
        return _glm_tokenizer(part, vocabulary, opened)
    wanted = "clip" if role.startswith("clip") else role
    for folder, named in _places(part, opened):
        tokenizer = _read(part, folder, vocabulary, shared=not named)
        if tokenizer is not None:
            return tokenizer
    published = PUBLISHED.get((wanted, vocabulary))
    if published is None:
        raise MissingPart(
            f"{part.found.weights.source}: no tokenizer for this encoder of {vocabulary} tokens; give also the "
            f"folder that holds its {FILES[wanted]} ({part.role.tokenizer}/ in a pipeline folder)"
        )
    try:
        folder = fetch_tokenizer(published.name, published.files)
    except LoadError as error:
        raise MissingPart(
            f"{part.found.weights.source}: its tokenizer is neither among the sources nor beside the file, "
            f"and could not be fetched ({error}); give also a folder with its {FILES[wanted]} "
            f"({part.role.tokenizer}/ of the model), "
            f"or run `hf download {published.name} {' '.join(published.files)}` once while online"
        ) from error
    tokenizer = _read(part, folder, vocabulary, shared=True)
    assert tokenizer is not None
    return tokenizer


FILES = {"clip": "tokenizer.json", "t5": "tokenizer.json or spiece.model", "bert": "tokenizer.json or vocab.txt"}


def _read(part: Chosen, folder: Path, vocabulary: int, *, shared: bool) -> PaddedTokenizer | None:
    """An encoder's tokenizer from a folder; None where there is none, or a `shared` one of another make."""
    role = part.role.name
    tokenizer = read_tokenizer(folder)
    if tokenizer is not None and (not shared or kind(tokenizer) == ("clip" if role.startswith("clip") else role)):
        return prompt_tokenizer(tokenizer, folder, role, vocabulary, part.found.settings, shared=shared)
    return sentencepiece_tokenizer(folder, role, vocabulary) if role == "t5" else None


def _glm_tokenizer(part: Chosen, vocabulary: int, opened: Opened) -> GlmTokenizer:
    for folder, _ in _places(part, opened):
        tokenizer = read_glm_tokenizer(folder, vocabulary)
        if tokenizer is not None:
            return tokenizer
    try:
        folder = fetch_tokenizer(KOLORS, ("tokenizer/tokenizer.model",))
    except LoadError as error:
        raise MissingPart(
            f"{part.found.weights.source}: its tokenizer.model is neither among the sources nor beside the file, and "
            f"could not be fetched ({error}); give also the folder {part.role.tokenizer}/ of {KOLORS}, or run "
            f"`hf download {KOLORS} tokenizer/tokenizer.model` once while online"
        ) from error
    tokenizer = read_glm_tokenizer(folder, vocabulary)
    assert tokenizer is not None
    return tokenizer


def _places(part: Chosen, opened: Opened) -> Iterator[tuple[Path, bool]]:
    """Folders to look in, and whether their name already says that they are this encoder's."""
    own = part.role.tokenizer
    given = [folder for source in opened.sources for folder in source.tokenizers]
    yield from ((folder, True) for folder in given if folder.name == own)
    yield from ((folder, False) for folder in given if folder.name != own)
    place = part.group.place
    yield place, False
    yield place.parent / own, True
    yield place / own, True
