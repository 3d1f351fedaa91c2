"""Quantised storage: how much it loses, how much it takes, and that nothing else changes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import tiny_glm
import torch
from tiny import scattered
from torch import Tensor, nn

from calotype.nn import linear, quantized
from calotype.nn.quantized import (
    Bits,
    Kind,
    QuantizedLinear,
    fill_stored,
    quantize,
    quantize_linears,
    relative_error,
)
from calotype.text.chatglm import ChatGlmEncoder

BOTH = pytest.mark.parametrize("bits", [4, 8])
KIND: dict[Bits, Kind] = {4: "int4", 8: "int8"}
LIMIT = {4: 0.08, 8: 0.0062}  # on normal weights


def layer(width: int = 256, rows: int = 300, *, bias: bool = True, spread: float = 0.02) -> nn.Linear:
    made = nn.Linear(width, rows, bias=bias)
    with torch.no_grad():
        made.weight.copy_(torch.randn(rows, width, generator=torch.Generator().manual_seed(0)) * spread)
    return made.requires_grad_(False)


def whole(made: QuantizedLinear) -> Tensor:
    return torch.cat(list(made.blocks()))


@BOTH
@pytest.mark.parametrize("spread", [1e-6, 0.02, 1e4])
def test_the_error_on_normal_weights_is_small_at_any_scale(bits: Bits, spread: float) -> None:
    given = layer(512, 600, spread=spread)
    made = quantize(given, bits)
    error = relative_error(made, given.weight)
    assert LIMIT[bits] / 2 < error < LIMIT[bits]
    assert error == pytest.approx(float((whole(made) - given.weight).norm() / given.weight.norm()), rel=1e-3)


@BOTH
def test_every_weight_is_within_half_a_step(bits: Bits) -> None:
    """Of the scale as it is stored, rounded; but at the ends of a group, which rounding may have moved inwards."""
    given = layer(128, 40).weight + torch.linspace(-0.5, 0.5, 128)  # groups that are not centred at 0
    made = QuantizedLinear.from_weight(given, None, bits)
    step = made.scale.float().repeat_interleave(quantized.GROUP[bits], dim=1)
    error = (whole(made) - given).abs()
    groups = given.unflatten(1, (-1, quantized.GROUP[bits]))
    end = ((groups == groups.amax(-1, keepdim=True)) | (groups == groups.amin(-1, keepdim=True))).flatten(1)
    end |= given.abs() > 126.5 * step if bits == 8 else torch.tensor(False)
    assert (error[~end] <= 0.501 * step[~end]).all()
    assert (error <= 0.501 * step + given.abs() * 2**-8).all()


@BOTH
def test_constant_groups_are_kept(bits: Bits) -> None:
    """All zero, as pruned or padded weights are, or all alike."""
    weight = torch.zeros(3, 128)
    weight[1] = 0.5
    weight[2] = -0.25
    made = QuantizedLinear.from_weight(weight, None, bits)
    assert (made.scale != 0).all(), "nothing was divided by zero"
    assert torch.equal(whole(made)[0], weight[0])
    assert torch.allclose(whole(made), weight, rtol=2**-8)


def test_four_bits_are_two_in_a_byte() -> None:
    """Against the format as it is described, weight by weight."""
    made = QuantizedLinear.from_weight(layer(100, 2).weight, None, 4)
    assert made.values.shape == (2, 64)
    assert made.lowest is not None
    for row, column in ((0, 0), (1, 31), (0, 63), (1, 64), (0, 99)):
        byte = int(made.values[row, column % 64])
        q = byte >> 4 if column >= 64 else byte & 15
        wanted = float(made.lowest[row, column // 32]) + q * float(made.scale[row, column // 32])
        assert float(whole(made)[row, column]) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("bits", "wanted"), [(4, 5.0), (8, 8.25)])
def test_bits_a_weight(bits: Bits, wanted: float) -> None:
    made = quantize(layer(512, 64, bias=False), bits)
    stored = sum(tensor.nbytes for tensor in made.state_dict().values())
    assert stored * 8 / (512 * 64) == wanted


@BOTH
@pytest.mark.parametrize("width", [1, 31, 64, 100, 130])
@pytest.mark.parametrize("rows", [1, 255, 256, 257])
def test_products_are_those_of_the_stored_weight(bits: Bits, width: int, rows: int) -> None:
    given = layer(width, rows)
    made = quantize(given, bits)
    assert (made.in_features, made.out_features) == (width, rows)
    x = torch.randn(2, 5, width)
    wanted = nn.functional.linear(x, whole(made), given.bias)
    assert torch.allclose(made(x), wanted, atol=1e-6)
    assert made(x).shape == (2, 5, rows)


@BOTH
def test_outputs_are_near_those_of_the_layer(bits: Bits) -> None:
    given = layer(1024, 300, bias=False)
    x = torch.randn(20, 1024)
    wanted = given(x)
    assert (quantize(given, bits)(x) - wanted).norm() < 1.2 * LIMIT[bits] * wanted.norm()


@BOTH
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_input_says_the_dtype(
    bits: Bits, native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "native", lambda dtype: native)
    made = quantize(layer(128, 70), bits)
    x = torch.randn(9, 128).to(dtype)
    out = made(x)
    assert out.dtype == dtype
    wanted = made(x.float())
    assert (out.float() - wanted).norm() < torch.finfo(torch.bfloat16).eps * wanted.norm()


def test_half_precision_without_its_arithmetic_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "native", lambda dtype: False)
    made = quantize(layer(128, 70), 8)
    x = torch.randn(9, 128).bfloat16()
    assert torch.equal(made(x), made(x.float()).bfloat16())


@BOTH
def test_weights_may_come_in_half_precision(bits: Bits) -> None:
    given = layer(128, 70)
    half = quantize(layer(128, 70).bfloat16(), bits)
    assert half.bias is not None
    assert half.bias.dtype == torch.bfloat16
    assert torch.equal(whole(half), whole(QuantizedLinear.from_weight(given.weight.bfloat16().float(), None, bits)))


@BOTH
def test_the_state_comes_back(bits: Bits) -> None:
    made = quantize(layer(100, 70), bits)
    x = torch.randn(3, 100)
    other = QuantizedLinear(100, 70, bits, bias=True)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x), made(x))
    with torch.device("meta"):
        empty = QuantizedLinear(100, 70, bits, bias=True)
    empty.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(empty(x), made(x))
    with pytest.raises(RuntimeError, match="scale"):
        other.load_state_dict({key: value for key, value in made.state_dict().items() if key != "scale"})


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_casts_leave_the_stored_weight_alone(bits: Bits, dtype: torch.dtype) -> None:
    made = quantize(layer(128, 70, spread=1e-7), bits)  # too small for float16
    before = whole(made)
    made.to(dtype)
    assert torch.equal(whole(made), before)
    assert made.scale.dtype == torch.bfloat16
    assert made.bias is not None
    assert made.bias.dtype == dtype


@BOTH
def test_it_moves(bits: Bits) -> None:
    made = quantize(layer(128, 70), bits).to("meta", torch.float16)
    assert {tensor.device.type for tensor in made.state_dict().values()} == {"meta"}
    made.to_empty(device="cpu")
    assert {tensor.device.type for tensor in made.state_dict().values()} == {"cpu"}
    assert made.scale.dtype == torch.bfloat16


@BOTH
def test_what_is_not_finite_stays_so(bits: Bits) -> None:
    """A broken weight must not turn into a plausible one."""
    for bad in (torch.nan, torch.inf, -torch.inf):
        weight = torch.ones(2, 64)
        weight[1, 3] = bad
        out = QuantizedLinear.from_weight(weight, None, bits)(torch.ones(1, 64))
        assert torch.isfinite(out[0, 0])
        assert not torch.isfinite(out[0, 1])


def test_gradients_reach_the_input() -> None:
    made = quantize(layer(64, 70), 4)
    x = torch.randn(3, 64, requires_grad=True)
    made(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, whole(made).sum(0).expand(3, -1), atol=1e-5)


# Whole networks


def network() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 80, bias=False)), nn.Embedding(90, 64))
    return made.append(nn.Linear(8, 8)).requires_grad_(False)


@BOTH
def test_only_big_linear_layers_are_replaced(bits: Bits) -> None:
    made = network()
    quantize_linears(made, bits, least=64 * 64)
    inner = made[1]
    assert isinstance(inner, nn.Sequential)
    assert [type(module) for module in (*inner, *made)] == [
        QuantizedLinear,
        QuantizedLinear,
        nn.Sequential,
        nn.Embedding,
        nn.Linear,
    ]


def test_layers_are_let_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    weights = [weakref.ref(module.weight) for module in made if isinstance(module, nn.Linear)]
    alive: list[int] = []
    real = quantized.quantize

    def counted(given: nn.Linear, bits: Bits) -> QuantizedLinear:
        alive.append(sum(ref() is not None for ref in weights))
        return real(given, bits)

    monkeypatch.setattr(quantized, "quantize", counted)
    quantize_linears(made, 8, least=1)
    assert alive == [4, 3, 2, 1]


@BOTH
@pytest.mark.parametrize("backwards", [False, True])
def test_filling_is_loading_and_quantising(bits: Bits, backwards: bool) -> None:
    given = network()
    state = {key: value.clone() for key, value in given.state_dict().items()}
    with torch.device("meta"):
        empty = network()
    items = list(state.items())
    fill_stored(empty, reversed(items) if backwards else items, KIND[bits], least=64 * 64)
    quantize_linears(given, bits, least=64 * 64)
    wanted, made = given.state_dict(), empty.state_dict()
    assert wanted.keys() == made.keys()
    assert all(torch.equal(wanted[key], made[key]) for key in wanted)


def test_filling_keeps_no_tensor_that_was_quantised() -> None:
    with torch.device("meta"):
        empty = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    alive: list[int] = []
    given: list[weakref.ref[Tensor]] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number in range(4):
            gc.collect()
            alive.append(sum(ref() is not None for ref in given))
            yield f"{number}.weight", made()

    def made() -> Tensor:
        tensor = torch.randn(64, 64)
        given.append(weakref.ref(tensor))
        return tensor

    fill_stored(empty, tensors(), "int4", least=1)
    assert alive == [0, 0, 0, 0]


def test_filling_refuses_what_does_not_fit() -> None:
    for name, shape in (("0.weight", (64, 32)), ("0.bias", (3,)), ("0.other", (3,)), ("9.weight", (3,))):
        with torch.device("meta"):
            empty = network()
        with pytest.raises((RuntimeError, AttributeError)):
            fill_stored(empty, [(name, torch.zeros(shape))], "int8", least=1)


@BOTH
def test_an_encoder_quantised_is_near_itself(bits: Bits) -> None:
    encoder = ChatGlmEncoder(tiny_glm.CHATGLM)
    scattered(encoder, 0, spread=0.1)
    ids = torch.randint(3, 290, (1, 12), generator=torch.Generator().manual_seed(1))
    inputs = ids, torch.arange(12)[None], torch.ones(1, 12, dtype=torch.bool)
    wanted = encoder(*inputs)
    quantize_linears(encoder, bits, least=1)
    assert sum(isinstance(module, QuantizedLinear) for module in encoder.modules()) == 4 * 3
    for a, b in zip(wanted, encoder(*inputs), strict=True):
        assert (a - b).norm() < (0.25 if bits == 4 else 0.02) * a.norm()
