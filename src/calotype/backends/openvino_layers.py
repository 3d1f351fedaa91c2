"""Layers as OpenVINO operations, with the weights of torch's: in float32, or with products in eight bits.

Weights that stay as they are are not copied: constants are views of torch's memory, which must therefore live as long
as the graph.
"""

# b batch · n tokens · c channels · height · width

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import openvino as ov
import torch
from openvino import op
from openvino import opset13 as ops
from torch import Tensor, nn

from calotype.errors import RequestError
from calotype.nn.conv import Conv2d
from calotype.nn.linear import Linear

ALL = slice(None)


class Products:
    """Where a network multiplies by its weights."""

    def linear(self, layer: nn.Module, x: ov.Output, rows: slice = ALL) -> ov.Output:
        """What those rows of the layer's weight give for x (b n c)."""
        known(layer, Linear)
        assert isinstance(layer, Linear)
        y = ops.matmul(x, self._matrix(layer.weight[rows]), False, True).output(0)
        if layer.bias is None:  # pyright: ignore[reportUnnecessaryComparison]
            return y
        return plus(y, constant(layer.bias[rows], 1, 1, -1))

    def conv(self, layer: nn.Module, x: ov.Output) -> ov.Output:
        """A convolution over x (b c height width)."""
        layer = _conv(layer)
        return _biased(layer, _convolution(layer, x, constant(layer.weight)))

    def activated_conv(self, norm: nn.GroupNorm, layer: nn.Module, x: ov.Output) -> ov.Output:
        """A convolution over what normalising and SiLU make of x."""
        return self.conv(layer, activated(norm, x))

    def _matrix(self, weight: Tensor) -> ov.Output:
        return constant(weight)


class EightBits(Products):
    """Products in int8, wherever that can be done with little loss; no calibration is needed.

    Weights are rounded to 8 bits with a scale for each output. What they are multiplied by is rounded while a step
    runs, with scales that it finds itself: for linear layers OpenVINO takes one for every 64 channels of a token; for
    a convolution there is one for each picture. Convolutions over what was not normalised before (shortcuts, changes
    of size, the first one) stay in float32: a scale for all channels suits them badly, and they take little time.
    """

    def activated_conv(self, norm: nn.GroupNorm, layer: nn.Module, x: ov.Output) -> ov.Output:
        layer = _conv(layer)
        x = activated(norm, x)
        highest = ops.reduce_max(x, integers(1, 2, 3), True)
        step = ops.maximum(ops.multiply(highest, scalar(1 / ABOVE)), scalar(SILU_REACH / BELOW))
        ends = [scalar(-BELOW), scalar(ABOVE)]
        rounded = ops.fake_quantize(ops.multiply(x, ops.divide(scalar(1), step)), *ends, *ends, BELOW + ABOVE + 1)
        y = _convolution(layer, rounded.output(0), _rounded(layer.weight))
        return _biased(layer, ops.multiply(y, step).output(0))

    def _matrix(self, weight: Tensor) -> ov.Output:
        return _rounded(weight)


SILU_REACH = 0.2785  # SiLU is nowhere lower than minus this
BELOW, ABOVE = 16, 239  # of 256 steps, those below zero and above it


def activated(norm: nn.GroupNorm, x: ov.Output) -> ov.Output:
    return ops.swish(group_norm(norm, x)).output(0)


def _conv(layer: nn.Module) -> Conv2d:
    known(layer, Conv2d)
    assert isinstance(layer, Conv2d) and isinstance(layer.padding, tuple)
    assert layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return layer


def _convolution(layer: Conv2d, x: ov.Output, weight: ov.Output) -> ov.Output:
    padding = [int(side) for side in layer.padding]
    return ops.convolution(x, weight, list(layer.stride), padding, padding, [1, 1]).output(0)


def _biased(layer: Conv2d, y: ov.Output) -> ov.Output:
    return y if layer.bias is None else plus(y, constant(layer.bias, 1, -1, 1, 1))


