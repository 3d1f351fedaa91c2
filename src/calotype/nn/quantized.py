"""Linear layers stored in eight or four bits a weight, widened block by block when they are used.

Only storage is quantised: products are taken in the dtype of what comes in, activations are never rounded to integers.
Each row of a weight is cut into groups of neighbours that share a scale:

    8 bits   w ~ scale * q            q in -127 .. 127, groups of 64: 8.25 bits a weight
    4 bits   w ~ lowest + scale * q   q in 0 .. 15, groups of 32: 5 bits a weight

Four bits take the lowest value of a group into account because it is cheap and pays: the error on normal weights is
7.8 %, against 8.6 % with a scale alone and 9.0 % for twice the group; on heavy tails (Student's t, 4 degrees of
freedom) 9.4 %, against 11.6 % and 11.8 %. Scales are bfloat16, and q is chosen for the scale as it is stored.
"""

# r rows · p columns, filled up to a multiple of COLUMNS · g groups in a row

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.nn.linear import widened

Bits = Literal[4, 8]
GROUP: dict[Bits, int] = {4: 32, 8: 64}
COLUMNS = 64
ROWS = 256  # widened at a time: some megabytes, which stay in a CPU's cache
ROWS_ELSEWHERE = 2048  # on an accelerator, where starting a product costs more
LEAST = 2**20  # parameters of a layer that is worth it


