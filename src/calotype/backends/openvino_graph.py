"""OpenVINO graphs of our UNet and of the autoencoder's decoder, built op by op from the networks' own weights.

Nothing is traced, run or copied for it: a graph stands in a tenth of a second whatever the network's size, and its
constants are views of torch's memory (which must therefore live as long as the graph). All shapes are static.
"""

# b batch · n tokens · c channels · h heads (in attention), height · w width · d width of a head

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import openvino as ov
import torch
from openvino import op
from openvino import opset13 as ops
from torch import Tensor, nn

from calotype.errors import RequestError
from calotype.nn import autoencoder as vae
from calotype.nn import unet
from calotype.nn.conv import Conv2d
from calotype.nn.linear import Linear

Shape = Sequence[int]
KeysAndValues = Sequence[tuple[ov.Output, ov.Output]]
ALL = slice(None)
SCORES = 2**26  # attention scores (256 MB) beyond which a wide head's queries are taken in parts


def unet_graph(
    net: unet.UNet, x: Shape, shifts: Sequence[Shape], text: Sequence[Sequence[tuple[Shape, Shape]]]
) -> ov.Model:
    """`UNet.forward` for inputs of these shapes. Parameters in order: x, every shift, every key and value."""
    picture, given = _parameter(x), [_parameter(shape) for shape in shifts]
    kv = [[(_parameter(k), _parameter(v)) for k, v in groups] for groups in text]
    shift = iter(node.output(0) for node in given)
    keys = iter([[(k.output(0), v.output(0)) for k, v in groups] for groups in kv])
    answer = _unet(net, picture.output(0), shift, keys)
    assert next(shift, None) is None and next(keys, None) is None
    return _model(answer, [picture, *given, *(node for groups in kv for pair in groups for node in pair)])


def decoder_graph(net: vae.Autoencoder, latent: Shape) -> ov.Model:
    """`Autoencoder.decode` for latents of this shape."""
    given = _parameter(latent)
    z = ops.add(ops.multiply(given, _scalar(1 / net.config.scale)), _scalar(net.config.shift)).output(0)
    if net.post_quant is not None:
        z = _conv(net.post_quant, z)
    picture = _decoder(net.decoder, z)
    return _model(_sum(ops.multiply(picture, _scalar(0.5)).output(0), _scalar(0.5)), [given])


def _model(answer: ov.Output, parameters: list[op.Parameter]) -> ov.Model:
    return ov.Model([ops.result(answer)], parameters)  # pyright: ignore[reportGeneralTypeIssues]  its stubs disagree


def _unet(net: unet.UNet, x: ov.Output, shift: Iterator[ov.Output], keys: Iterator[KeysAndValues]) -> ov.Output:
    x = _conv(net.conv_in, x)
    skipped = [x]
    for level in net.down:
        assert isinstance(level, unet.DownLevel)
        for block, transformer in level.steps():
            x = _residual(block, x, next(shift))
            if transformer is not None:
                x = _transformer(transformer, x, keys)
            skipped.append(x)
        if level.sample is not None:
            x = _conv(level.sample, x)
            skipped.append(x)
    x = _residual(net.middle.first, x, next(shift))
    x = _residual(net.middle.second, _transformer(net.middle.transformer, x, keys), next(shift))
    for level in net.up:
        assert isinstance(level, unet.UpLevel)
        for block, transformer in level.steps():
            both = ops.concat([x, _repeated(skipped.pop(), x.shape[0])], 1).output(0)
            x = _residual(block, both, next(shift))
            if transformer is not None:
                x = _transformer(transformer, x, keys)
        if level.sample is not None:
            x = _conv(level.sample, _enlarged(x, skipped[-1].shape[2], skipped[-1].shape[3]))
    return _conv(net.conv_out, ops.swish(_group_norm(net.norm_out, x)).output(0))


def _decoder(net: vae.Decoder, z: ov.Output) -> ov.Output:
    x = _residual(net.middle.first, _conv(net.conv_in, z))
    x = _residual(net.middle.second, _spatial_attention(net.middle.attention, x))
    for level in net.levels:
        assert isinstance(level, vae.DecoderLevel)
        for block in level.blocks:
            x = _residual(block, x)
        if level.up is not None:
            x = _conv(level.up, _enlarged(x, 2 * x.shape[2], 2 * x.shape[3]))
    return _conv(net.conv_out, ops.swish(_group_norm(net.norm_out, x)).output(0))


