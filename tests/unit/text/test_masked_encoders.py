"""What BERT's and T5's masks promise; that the encoders equal the reference is shown in tests/parity."""

from __future__ import annotations

import pytest
import torch
from tiny import scattered
from tiny_checkpoints import T5_TEXT
from torch import Tensor

from calotype.text.bert import BertConfig, BertEncoder
from calotype.text.t5 import T5Encoder

BERT = BertConfig(vocabulary=40, width=48, layers=3, heads=4, mlp_width=64, positions=12, kinds=2)
IDS = torch.tensor([[3, 9, 30, 7, 1]])


def bert() -> BertEncoder:
    made = BertEncoder(BERT)
    scattered(made, 0, spread=0.3)
    return made


def t5() -> T5Encoder:
    made = T5Encoder(T5_TEXT)
    scattered(made, 0, spread=0.3)
    return made


def padded(length: int, padding: int) -> tuple[Tensor, Tensor]:
    more = length - IDS.shape[1]
    ids = torch.cat([IDS, torch.full((1, more), padding)], dim=1)
    return ids, torch.arange(length)[None] < IDS.shape[1]


@pytest.mark.parametrize("encoder", [bert(), t5()], ids=["bert", "t5"])
def test_tokens_know_nothing_of_the_padding(encoder: BertEncoder | T5Encoder) -> None:
    some, more, other = (encoder(*padded(*case)) for case in ((7, 0), (12, 0), (7, 5)))
    alone = encoder(IDS, torch.ones_like(IDS, dtype=torch.bool))
    for states in (some, more, other):
        assert torch.allclose(states[:, :5], alone, atol=1e-5)
    # Padding has states too, and they are its own.
    assert not torch.allclose(some[:, 5:], other[:, 5:], atol=1e-2)
    assert some.isfinite().all()


def test_without_a_mask_t5_sees_padding() -> None:
    encoder = t5()
    ids, mask = padded(7, 0)
    assert not torch.allclose(encoder(ids), encoder(ids, mask), atol=1e-2)
    assert torch.equal(encoder(IDS), encoder(IDS, torch.ones_like(IDS, dtype=torch.bool)))


def test_bert_knows_a_tokens_place_and_its_type() -> None:
    encoder = bert()
    states = encoder(torch.tensor([[4, 4]]), torch.ones(1, 2, dtype=torch.bool))
    assert not torch.allclose(states[:, 0], states[:, 1], atol=1e-2)
    with torch.no_grad():
        encoder.kinds.weight[1] += 1
        same = encoder(torch.tensor([[4, 4]]), torch.ones(1, 2, dtype=torch.bool))
        encoder.kinds.weight[0] += torch.linspace(-1, 1, BERT.width)
        other = encoder(torch.tensor([[4, 4]]), torch.ones(1, 2, dtype=torch.bool))
    assert torch.equal(states, same)
    assert not torch.allclose(states, other, atol=1e-2)


@pytest.mark.parametrize("encoder", [bert(), t5()], ids=["bert", "t5"])
def test_half_precision_stays_finite(encoder: BertEncoder | T5Encoder) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        states = type(encoder)(encoder.config).to(dtype).eval()  # pyright: ignore[reportArgumentType]
        states.load_state_dict(encoder.state_dict())
        with torch.no_grad():
            made, wanted = states(*padded(9, 0)), encoder(*padded(9, 0))
        assert made.dtype == dtype
        assert (made.float() - wanted).abs().max() < 0.1 * wanted.abs().max()
