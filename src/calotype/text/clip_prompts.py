"""From a prompt of any length to CLIP's states: chunks, emphasis, textual inversion.

CLIP reads 75 tokens at a time. A longer prompt is cut into chunks, each encoded on its own, and their states stand one
after the other, as in A1111 (modules/sd_hijack_clip.py).
"""

# n tokens of a chunk · k chunks · m vectors · d width

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from calotype.errors import RequestError
from calotype.text.clip import ClipEncoder, ClipStates
from calotype.text.prompts import Span, parse
from calotype.text.tokenizers import PromptTokenizer

BACKTRACK = 20  # a full chunk is cut after a comma among its last tokens, so that a phrase is not torn
ROWS = 16  # chunks in one pass: the states of all layers are kept, and a prompt may be very long
# A hyphen joins words: the embedding "bad-hands" is not meant where the prompt says bad-hands-5.
WORD_START = re.compile(r"(?<![\w-])(?:embedding:)?(?=\S)", re.IGNORECASE)
WORD_GOES_ON = re.compile(r"[\w-]")


class Chunk(NamedTuple):
    """What CLIP reads at once."""

    ids: Tensor  # (1 n) int64; under inserted vectors the start token's id stands
    weights: Tensor  # (1 n) float32, 1 for start, end and padding
    inserted: tuple[tuple[int, Tensor], ...]  # where, and the vectors (m d) that stand there
    weighted: bool  # whether any weight is not 1


class Encoded(NamedTuple):
    text: Tensor  # 1 (k n) d
    pooled: Tensor  # 1 d, of the first chunk


class _Unit(NamedTuple):
    """What is never cut: a token, or an embedding's vectors."""

    id: int
    size: int
    weight: float
    vectors: Tensor | None


def chunks(
    prompt: str,
    tokenizer: PromptTokenizer,
    *,
    length: int = 77,
    embeddings: Mapping[str, Tensor] | None = None,
    at_least: int = 1,
) -> tuple[Chunk, ...]:
    """The prompt as chunks of `length` tokens, start, end and padding included; empty ones up to `at_least`.

    The prompt may hold emphasis and BREAK (calotype.text.prompts), and the keywords of `embeddings`, whose vectors
    (m d), or (d) for one, take their place: a keyword counts as a word of its own, in any case, with or without
    ComfyUI's "embedding:" before it; of several that fit the longest is taken. Vectors are not divided between chunks.
    Raises RequestError for an embedding longer than a chunk.
    """
    assert tokenizer.start is not None
    known = _Keywords(embeddings or {}, length - 2)
    made: list[Chunk] = []
    parts = parse(prompt)
    for number, part in enumerate(parts):
        units = [unit for span in part for unit in _units(span, tokenizer, known)]
        if not units and number == len(parts) - 1:
            break  # nothing after the last BREAK, or no prompt at all
        for piece in _cut(units, length - 2, tokenizer.comma):
            made.append(_chunk(piece, tokenizer, length))
    while len(made) < max(at_least, 1):
        made.append(_chunk([], tokenizer, length))
    return tuple(made)


def encode(
    prompt: str,
    encoder: ClipEncoder,
    tokenizer: PromptTokenizer,
    take: Callable[[ClipStates], Tensor],
    *,
    embeddings: Mapping[str, Tensor] | None = None,
    at_least: int = 1,
) -> Encoded:
    """The states that `take` (ClipStates -> b n d) picks, chunk after chunk, and the first chunk's pooled state.

    A weight scales a token's distance from the empty prompt's state at the same position: empty + weight * (state -
    empty). The pooled state has none. Chunks are encoded as one batch, very many as several; the empty prompt goes
    with them only where a weight asks for it. Raises RequestError for an embedding of another width than the
    encoder's, or longer than a chunk.
    """
    length = encoder.config.positions
    pieces = chunks(prompt, tokenizer, length=length, embeddings=embeddings, at_least=at_least)
    device = encoder.device
    ids = torch.cat([piece.ids for piece in pieces])
    weights = torch.cat([piece.weights for piece in pieces]).to(device)[:, :, None]
    weighted = any(piece.weighted for piece in pieces)
    if weighted:
        ids = torch.cat([ids, tokenizer("", length)])
    _check_width(pieces, encoder.config.width)
    inserted = [piece.inserted for piece in pieces]
    taken: list[Tensor] = []
    pooled: Tensor | None = None
    for row in range(0, len(ids), ROWS):
        states: ClipStates = encoder(ids[row : row + ROWS].to(device), inserted[row : row + ROWS])
        taken.append(take(states))
        pooled = states.pooled[:1] if pooled is None else pooled
    assert pooled is not None
    text = torch.cat(taken)
    if weighted:
        empty, plain = text[-1:].float(), text[:-1].float()
        # Where the weight is 1 the state stays as it is, to the last bit.
        text = torch.where(weights == 1, plain, empty + weights * (plain - empty)).to(text.dtype)
    return Encoded(text=text.reshape(1, -1, text.shape[-1]), pooled=pooled)