def _residual(block: nn.Module, x: ov.Output, shift: ov.Output | None = None) -> ov.Output:
    assert isinstance(block, unet.ResidualBlock | vae.ResidualBlock)
    y = _conv(block.conv1, ops.swish(_group_norm(block.norm1, x)).output(0))
    if shift is not None:
        y = ops.add(y, shift).output(0)
    y = _conv(block.conv2, ops.swish(_group_norm(block.norm2, y)).output(0))
    return _sum(y, x if block.shortcut is None else _conv(block.shortcut, x))


def _transformer(block: nn.Module, x: ov.Output, keys: Iterator[KeysAndValues]) -> ov.Output:
    assert isinstance(block, unet.Transformer)
    tokens = _linear(block.inward, _tokens(_group_norm(block.norm, x)))
    for inner in block.blocks:
        tokens = _transformer_block(inner, tokens, next(keys))
    return _sum(x, _picture(_linear(block.outward, tokens), x))


def _transformer_block(block: nn.Module, x: ov.Output, text: KeysAndValues) -> ov.Output:
    assert isinstance(block, unet.TransformerBlock)
    y = _layer_norm(block.self_norm, x)
    own = block.self_attention
    q, k, v = (_heads(_linear(project, y), own.heads) for project in (own.q, own.k, own.v))
    x = _sum(x, _linear(own.out, _attention(q, k, v)))
    x = _sum(x, _cross_attention(block.cross_attention, _layer_norm(block.cross_norm, x), text))
    y = _layer_norm(block.mlp_norm, x)
    value, gate = (_linear(block.mlp_in, y, part) for part in halves(block.mlp_in))  # splitting one product is a copy
    return _sum(x, _linear(block.mlp_out, ops.multiply(value, ops.gelu(gate, "erf")).output(0)))


def _cross_attention(block: unet.CrossAttention, x: ov.Output, text: KeysAndValues) -> ov.Output:
    """Each group of rows with its own text; one row of x meets them all."""
    rows = [k.shape[0] for k, _ in text]
    q = _repeated(_heads(_linear(block.q, x), block.heads), sum(rows))
    parts = [q] if len(rows) == 1 else ops.variadic_split(q, _integers(0, scalar=True), _integers(*rows)).outputs()
    mixed = [_attention(part, k, v) for part, (k, v) in zip(parts, text, strict=True)]
    return _linear(block.out, mixed[0] if len(mixed) == 1 else ops.concat(mixed, 0).output(0))


def _spatial_attention(block: vae.SpatialAttention, x: ov.Output) -> ov.Output:
    tokens = _tokens(_group_norm(block.norm, x))
    q, k, v = (_heads(_linear(project, tokens), 1) for project in (block.q, block.k, block.v))
    return _sum(x, _picture(_linear(block.out, _attention(q, k, v)), x))


