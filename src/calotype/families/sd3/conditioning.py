"""What Stable Diffusion 3 takes from a prompt: two CLIPs side by side, T5 behind them, and a pooled vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from calotype.families.sd3.config import CLIP_TOKENS
from calotype.text.clip import ClipEncoder, ClipStates
from calotype.text.clip_prompts import Encoded, chunks, encode
from calotype.text.t5 import T5Encoder
from calotype.text.tokenizers import PromptTokenizer


class Sd3Conditioning(NamedTuple):
    text: Tensor  # b n d, the CLIPs' states, then T5's
    pooled: Tensor  # b d, the CLIPs' side by side


class ClipReader(NamedTuple):
    """A CLIP, and what it reads prompts with."""

    encoder: ClipEncoder
    tokenizer: PromptTokenizer
    embeddings: Mapping[str, Tensor]


class T5Reader(NamedTuple):
    encoder: T5Encoder
    tokenizer: PromptTokenizer


def condition(
    prompt: str,
    *,
    clip_l: ClipReader | None,
    clip_g: ClipReader | None,
    t5: T5Reader | None,
    clip_skip: int,
    text_tokens: int,
    text_width: int,
    pooled_width: int,
) -> Sd3Conditioning:
    """The states of both CLIPs before layer norm, `clip_skip` from the end (2: the last but one), joined by width.

    They are widened to `text_width` by zeros, and followed by T5's for `text_tokens` pieces of the prompt as it stands:
    emphasis is for the CLIPs. An encoder that is not there gives zeros: each was left out of a part of the prompts in
    training, so that the model can do without (Esser et al. 2024).
    """
    read = [None if t5 is None else t5.encoder(t5.tokenizer(prompt, text_tokens).to(t5.encoder.device))]
    clips = _clips(prompt, clip_l, clip_g, clip_skip)
    if clips is not None:
        pooled = clips.pooled
        # Without its neighbour, either is where it always is: the first in front, the second behind.
        front = pooled_width - pooled.shape[-1] if clip_l is None else 0
        text = F.pad(clips.text, (front, text_width - front - clips.text.shape[-1]))
        pooled = F.pad(pooled, (front, pooled_width - front - pooled.shape[-1]))
    else:
        assert read[0] is not None, "a model without any text encoder"
        text, pooled = read[0].new_zeros(1, CLIP_TOKENS, text_width), read[0].new_zeros(1, pooled_width)
    behind = text.new_zeros(1, text_tokens, text_width) if read[0] is None else read[0].to(text.device)
    return Sd3Conditioning(text=torch.cat([text, behind], dim=1), pooled=pooled)


def _clips(prompt: str, clip_l: ClipReader | None, clip_g: ClipReader | None, clip_skip: int) -> Encoded | None:
    """Both CLIPs' states and pooled states side by side, or those of the one that is there."""

    def take(states: ClipStates) -> Tensor:
        return states.hidden[-clip_skip]

    readers = [reader for reader in (clip_l, clip_g) if reader is not None]
    if not readers:
        return None
    # An embedding that only one of them has would leave the two of different lengths.
    count = max(
        len(chunks(prompt, tokenizer, length=clip.config.positions, embeddings=embeddings))
        for clip, tokenizer, embeddings in readers
    )
    encoded = [
        encode(prompt, clip, tokenizer, take, embeddings=embeddings, at_least=count)
        for clip, tokenizer, embeddings in readers
    ]
    return Encoded(
        text=torch.cat([each.text for each in encoded], dim=-1),
        pooled=torch.cat([each.pooled for each in encoded], dim=-1),
    )


def joined(several: Sequence[Sd3Conditioning]) -> Sd3Conditioning | None:
    """Conditionings as one batch; None where one is longer than another, being longer than CLIP reads at once."""
    if len({each.text.shape[1] for each in several}) > 1:
        return None
    return Sd3Conditioning(*(torch.cat(parts) for parts in zip(*several, strict=True)))
