"""Layers whose weights stay packed are, bit for bit, the layers whose weights were widened before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tiny_gguf
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from calotype.nn import linear
from calotype.nn.conv import Conv2d
from calotype.nn.formats import FORMATS
from calotype.nn.linear import BLOCK, Linear
from calotype.nn.packed import Packed, PackedConv2d, PackedEmbedding, PackedLinear, Piece, in_float8, packed
from calotype.nn.quantized import Kind, relative_error, stored
from calotype.nn.stored import Stored

KINDS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


def piece(name: str, rows: int, columns: int, seed: int = 0, scale: Tensor | None = None) -> Piece:
    count = rows * columns
    if name.startswith("F8"):
        values = torch.randn(count, generator=torch.Generator().manual_seed(seed))
        dtype = torch.float8_e4m3fn if name == "F8_E4M3" else torch.float8_e5m2
        return Piece(rows, name, values.to(dtype).view(torch.uint8), scale)
    if name == "BF16":
        values = torch.randn(count, generator=torch.Generator().manual_seed(seed)).bfloat16()
        return Piece(rows, name, values.view(torch.uint8), scale)
    made = tiny_gguf.blocks(name, count // FORMATS[name].weights, seed)
    return Piece(rows, name, torch.from_numpy(made).flatten(), scale)


def weight(pieces: Sequence[Piece], columns: int) -> Tensor:
    """What pieces mean, float32."""
    parts: list[Tensor] = []
    for one in pieces:
        form = FORMATS[one.format]
        rows = form.widen(one.values.view(-1, form.bytes)).view(one.rows, columns)
        parts.append(rows if one.scale is None else rows * one.scale.view(-1, 1))
    return torch.cat(parts)


def plain(wanted: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Linear:
    made = Linear(wanted.shape[1], wanted.shape[0], bias=bias is not None)
    state = {"weight": wanted.to(dtype)} | ({} if bias is None else {"bias": bias.to(dtype)})
    made.load_state_dict(state, assign=True)
    return made.requires_grad_(False)


def pair(pieces: Sequence[Piece], columns: int, dtype: torch.dtype, *, bias: bool = True) -> tuple[Packed, Linear]:
    wanted = weight(pieces, columns)
    given = torch.randn(len(wanted), generator=torch.Generator().manual_seed(9)) if bias else None
    layer = plain(wanted, dtype, given)
    made = packed(layer, pieces, dtype)
    assert isinstance(made, PackedLinear)
    return made, layer


@pytest.mark.parametrize("name", [*KINDS, "F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_those_of_the_widened_weight(name: str, dtype: torch.dtype) -> None:
    made, layer = pair([piece(name, 300, 256)], 256, dtype)
    for tokens in (1, 9, 70):
        x = torch.randn(2, tokens, 256).to(dtype)
        assert torch.equal(made(x), layer(x))
    x = torch.randn(5, 256)
    assert torch.equal(made(x), layer(x)), "float32 is answered in float32"


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("tokens", [3, 100])
def test_blocks_of_rows_are_those_of_the_plain_layer(
    native: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than are widened at a time, and no multiple of that."""
    monkeypatch.setattr(linear, "native", lambda dtype: native)
    made, layer = pair([piece("F8_E4M3", 2 * BLOCK + 77, 96)], 96, torch.bfloat16)
    x = torch.randn(tokens, 96).bfloat16()
    assert torch.equal(made(x), layer(x))


def test_pieces_may_differ_in_format_and_scale() -> None:
    scales = torch.tensor([0.37]), torch.rand(200) + 0.1
    pieces = [
        piece("F8_E4M3", 100, 256, 0, scales[0]),
        piece("F8_E5M2", 200, 256, 1, scales[1]),
        piece("Q4_K", 50, 256, 2),
        piece("Q8_0", 30, 256, 3),
        piece("BF16", 20, 256, 4),
    ]
    for dtype in (torch.float32, torch.bfloat16):
        made, layer = pair(pieces, 256, dtype)
        x = torch.randn(80, 256).to(dtype)
        assert torch.equal(made(x), layer(x))
    assert torch.equal(torch.cat(list(made.blocks(7))), weight(pieces, 256))


@pytest.mark.parametrize("columns", [16, 96, 320, 64])
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "Q5_1"])
def test_blocks_may_cross_the_borders_of_rows(name: str, columns: int) -> None:
    """As in files whose tensors were cut into rows of 256."""
    rows = 160 * 16 // columns * 32 if columns == 16 else 320
    one = piece(name, rows, columns)
    made, layer = pair([one], columns, torch.float32, bias=False)
    x = torch.randn(70, columns)
    assert torch.equal(made(x), layer(x))
    whole = weight([one], columns)
    for start, stop in ((0, 1), (1, 2), (3, 50), (rows - 1, rows), (255, 300)):
        assert torch.equal(made.widen(start, stop), whole[start:stop])


