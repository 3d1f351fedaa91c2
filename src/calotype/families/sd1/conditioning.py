"""What Stable Diffusion 1.x takes from a prompt."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from calotype.families.unets import UNetConditioning
from calotype.text.clip import ClipEncoder, ClipStates
from calotype.text.clip_prompts import encode
from calotype.text.tokenizers import PromptTokenizer


def condition(
    prompt: str,
    *,
    clip: ClipEncoder,
    tokenizer: PromptTokenizer,
    clip_skip: int,
    embeddings: Mapping[str, Tensor],
) -> UNetConditioning:
    """CLIP's states after the layer `clip_skip` from the end (1: the last), under the final norm."""

    def take(states: ClipStates) -> Tensor:
        normed: Tensor = clip.norm_out(states.hidden[-clip_skip])
        return normed

    encoded = encode(prompt, clip, tokenizer, take, embeddings=embeddings)
    return UNetConditioning(texts=(encoded.text,), vector=None)
