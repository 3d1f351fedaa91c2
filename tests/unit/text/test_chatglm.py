"""What ChatGLM3's encoder promises; that it equals the reference is shown in tests/parity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_glm as tiny
import torch
from tiny import scattered
from torch import Tensor

from calotype.text.chatglm import ChatGlmEncoder, GlmStates, attention_bias

LENGTH = 9


@pytest.fixture(scope="module")
def encoder() -> ChatGlmEncoder:
    made = ChatGlmEncoder(tiny.CHATGLM)
    scattered(made, 0, spread=0.3)
    return made


def run(encoder: ChatGlmEncoder, words: list[int], length: int = LENGTH, padding: int = 0) -> GlmStates:
    before = length - len(words)
    return encoder(
        torch.tensor([[padding] * before + words]),
        torch.tensor([[0] * before + list(range(len(words)))]),
        torch.tensor([[False] * before + [True] * len(words)]),
    )


def near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-4)


def test_the_bias_lets_tokens_look_back_and_padding_everywhere() -> None:
    seen = attention_bias(torch.tensor([[False, True, True], [True, True, True]])) == 0
    assert seen.int().tolist() == [
        [[[1, 1, 1], [0, 1, 0], [0, 1, 1]]],
        [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]],
    ]


def test_shapes(encoder: ChatGlmEncoder) -> None:
    ids = torch.randint(0, 300, (2, LENGTH))
    made = encoder(ids, torch.arange(LENGTH).repeat(2, 1), torch.ones(2, LENGTH, dtype=torch.bool))
    assert made.penultimate.shape == (2, LENGTH, 48)
    assert made.pooled.shape == (2, 48)


def test_tokens_know_nothing_of_the_padding(encoder: ChatGlmEncoder) -> None:
    words = [5, 70, 200, 6]
    some, more, others = run(encoder, words), run(encoder, words, length=20), run(encoder, words, padding=99)
    for other in (more, others):
        assert near(some.penultimate[:, -4:], other.penultimate[:, -4:])
        assert near(some.pooled, other.pooled)
    assert not near(some.penultimate[:, :-4], others.penultimate[:, :-4])


def test_padding_sees_all_and_tokens_only_what_is_before_them(encoder: ChatGlmEncoder) -> None:
    a, b = run(encoder, [5, 70, 200, 6]).penultimate, run(encoder, [5, 70, 200, 7]).penultimate
    assert near(a[:, -4:-1], b[:, -4:-1])
    changed = (a - b).abs().amax(-1)[0] > 1e-3
    assert changed.tolist() == [True] * 5 + [False] * 3 + [True]


def test_the_order_of_words_counts(encoder: ChatGlmEncoder) -> None:
    """Beyond the causal mask: the last token sees the same words in another order."""
    a, b = run(encoder, [5, 70, 200, 6]), run(encoder, [5, 200, 70, 6])
    assert not near(a.penultimate[:, -1], b.penultimate[:, -1])


def test_the_pooled_state_is_the_last_layer_at_the_last_token(encoder: ChatGlmEncoder) -> None:
    """With one more layer behind it, what was last is the penultimate."""
    longer = ChatGlmEncoder(replace(tiny.CHATGLM, layers=4))
    state = {key: value.clone() for key, value in encoder.state_dict().items()}
    longer.load_state_dict({**longer.state_dict(), **state})
    words = [9, 8, 7]
    assert near(run(encoder, words).pooled, run(longer, words).penultimate[:, -1])


def test_half_precision_is_near() -> None:
    whole, half = ChatGlmEncoder(tiny.CHATGLM), ChatGlmEncoder(tiny.CHATGLM)
    scattered(whole, 1, spread=0.1)
    half.load_state_dict(whole.state_dict())
    half.bfloat16()
    wanted, made = run(whole, [5, 70, 200, 6]), run(half, [5, 70, 200, 6])
    for a, b in zip(wanted, made, strict=True):
        assert b.dtype == torch.bfloat16
        assert (a - b).norm() < 0.03 * a.norm()