def _attention(q: ov.Output, k: ov.Output, v: ov.Output) -> ov.Output:
    """(b h n d) -> (b n h*d)."""
    b, h, n, d = q.shape
    # One wide head is not fused: its scores would all be held at once.
    parts = -(-n * k.shape[2] // SCORES) if h == 1 else 1
    pieces = (
        [q] if parts == 1 else ops.variadic_split(q, _integers(2, scalar=True), _integers(*_parts(n, parts))).outputs()
    )
    mixed: list[ov.Output] = []
    for piece in pieces:
        scores = ops.matmul(ops.multiply(piece, _scalar(d**-0.5)), k, False, True)
        mixed.append(ops.matmul(ops.softmax(scores, -1), v, False, False).output(0))
    whole = mixed[0] if parts == 1 else ops.concat(mixed, 2).output(0)
    return _reshaped(ops.transpose(whole, _integers(0, 2, 1, 3)).output(0), b, n, h * d)


def _parts(n: int, parts: int) -> list[int]:
    size = -(-n // parts)
    return [min(size, n - start) for start in range(0, n, size)]


def _heads(x: ov.Output, heads: int) -> ov.Output:
    b, n, c = x.shape
    return ops.transpose(_reshaped(x, b, n, heads, c // heads), _integers(0, 2, 1, 3)).output(0)


def _tokens(x: ov.Output) -> ov.Output:
    """(b c h w) -> (b h*w c)."""
    b, c, height, width = x.shape
    return _reshaped(ops.transpose(x, _integers(0, 2, 3, 1)).output(0), b, height * width, c)


def _picture(tokens: ov.Output, like: ov.Output) -> ov.Output:
    """(b h*w c) -> (b c h w), with the height and width of another."""
    b, _, c = tokens.shape
    _, _, height, width = like.shape
    return ops.transpose(_reshaped(tokens, b, height, width, c), _integers(0, 3, 1, 2)).output(0)


def _sum(x: ov.Output, y: ov.Output) -> ov.Output:
    return ops.add(x, y).output(0)


def _repeated(x: ov.Output, rows: int) -> ov.Output:
    """One row as many times as there are rows wanted."""
    return x if x.shape[0] == rows else ops.concat([x] * rows, 0).output(0)


def _enlarged(x: ov.Output, height: int, width: int) -> ov.Output:
    """To the nearest pixel, as torch picks it."""
    return ops.interpolate(
        x,
        _integers(height, width),
        "nearest",
        "sizes",
        axes=_integers(2, 3),
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    ).output(0)


def _conv(layer: nn.Module, x: ov.Output) -> ov.Output:
    _known(layer, Conv2d)
    assert isinstance(layer, Conv2d) and isinstance(layer.padding, tuple)
    assert layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    weight, bias, padding = _constant(layer.weight), layer.bias, list(layer.padding)
    y = ops.convolution(x, weight, list(layer.stride), padding, padding, [1, 1]).output(0)
    return y if bias is None else _sum(y, _constant(bias, 1, -1, 1, 1))


def halves(layer: nn.Module) -> tuple[slice, slice]:
    """The rows of each half of what a linear layer gives."""
    assert isinstance(layer, nn.Linear)
    middle = layer.out_features // 2
    return slice(middle), slice(middle, None)


def _linear(layer: nn.Module, x: ov.Output, rows: slice = ALL) -> ov.Output:
    """What those rows of the layer's weight give."""
    _known(layer, Linear)
    assert isinstance(layer, Linear)
    y = ops.matmul(x, _constant(layer.weight[rows]), False, True).output(0)
    if layer.bias is None:  # pyright: ignore[reportUnnecessaryComparison]
        return y
    return _sum(y, _constant(layer.bias[rows], 1, 1, -1))


def _group_norm(layer: nn.GroupNorm, x: ov.Output) -> ov.Output:
    _known(layer, nn.GroupNorm)
    return ops.group_normalization(
        x, _constant(layer.weight), _constant(layer.bias), layer.num_groups, layer.eps
    ).output(0)


def _layer_norm(layer: nn.LayerNorm, x: ov.Output) -> ov.Output:
    _known(layer, nn.LayerNorm)
    y = ops.mvn(x, _integers(-1), True, layer.eps, "inside_sqrt")
    return _sum(ops.multiply(y, _constant(layer.weight, 1, 1, -1)).output(0), _constant(layer.bias, 1, 1, -1))


def _known(layer: nn.Module, kind: type[nn.Module]) -> None:
    """What has been put in a layer's place computes something else, which must not be left out in silence."""
    if type(layer) is not kind:
        raise RequestError(
            "backend", "openvino", f"networks of plain layers; here {type(layer).__name__} stands for {kind.__name__}"
        )


def _constant(weight: Tensor, *shape: int) -> ov.Output:
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


def _parameter(shape: Shape) -> op.Parameter:
    return ops.parameter(list(shape), np.float32)


def _scalar(value: float) -> ov.Output:
    return ops.constant(np.float32(value)).output(0)


def _integers(*values: int, scalar: bool = False) -> ov.Output:
    return ops.constant(np.array(values[0] if scalar else values, np.int64)).output(0)


def _reshaped(x: ov.Output, *shape: int) -> ov.Output:
    return ops.reshape(x, _integers(*shape), False).output(0)