def _check_width(pieces: tuple[Chunk, ...], width: int) -> None:
    for piece in pieces:
        for _, vectors in piece.inserted:
            if vectors.shape[-1] != width:
                raise RequestError(
                    "prompt",
                    f"an embedding of width {vectors.shape[-1]}",
                    f"embeddings of width {width} with this text encoder; this one was made for another model",
                )


class _Keywords:
    """Embeddings by their words in a prompt. Finding them takes time linear in the prompt, however many there are."""

    def __init__(self, embeddings: Mapping[str, Tensor], room: int) -> None:
        self.room = room
        self.vectors = {name.casefold(): torch.atleast_2d(vectors) for name, vectors in embeddings.items() if name}
        self.lengths = sorted({len(name) for name in embeddings if name}, reverse=True)

    def split(self, text: str) -> Iterator[str | Tensor]:
        """Text and vectors, in their order."""
        end = 0
        for match in WORD_START.finditer(text) if self.vectors else ():
            start = match.start()
            name, stop = self._name_at(text, match.end()) if start >= end else ("", 0)
            if not name:
                continue
            vectors = self.vectors[name.casefold()]
            if len(vectors) > self.room:
                raise RequestError(
                    "prompt", name, f"embeddings of at most {self.room} vectors; this one has {len(vectors)}"
                )
            yield text[end:start]
            yield vectors
            end = stop
        yield text[end:]

    def _name_at(self, text: str, start: int) -> tuple[str, int]:
        """The longest keyword that begins here and ends as a word does, and where it ends; "" where there is none."""
        for length in self.lengths:
            name = text[start : start + length]
            if name.casefold() in self.vectors and not WORD_GOES_ON.match(text, start + length):
                return name, start + length
        return "", 0


def _units(span: Span, tokenizer: PromptTokenizer, known: _Keywords) -> Iterator[_Unit]:
    assert tokenizer.start is not None
    for piece in known.split(span.text):
        if isinstance(piece, Tensor):
            yield _Unit(tokenizer.start, len(piece), span.weight, piece)
        else:
            yield from (_Unit(number, 1, span.weight, None) for number in tokenizer.words(piece))


def _cut(units: list[_Unit], room: int, comma: int | None) -> Iterator[list[_Unit]]:
    """Pieces of at most `room` tokens; one empty piece of nothing."""
    start = 0
    while True:
        stop, size = start, 0
        while stop < len(units) and size + units[stop].size <= room:
            size += units[stop].size
            stop += 1
        if stop < len(units) and size == room and units[stop].id != comma:
            stop = _after_comma(units, start, stop, comma)
        yield units[start:stop]
        start = stop
        if start == len(units):
            return


def _after_comma(units: list[_Unit], start: int, stop: int, comma: int | None) -> int:
    """The end of the last phrase before `stop`, if a comma ends one within BACKTRACK tokens; else `stop`."""
    back, place = 0, stop
    while place > start:
        back += units[place - 1].size
        if back > BACKTRACK:
            break
        if units[place - 1].id == comma:
            return place
        place -= 1
    return stop


def _chunk(units: list[_Unit], tokenizer: PromptTokenizer, length: int) -> Chunk:
    assert tokenizer.start is not None
    ids, weights = [tokenizer.start], [1.0]
    inserted: list[tuple[int, Tensor]] = []
    for unit in units:
        if unit.vectors is not None:
            inserted.append((len(ids), unit.vectors))
        ids += [unit.id] * unit.size
        weights += [unit.weight] * unit.size
    ids.append(tokenizer.end)
    ids += [tokenizer.padding] * (length - len(ids))
    weights += [1.0] * (length - len(weights))
    return Chunk(torch.tensor([ids]), torch.tensor([weights]), tuple(inserted), any(weight != 1 for weight in weights))
