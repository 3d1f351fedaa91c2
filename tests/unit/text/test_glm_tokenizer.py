from __future__ import annotations

import pytest
import tiny_glm as tiny
import torch
from sentencepiece import SentencePieceProcessor

from calotype.text.glm_tokenizer import GlmTokenizer

START = [tiny.PIECES + 1, tiny.PIECES + 3]  # [gMASK] and sop


@pytest.fixture(scope="module")
def tokenizer() -> GlmTokenizer:
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(tiny.tokenizer_model())
    return GlmTokenizer(processor)


def test_special_tokens_come_after_the_pieces(tokenizer: GlmTokenizer) -> None:
    assert tokenizer.vocabulary == tiny.PIECES + 9


def test_prompts_are_padded_on_the_left(tokenizer: GlmTokenizer) -> None:
    words = tokenizer.words("a red fox")
    made = tokenizer("a red fox", len(words) + 5)
    assert made.ids.tolist() == [[0, 0, 0, *START, *words]]
    assert made.positions.tolist() == [[0, 0, 0, *range(len(words) + 2)]]
    assert made.mask.tolist() == [[False] * 3 + [True] * (len(words) + 2)]
    assert (made.ids.dtype, made.positions.dtype, made.mask.dtype) == (torch.int64, torch.int64, torch.bool)


def test_the_empty_prompt_is_its_start(tokenizer: GlmTokenizer) -> None:
    made = tokenizer("", 4)
    assert made.ids.tolist() == [[0, 0, *START]]
    assert made.mask.tolist() == [[False, False, True, True]]


def test_long_prompts_are_cut_at_their_end(tokenizer: GlmTokenizer) -> None:
    words = tokenizer.words("the red fox in the snow")
    made = tokenizer("the red fox in the snow", 5)
    assert made.ids.tolist() == [[*START, *words[:3]]]
    assert made.positions.tolist() == [[0, 1, 2, 3, 4]]
    assert made.mask.all()


def test_special_tokens_cannot_be_spelt(tokenizer: GlmTokenizer) -> None:
    for mark in ("[gMASK]", "sop", "<|user|>", "<s>", "</s>", "<unk>"):
        ids = tokenizer.words(mark)
        assert len(ids) > 1
        assert all(2 < number < tiny.PIECES for number in ids), mark


def test_unknown_letters_become_bytes(tokenizer: GlmTokenizer) -> None:
    spelt = [3 + byte for byte in "狐".encode()]
    assert tokenizer.words("狐")[-3:] == spelt
