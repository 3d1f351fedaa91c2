"""From a prompt to fixed-length token ids, through the `tokenizers` library."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor


@dataclass(frozen=True)
class PromptTokenizer:
    """A tokenizer with the padding of one encoder's role.

    `start` is None for encoders without a start token (T5). Prompts are cut so that start and end tokens still fit.
    """

    tokenizer: Tokenizer
    start: int | None
    end: int
    padding: int

    @property
    def comma(self) -> int | None:
        """The id of a comma that stands alone, where long prompts are best cut; None where there is none."""
        found = (self.tokenizer.token_to_id(spelling) for spelling in (",</w>", ","))
        return next((number for number in found if number is not None), None)

    def words(self, prompt: str) -> list[int]:
        """The prompt's own ids, without start, end and padding."""
        return self.tokenizer.encode(prompt, add_special_tokens=False).ids

    def __call__(self, prompt: str, length: int) -> Tensor:
        """(1 length) int64."""
        start = [] if self.start is None else [self.start]
        ids = [*start, *self.words(prompt)[: length - len(start) - 1], self.end]
        return torch.tensor([ids + [self.padding] * (length - len(ids))])