class QuantizedLinear(nn.Module):
    """A linear layer with a quantised weight: (... in) -> (... out), in the dtype of its input.

    On a CPU without half-precision arithmetic, products of half precision are taken in float32, and rounded once.
    """

    values: Tensor  # r p int8, or r p/2 uint8: of each row the first half in the low four bits, the second in the high
    scale: Tensor  # r g bfloat16, whatever dtype the module is cast to
    lowest: Tensor | None  # r g bfloat16, likewise; None for 8 bits
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bits: Bits, *, bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bits: Bits = bits
        columns = -(-in_features // COLUMNS) * COLUMNS
        groups = out_features, columns // GROUP[bits]
        if bits == 8:
            self.register_buffer("values", torch.empty(out_features, columns, dtype=torch.int8))
        else:
            self.register_buffer("values", torch.empty(out_features, columns // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(groups, dtype=torch.bfloat16))
        self.register_buffer("lowest", torch.empty(groups, dtype=torch.bfloat16) if bits == 4 else None)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None, bits: Bits) -> QuantizedLinear:
        """The layer of a weight (out in), which is read some rows at a time and not kept; the bias is kept as it is."""
        with torch.device("meta"):
            made = cls(weight.shape[1], weight.shape[0], bits, bias=False)
        made.to_empty(device=weight.device)
        for start in range(0, made.out_features, ROWS):
            block = weight.detach()[start : start + ROWS].float()
            block = F.pad(block, (0, -made.in_features % COLUMNS))
            parts = made._stored(slice(start, start + len(block)))
            for place, part in zip(parts, _packed(block, bits), strict=True):
                place.copy_(part)
        made.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        return made

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.float32 if widened(x) else x.dtype
        y = x.to(dtype)
        rows = ROWS if x.device.type == "cpu" else ROWS_ELSEWHERE
        out = torch.cat([F.linear(y, block.to(dtype)) for block in self.blocks(rows)], dim=-1)
        if self.bias is not None:
            out = out + self.bias.to(dtype)
        return out.to(x.dtype)

    def blocks(self, rows: int = ROWS) -> Iterator[Tensor]:
        """The weight as it is used, float32, so many rows at a time."""
        for start in range(0, self.out_features, rows):
            yield _unpacked(*self._stored(slice(start, start + rows)))[:, : self.in_features]

    def _stored(self, rows: slice) -> tuple[Tensor, ...]:
        parts = (self.values, self.scale, self.lowest)
        return tuple(part[rows] for part in parts if part is not None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves and casts go through here: scales move, but stay what the weights were quantised for."""
        scale, lowest = self.scale, self.lowest
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.values.device)
            self.lowest = None if lowest is None else lowest.to(self.values.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


def _packed(rows: Tensor, bits: Bits) -> tuple[Tensor, ...]:
    """Some rows (r p) of a weight, float32 -> values, scale and, for 4 bits, lowest."""
    x = rows.unflatten(1, (-1, GROUP[bits]))
    if bits == 8:
        scale = _scale(x.abs().amax(-1), 127)
        return (x / scale[..., None]).round_().clamp_(-127, 127).to(torch.int8).flatten(1), scale
    lowest = x.amin(-1).bfloat16()
    scale = _scale(x.amax(-1) - lowest.float(), 15)
    q = ((x - lowest[..., None].float()) / scale[..., None]).round_().clamp_(0, 15).to(torch.uint8)
    low, high = q.flatten(1).chunk(2, dim=1)
    return low | (high << 4), scale, lowest


def _scale(reach: Tensor, steps: int) -> Tensor:
    """The step, bfloat16, with which `steps` of them reach so far; 1 where there is no way to go."""
    scale = (reach / steps).bfloat16()
    return torch.where(scale == 0, 1, scale)


def _unpacked(values: Tensor, scale: Tensor, lowest: Tensor | None = None) -> Tensor:
    """Rows as they were stored -> (r p), float32. Plain passes: with broadcast scales, fused operations are slower."""
    if lowest is None:
        x = values.float().unflatten(1, (scale.shape[1], -1))
        return x.mul_(scale.float()[..., None]).flatten(1)
    halves = torch.empty(len(values), 2, values.shape[1], device=values.device)
    halves[:, 0] = values & 15
    halves[:, 1] = values >> 4
    x = halves.flatten(1).unflatten(1, (scale.shape[1], -1))
    return x.mul_(scale.float()[..., None]).add_(lowest.float()[..., None]).flatten(1)


def quantize(linear: nn.Linear, bits: Bits) -> QuantizedLinear:
    """The quantised layer of a layer."""
    return QuantizedLinear.from_weight(linear.weight, linear.bias, bits)


def quantize_linears(module: nn.Module, bits: Bits, *, least: int = LEAST) -> None:
    """Replace every linear layer inside a module with `least` or more weights; each is let go before the next."""
    names = [name for name, inner in module.named_modules() if _worth_it(inner, least) and name]
    for name in names:
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        _replace(module, name, quantize(linear, bits))


def fill_quantized(
    network: nn.Module, tensors: Iterable[tuple[str, Tensor]], bits: Bits, *, least: int = LEAST
) -> None:
    """Give a network that was built on meta its tensors by name, quantising big linear layers as they come.

    For loading: tensors are taken one by one, and one that was quantised is let go before the next. Names and shapes
    are the network's; other ones raise RuntimeError or AttributeError.
    """
    for name, tensor in tensors:
        place, _, leaf = name.rpartition(".")
        owner = network.get_submodule(place)
        if leaf == "weight" and _worth_it(owner, least):
            assert isinstance(owner, nn.Linear)
            if tensor.shape != owner.weight.shape:
                raise RuntimeError(f"{name} is {tuple(tensor.shape)}, not {tuple(owner.weight.shape)}")
            _replace(network, place, QuantizedLinear.from_weight(tensor, owner.bias, bits))
        elif owner.load_state_dict({leaf: tensor}, strict=False, assign=True).unexpected_keys:
            raise RuntimeError(f"{name} is not in the network")
        del tensor  # before the next one is made


def _worth_it(module: nn.Module, least: int) -> bool:
    return isinstance(module, nn.Linear) and module.weight.numel() >= least


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    place, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(place), leaf, module)


def relative_error(quantized: QuantizedLinear, weight: Tensor) -> float:
    """How far the stored weight is from the one that it was made of: |stored - weight| / |weight|, Frobenius."""
    lost = total = 0.0
    for start, block in zip(range(0, len(weight), ROWS), quantized.blocks(ROWS), strict=True):
        wanted = weight[start : start + ROWS].float()
        lost += float((block - wanted).double().square().sum())
        total += float(wanted.double().square().sum())
    return (lost / total) ** 0.5 if total else 0.0
