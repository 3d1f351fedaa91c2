"""A ChatGLM3 small enough to run in milliseconds, and a tokenizer of its kind."""

from __future__ import annotations

import io
import random

from sentencepiece import SentencePieceTrainer

from calotype.text.chatglm import ChatGlmConfig

CHATGLM = ChatGlmConfig(vocabulary=320, width=48, layers=3, heads=4, groups=2, head_width=16, mlp_width=56)
WORDS = ("a", "red", "apple", "on", "the", "blue", "table", "two", "cats", "and", "dog", "in", "snow", "fox", ",", ".")
PIECES = 290  # three marks, 256 bytes, and what a few words need


def tokenizer_model(pieces: int = PIECES) -> bytes:
    """A sentencepiece model of ChatGLM's form: pairs of bytes, no padding piece."""
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(WORDS, k=6)) for _ in range(200)]
    made = io.BytesIO()
    SentencePieceTrainer.Train(
        sentence_iterator=iter(sentences),
        model_writer=made,
        model_type="bpe",
        vocab_size=pieces,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return made.getvalue()
