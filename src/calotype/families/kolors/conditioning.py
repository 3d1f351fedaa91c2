"""What Kolors takes from a prompt: ChatGLM3's states, and that of its last token."""

from __future__ import annotations

from calotype.families.unets import UNetConditioning
from calotype.text.chatglm import ChatGlmEncoder
from calotype.text.glm_tokenizer import GlmTokenizer


def condition(
    prompt: str,
    *,
    encoder: ChatGlmEncoder,
    tokenizer: GlmTokenizer,
    text_tokens: int,
) -> UNetConditioning:
    """The states before the last layer for all tokens, padding too; as the vector the last layer's at the last one."""
    tokens = tokenizer(prompt, text_tokens)
    device = encoder.device
    states = encoder(tokens.ids.to(device), tokens.positions.to(device), tokens.mask.to(device))
    return UNetConditioning(texts=(states.penultimate,), vector=states.pooled.float())
