"""From a prompt to fixed-length token ids, through the libraries `tokenizers` and `sentencepiece`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PaddedTokenizer(ABC):
    """A tokenizer with the start, end and padding of one encoder's role.

    `start` is None for encoders without a start token (T5). Prompts are cut so that start and end tokens still fit.
    """

    start: int | None
    end: int
    padding: int

    @abstractmethod
    def words(self, prompt: str) -> list[int]:
        """The prompt's own ids, without start, end and padding."""

    def __call__(self, prompt: str, length: int) -> Tensor:
        """(1 length) int64."""
        return self.masked(prompt, length)[0]

    def masked(self, prompt: str, length: int) -> tuple[Tensor, Tensor]:
        """Ids (1 length) int64, and (1 length) bool, true where they are not padding."""
        start = [] if self.start is None else [self.start]
        ids = [*start, *self.words(prompt)[: length - len(start) - 1], self.end]
        padding = length - len(ids)
        return (
            torch.tensor([ids + [self.padding] * padding]),
            torch.tensor([[True] * len(ids) + [False] * padding]),
        )


@dataclass(frozen=True)
class PromptTokenizer(PaddedTokenizer):
    """One of the `tokenizers` library."""

    tokenizer: Tokenizer

    @property
    def comma(self) -> int | None:
        """The id of a comma that stands alone, where long prompts are best cut; None where there is none."""
        found = (self.tokenizer.token_to_id(spelling) for spelling in (",</w>", ","))
        return next((number for number in found if number is not None), None)

    def words(self, prompt: str) -> list[int]:
        return self.tokenizer.encode(prompt, add_special_tokens=False).ids


@dataclass(frozen=True)
class SentencePieceTokenizer(PaddedTokenizer):
    """One of sentencepiece, whose marks have no spelling: written in a prompt, they are letters like any others.

    Letters that the vocabulary lacks are one unknown token, also where sentencepiece would spell them in bytes (mT5's
    does): so transformers' fast tokenizers have it, through which models were trained on prompts.
    """

    processor: SentencePieceProcessor

    @cached_property
    def _bytes(self) -> frozenset[int]:
        """The ids of bytes."""
        return frozenset(number for number in range(self.processor.vocab_size()) if self.processor.IsByte(number))

    def words(self, prompt: str) -> list[int]:
        spelt = self._bytes
        unknown: int = self.processor.unk_id()
        ids: list[int] = []
        within = False  # letters that are spelt in bytes
        for number in self.processor.encode(prompt):
            if number not in spelt:
                ids.append(number)
            elif not within:
                ids.append(unknown)
            within = number in spelt
        return ids