@pytest.mark.parametrize("name", ["Q6_K", "Q8_0", "F8_E4M3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("native", [True, False])
def test_convolutions(name: str, dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "native", lambda dtype: native)
    given = Conv2d(32, 64, 3, padding=1, stride=2)
    one = piece(name, 64, 32 * 9)
    given.load_state_dict(
        {"weight": weight([one], 32 * 9).view(64, 32, 3, 3).to(dtype), "bias": torch.randn(64).to(dtype)}, assign=True
    )
    made = packed(given.requires_grad_(False), [one], dtype)
    assert isinstance(made, PackedConv2d)
    x = torch.randn(2, 32, 9, 8).to(dtype)
    assert torch.equal(made(x), given(x))


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "F8_E5M2"])
def test_embeddings(name: str) -> None:
    scale = torch.rand(90) if name == "F8_E5M2" else None
    one = piece(name, 90, 256, scale=scale)
    given = nn.Embedding(90, 256).requires_grad_(False)
    given.load_state_dict({"weight": weight([one], 256).bfloat16()}, assign=True)
    made = packed(given, [one], torch.bfloat16)
    assert isinstance(made, PackedEmbedding)
    numbers = torch.tensor([[3, 89, 0], [3, 3, 17]])
    assert torch.equal(made(numbers), given(numbers))
    assert packed(nn.Embedding(256, 8), [piece("Q8_0", 256, 8)], torch.bfloat16) is None, "rows are no whole blocks"


def test_no_whole_weight_stands_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "native", lambda dtype: False)
    rows, columns = 8 * BLOCK, 64
    made, _ = pair([piece("F8_E4M3", rows, columns)], columns, torch.bfloat16)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor) and t.dtype == torch.float32]
            largest = max([largest, *sizes])
            return out

    with Watch():
        made(torch.randn(65, columns).bfloat16())
    assert largest == BLOCK * 65  # a block of answers; one of weights is as large here but for one row
    assert largest < rows * columns / 7


# Moves and casts


def test_casts_leave_what_is_stored_alone() -> None:
    made, _ = pair([piece("F8_E4M3", 60, 64, scale=torch.rand(60) * 1e-9)], 64, torch.float32)
    before = torch.cat(list(made.blocks()))
    made.to(torch.bfloat16)
    assert made.dtype == torch.bfloat16
    assert made.bias is not None
    assert made.bias.dtype == torch.bfloat16
    assert torch.equal(torch.cat(list(made.blocks())), before)
    made.half().to("meta")
    assert made.dtype == torch.float16
    assert {tensor.device.type for tensor in made.state_dict().values()} == {"meta"}
    assert {tensor.dtype for name, tensor in made.state_dict().items() if name != "bias"} == {
        torch.uint8,
        torch.float32,
    }


def test_gradients_reach_the_input() -> None:
    made, layer = pair([piece("Q8_0", 2 * BLOCK, 32)], 32, torch.bfloat16)
    for x in (torch.randn(3, 32), torch.randn(70, 32).bfloat16()):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        made(a).float().sum().backward()
        layer(b).float().sum().backward()
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_the_plain_layer_learns_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its product is taken block by block; a weight that is trained is taken whole."""
    monkeypatch.setattr(linear, "native", lambda dtype: False)
    layer = Linear(8, 2 * BLOCK).bfloat16()
    x = torch.randn(80, 8).bfloat16()
    layer(x).float().sum().backward()
    assert layer.weight.grad is not None
    wanted = x.float().sum(0).expand(2 * BLOCK, -1)
    assert torch.allclose(layer.weight.grad.float(), wanted, atol=0.1)


# float8 made here


@pytest.mark.parametrize(("name", "least", "most"), [("F8_E4M3", 0.02, 0.03), ("F8_E5M2", 0.04, 0.06)])
@pytest.mark.parametrize("spread", [1e-7, 0.02, 1e4])
def test_float8_with_a_scale_a_row_is_as_good_at_any_scale(name: str, least: float, most: float, spread: float) -> None:
    given = torch.randn(600, 300, generator=torch.Generator().manual_seed(0)) * spread
    given *= torch.linspace(0.01, 1, 600)[:, None]
    made = PackedLinear(given.shape, [in_float8(given, name)], torch.float32, None)
    assert least < relative_error(made, given) < most


def test_float8_keeps_zeros_and_what_is_not_finite() -> None:
    weight = torch.zeros(3, 64)
    weight[1, 3] = torch.nan
    weight[2, 3] = torch.inf
    made = PackedLinear(weight.shape, [in_float8(weight, "F8_E4M3")], torch.float32, None)
    out = made(torch.ones(1, 64))[0]
    assert out[0] == 0
    assert not out[1:].isfinite().any()


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.0065), ("int4", 0.085), ("fp8_e4m3", 0.03), ("fp8_e5m2", 0.06)])
@pytest.mark.parametrize("module", [Linear(288, 200), Conv2d(32, 200, 3, padding=1)])
def test_every_kind_goes_for_linear_layers_and_convolutions(kind: Kind, most: float, module: Linear | Conv2d) -> None:
    module = module.requires_grad_(False)
    drawn = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(0)) * 0.05
    module.weight.copy_(drawn)
    made = stored(module, module.weight, kind)
    assert isinstance(made, Stored)
    assert 0 < relative_error(made, module.weight) < most
    x = torch.randn(3, 288) if isinstance(module, Linear) else torch.randn(2, 32, 8, 8)
    wanted = module(x)
    assert 0 < (made(x) - wanted).norm() < 1.3 * most * wanted.norm()
