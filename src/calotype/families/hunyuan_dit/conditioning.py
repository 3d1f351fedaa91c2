"""What Hunyuan-DiT takes from a prompt: BERT's states and T5's, and which of them are padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from calotype.text.bert import BertEncoder
from calotype.text.t5 import T5Encoder
from calotype.text.tokenizers import PaddedTokenizer


class HunyuanConditioning(NamedTuple):
    text: Tensor  # b n d, BERT's
    t5: Tensor  # b m d
    mask: Tensor  # b n+m bool, true where there is a token


def condition(
    prompt: str,
    *,
    bert: BertEncoder,
    bert_tokenizer: PaddedTokenizer,
    text_tokens: int,
    t5: T5Encoder,
    t5_tokenizer: PaddedTokenizer,
    t5_tokens: int,
) -> HunyuanConditioning:
    """Both encoders read the prompt, each cut at its own length; of the text beyond, nothing is kept."""
    device, t5_device = bert.device, t5.device
    ids, mask = bert_tokenizer.masked(prompt, text_tokens)
    t5_ids, t5_mask = t5_tokenizer.masked(prompt, t5_tokens)
    text: Tensor = bert(ids.to(device), mask.to(device))
    return HunyuanConditioning(
        text=text.to(t5_device),
        t5=t5(t5_ids.to(t5_device), t5_mask.to(t5_device)),
        mask=torch.cat([mask, t5_mask], dim=1).to(t5_device),
    )


def joined(several: Sequence[HunyuanConditioning]) -> HunyuanConditioning:
    """Conditionings as one batch."""
    return HunyuanConditioning(*(torch.cat(parts) for parts in zip(*several, strict=True)))
