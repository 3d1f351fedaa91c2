"""ChatGLM3's tokenizer: sentencepiece, with its special tokens numbered after the pieces and padding on the left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

SPECIALS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
START = ("[gMASK]", "sop")  # every text begins with these: "generate what follows", "start of piece"


class GlmTokens(NamedTuple):
    """A prompt for the encoder, each (1 length)."""

    ids: Tensor  # int64
    positions: Tensor  # int64, 0 1 2 ... from the first token on, 0 in the padding
    mask: Tensor  # bool, true where there is a token


@dataclass(frozen=True)
class GlmTokenizer:
    """Special tokens have ids, but no spelling: written in a prompt, they are letters like any others."""

    processor: SentencePieceProcessor

    @property
    def vocabulary(self) -> int:
        """How many ids there are: pieces and special tokens."""
        return self.processor.vocab_size() + len(SPECIALS)

    def words(self, prompt: str) -> list[int]:
        """The prompt's own ids, without start and padding."""
        return self.processor.encode(prompt)

    def __call__(self, prompt: str, length: int) -> GlmTokens:
        """The prompt's tokens, cut at the end or padded in front to `length`."""
        pieces = self.processor.vocab_size()
        start = [pieces + SPECIALS.index(mark) for mark in START]
        ids = (start + self.words(prompt))[:length]
        padding = length - len(ids)
        return GlmTokens(
            ids=torch.tensor([[self.processor.unk_id()] * padding + ids]),
            positions=torch.tensor([[0] * padding + list(range(len(ids)))]),
            mask=torch.tensor([[False] * padding + [True] * len(ids)]),
        )
