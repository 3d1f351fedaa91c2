"""What SDXL takes from a prompt: two CLIPs side by side, and the pooled text of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from calotype.families.unets import UNetConditioning
from calotype.text.clip import ClipEncoder, ClipStates
from calotype.text.clip_prompts import chunks, encode
from calotype.text.tokenizers import PromptTokenizer


def condition(
    prompt: str,
    *,
    encoders: Sequence[tuple[ClipEncoder, PromptTokenizer, Mapping[str, Tensor]]],
    clip_skip: int,
    empty_is_zero: bool,
) -> UNetConditioning:
    """The states of both encoders before layer norm, `clip_skip` from the end (2: the last but one), joined by width.

    The last encoder gives the pooled text. `empty_is_zero`: an empty prompt is zeros, as SDXL was trained.
    """

    def take(states: ClipStates) -> Tensor:
        return states.hidden[-clip_skip]

    # An embedding that only one of them has would leave the two of different lengths.
    count = max(
        len(chunks(prompt, tokenizer, length=clip.config.positions, embeddings=embeddings))
        for clip, tokenizer, embeddings in encoders
    )
    encoded = [
        encode(prompt, clip, tokenizer, take, embeddings=embeddings, at_least=count)
        for clip, tokenizer, embeddings in encoders
    ]
    text = torch.cat([each.text for each in encoded], dim=-1)
    pooled = encoded[-1].pooled
    if empty_is_zero and not prompt:
        text, pooled = torch.zeros_like(text), torch.zeros_like(pooled)
    return UNetConditioning(texts=(text,), vector=pooled.float())