def group_norm(layer: nn.GroupNorm, x: ov.Output) -> ov.Output:
    """Op by op, in the layout that convolutions have: OpenVINO's own operation is surrounded by two copies."""
    known(layer, nn.GroupNorm)
    b, c, _, _ = x.shape
    groups = b, layer.num_groups, c // layer.num_groups

    def mean(y: ov.Output) -> ov.Output:
        """Over each group: b groups 1."""
        each = ops.reduce_mean(y, integers(2, 3), True).output(0)
        return ops.reduce_mean(reshaped(each, *groups), integers(2), True).output(0)

    def each_channel(y: ov.Output) -> ov.Output:
        return reshaped(y, b, c, 1, 1)

    average = ops.broadcast(mean(x), integers(*groups))
    centred = ops.subtract(x, each_channel(average.output(0))).output(0)
    variance = mean(ops.multiply(centred, centred).output(0))
    weight, bias = (constant(given, 1, *groups[1:]) for given in (layer.weight, layer.bias))
    scale = ops.divide(weight, ops.sqrt(plus(variance, scalar(layer.eps))))
    y = ops.multiply(centred, each_channel(scale.output(0)))
    return plus(y.output(0), each_channel(ops.broadcast(bias, integers(*groups)).output(0)))


def layer_norm(layer: nn.LayerNorm, x: ov.Output) -> ov.Output:
    known(layer, nn.LayerNorm)
    y = ops.mvn(x, integers(-1), True, layer.eps, "inside_sqrt")
    return plus(ops.multiply(y, constant(layer.weight, 1, 1, -1)).output(0), constant(layer.bias, 1, 1, -1))


def known(layer: nn.Module, kind: type[nn.Module]) -> None:
    """What has been put in a layer's place computes something else, which must not be left out in silence."""
    if type(layer) is not kind:
        raise RequestError(
            "backend", "openvino", f"networks of plain layers; here {type(layer).__name__} stands for {kind.__name__}"
        )


def _rounded(weight: Tensor) -> ov.Output:
    """The weight in 8 bits, with a scale for each of its outputs."""
    rows = weight.detach().float().flatten(1)
    scale = rows.abs().amax(1, keepdim=True).clamp_min_(1e-20) / 127
    values = (rows / scale).round_().to(torch.int8).reshape(weight.shape)
    scales = scale.reshape(-1, *[1] * (weight.ndim - 1))
    return ops.multiply(ops.convert(op.Constant(values.numpy()), "f32"), op.Constant(scales.numpy())).output(0)


def constant(weight: Tensor, *shape: int) -> ov.Output:
    """A view of torch's memory, in float32 wherever it is used."""
    weight = weight.detach()
    if not weight.is_contiguous():
        weight = weight.contiguous()
    if shape:
        weight = weight.reshape(shape)
    if weight.dtype == torch.bfloat16:  # numpy lacks it
        bits = weight.view(torch.int16).numpy()
        node = op.Constant(ov.Tensor(bits, ov.Shape(list(bits.shape)), ov.Type.bf16), True)
    else:
        node = op.Constant(weight.numpy(), True)
    return node.output(0) if weight.dtype == torch.float32 else ops.convert(node, "f32").output(0)


def parameter(shape: Sequence[int]) -> op.Parameter:
    return ops.parameter(list(shape), np.float32)


def scalar(value: float) -> ov.Output:
    return ops.constant(np.float32(value)).output(0)


def integers(*values: int, scalar: bool = False) -> ov.Output:
    return ops.constant(np.array(values[0] if scalar else values, np.int64)).output(0)


def reshaped(x: ov.Output, *shape: int) -> ov.Output:
    return ops.reshape(x, integers(*shape), False).output(0)


def plus(x: ov.Output, y: ov.Output) -> ov.Output:
    return ops.add(x, y).output(0)
