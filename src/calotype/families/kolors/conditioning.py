"""What Kolors takes from a prompt: ChatGLM3's states, and a vector of its last token and sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calotype.families.unets import UNetConditioning
from calotype.nn.embeddings import sinusoid
from calotype.text.chatglm import ChatGlmEncoder
from calotype.text.glm_tokenizer import GlmTokenizer


def condition(
    prompt: str,
    *,
    encoder: ChatGlmEncoder,
    tokenizer: GlmTokenizer,
    text_tokens: int,
    sizes: Sequence[int],
    size_width: int,
) -> UNetConditioning:
    """The states before the last layer for all tokens, padding too; the last layer's at the last token as the vector.

    `sizes` as in SDXL: height and width of the original, top and left of the crop, height and width aimed at.
    """
    tokens = tokenizer(prompt, text_tokens)
    device = encoder.device
    states = encoder(tokens.ids.to(device), tokens.positions.to(device), tokens.mask.to(device))
    told = sinusoid(torch.tensor(sizes, device=device), size_width).flatten()[None]
    return UNetConditioning(texts=(states.penultimate,), vector=torch.cat([states.pooled.float(), told], dim=1))
