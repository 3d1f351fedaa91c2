"""What FLUX.1 takes from a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from calotype.text.clip import ClipEncoder
from calotype.text.t5 import T5Encoder
from calotype.text.tokenizers import PromptTokenizer


class FluxConditioning(NamedTuple):
    text: Tensor  # b n d, T5's last states
    pooled: Tensor  # b d, CLIP's state at the end token


def encode(
    prompt: str,
    *,
    t5: T5Encoder,
    t5_tokenizer: PromptTokenizer,
    clip: ClipEncoder,
    clip_tokenizer: PromptTokenizer,
    text_tokens: int,
) -> FluxConditioning:
    """One prompt's conditioning: T5 sees up to `text_tokens` pieces of it, CLIP as many as it has positions."""
    device = clip.device
    text: Tensor = t5(t5_tokenizer(prompt, text_tokens).to(t5.device))
    pooled: Tensor = clip(clip_tokenizer(prompt, clip.config.positions).to(device)).pooled
    return FluxConditioning(text=text, pooled=pooled.to(text.device))


def joined(several: Sequence[FluxConditioning]) -> FluxConditioning:
    """Conditionings as one batch."""
    return FluxConditioning(*(torch.cat(parts) for parts in zip(*several, strict=True)))
