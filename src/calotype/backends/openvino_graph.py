"""OpenVINO graphs of our UNet and of the autoencoder's decoder, built op by op from the networks' own weights.

Nothing is traced or run for it. All shapes are static.
"""

# b batch · n tokens · c channels · h heads (in attention), height · w width · d width of a head

from __future__ import annotations

from collections.abc import Iterator, Sequence

import openvino as ov
from openvino import op
from openvino import opset13 as ops
from torch import nn

from calotype.backends.openvino_layers import (
    EightBits,
    Products,
    activated,
    group_norm,
    integers,
    layer_norm,
    parameter,
    plus,
    reshaped,
    scalar,
)
from calotype.nn import autoencoder as vae
from calotype.nn import unet

Shape = Sequence[int]
KeysAndValues = Sequence[tuple[ov.Output, ov.Output]]
SCORES = 2**26  # attention scores (256 MB) beyond which a wide head's queries are taken in parts


def unet_graph(
    net: unet.UNet,
    x: Shape,
    shifts: Sequence[Shape],
    text: Sequence[Sequence[tuple[Shape, Shape]]],
    *,
    eight_bits: bool = False,
) -> ov.Model:
    """`UNet.forward` for inputs of these shapes. Parameters in order: x, every shift, every key and value.

    With `eight_bits` the products are taken in int8, as `EightBits` says.
    """
    make = EightBits() if eight_bits else Products()
    picture, given = parameter(x), [parameter(shape) for shape in shifts]
    kv = [[(parameter(k), parameter(v)) for k, v in groups] for groups in text]
    shift = iter(node.output(0) for node in given)
    keys = iter([[(k.output(0), v.output(0)) for k, v in groups] for groups in kv])
    answer = _unet(make, net, picture.output(0), shift, keys)
    assert next(shift, None) is None and next(keys, None) is None
    return _model(answer, [picture, *given, *(node for groups in kv for pair in groups for node in pair)])


def decoder_graph(net: vae.Autoencoder, latent: Shape) -> ov.Model:
    """`Autoencoder.decode` for latents of this shape."""
    make = Products()
    given = parameter(latent)
    z = ops.add(ops.multiply(given, scalar(1 / net.config.scale)), scalar(net.config.shift)).output(0)
    if net.post_quant is not None:
        z = make.conv(net.post_quant, z)
    picture = _decoder(make, net.decoder, z)
    return _model(plus(ops.multiply(picture, scalar(0.5)).output(0), scalar(0.5)), [given])


def _model(answer: ov.Output, parameters: list[op.Parameter]) -> ov.Model:
    return ov.Model([ops.result(answer)], parameters)  # pyright: ignore[reportGeneralTypeIssues]  its stubs disagree


def _unet(
    make: Products, net: unet.UNet, x: ov.Output, shift: Iterator[ov.Output], keys: Iterator[KeysAndValues]
) -> ov.Output:
    x = make.conv(net.conv_in, x)
    skipped = [x]
    for level in net.down:
        assert isinstance(level, unet.DownLevel)
        for block, transformer in level.steps():
            x = _residual(make, block, x, next(shift))
            if transformer is not None:
                x = _transformer(make, transformer, x, keys)
            skipped.append(x)
        if level.sample is not None:
            x = make.conv(level.sample, x)
            skipped.append(x)
    x = _residual(make, net.middle.first, x, next(shift))
    if net.middle.transformer is not None and net.middle.second is not None:
        x = _residual(make, net.middle.second, _transformer(make, net.middle.transformer, x, keys), next(shift))
    for level in net.up:
        assert isinstance(level, unet.UpLevel)
        for block, transformer in level.steps():
            both = ops.concat([x, _repeated(skipped.pop(), x.shape[0])], 1).output(0)
            x = _residual(make, block, both, next(shift))
            if transformer is not None:
                x = _transformer(make, transformer, x, keys)
        if level.sample is not None:
            x = make.conv(level.sample, _enlarged(x, skipped[-1].shape[2], skipped[-1].shape[3]))
    return make.conv(net.conv_out, activated(net.norm_out, x))


def _decoder(make: Products, net: vae.Decoder, z: ov.Output) -> ov.Output:
    x = _residual(make, net.middle.first, make.conv(net.conv_in, z))
    x = _residual(make, net.middle.second, _spatial_attention(make, net.middle.attention, x))
    for level in net.levels:
        assert isinstance(level, vae.DecoderLevel)
        for block in level.blocks:
            x = _residual(make, block, x)
        if level.up is not None:
            x = make.conv(level.up, _enlarged(x, 2 * x.shape[2], 2 * x.shape[3]))
    return make.conv(net.conv_out, activated(net.norm_out, x))


def _residual(make: Products, block: nn.Module, x: ov.Output, shift: ov.Output | None = None) -> ov.Output:
    assert isinstance(block, unet.ResidualBlock | vae.ResidualBlock)
    y = make.activated_conv(block.norm1, block.conv1, x)
    if shift is not None:
        y = ops.add(y, shift).output(0)
    y = make.activated_conv(block.norm2, block.conv2, y)
    return plus(y, x if block.shortcut is None else make.conv(block.shortcut, x))


def _transformer(make: Products, block: nn.Module, x: ov.Output, keys: Iterator[KeysAndValues]) -> ov.Output:
    assert isinstance(block, unet.Transformer)
    tokens = make.linear(block.inward, _tokens(group_norm(block.norm, x)))
    for inner in block.blocks:
        tokens = _transformer_block(make, inner, tokens, next(keys))
    return plus(x, _picture(make.linear(block.outward, tokens), x))


def _transformer_block(make: Products, block: nn.Module, x: ov.Output, text: KeysAndValues) -> ov.Output:
    assert isinstance(block, unet.TransformerBlock)
    y = layer_norm(block.self_norm, x)
    own = block.self_attention
    q, k, v = (_heads(make.linear(project, y), own.heads) for project in (own.q, own.k, own.v))
    x = plus(x, make.linear(own.out, _attention(q, k, v)))
    x = plus(x, _cross_attention(make, block.cross_attention, layer_norm(block.cross_norm, x), text))
    y = layer_norm(block.mlp_norm, x)
    value, gate = (
        make.linear(block.mlp_in, y, rows) for rows in _halves(block.mlp_in)
    )  # splitting a product is a copy
    return plus(x, make.linear(block.mlp_out, ops.multiply(value, ops.gelu(gate, "erf")).output(0)))


def _cross_attention(make: Products, block: unet.CrossAttention, x: ov.Output, text: KeysAndValues) -> ov.Output:
    """Each group of rows with its own text; one row of x meets them all."""
    rows = [k.shape[0] for k, _ in text]
    q = _repeated(_heads(make.linear(block.q, x), block.heads), sum(rows))
    parts = [q] if len(rows) == 1 else ops.variadic_split(q, integers(0, scalar=True), integers(*rows)).outputs()
    mixed = [_attention(part, k, v) for part, (k, v) in zip(parts, text, strict=True)]
    return make.linear(block.out, mixed[0] if len(mixed) == 1 else ops.concat(mixed, 0).output(0))


def _spatial_attention(make: Products, block: vae.SpatialAttention, x: ov.Output) -> ov.Output:
    tokens = _tokens(group_norm(block.norm, x))
    q, k, v = (_heads(make.linear(project, tokens), 1) for project in (block.q, block.k, block.v))
    return plus(x, _picture(make.linear(block.out, _attention(q, k, v)), x))


def _attention(q: ov.Output, k: ov.Output, v: ov.Output) -> ov.Output:
    """(b h n d) -> (b n h*d)."""
    b, h, n, d = q.shape
    # One wide head is not fused: its scores would all be held at once.
    parts = -(-n * k.shape[2] // SCORES) if h == 1 else 1
    pieces = (
        [q] if parts == 1 else ops.variadic_split(q, integers(2, scalar=True), integers(*_parts(n, parts))).outputs()
    )
    mixed: list[ov.Output] = []
    for piece in pieces:
        scores = ops.matmul(ops.multiply(piece, scalar(d**-0.5)), k, False, True)
        mixed.append(ops.matmul(ops.softmax(scores, -1), v, False, False).output(0))
    whole = mixed[0] if parts == 1 else ops.concat(mixed, 2).output(0)
    return reshaped(ops.transpose(whole, integers(0, 2, 1, 3)).output(0), b, n, h * d)


def _parts(n: int, parts: int) -> list[int]:
    size = -(-n // parts)
    return [min(size, n - start) for start in range(0, n, size)]


def _heads(x: ov.Output, heads: int) -> ov.Output:
    b, n, c = x.shape
    return ops.transpose(reshaped(x, b, n, heads, c // heads), integers(0, 2, 1, 3)).output(0)


def _tokens(x: ov.Output) -> ov.Output:
    """(b c h w) -> (b h*w c)."""
    b, c, height, width = x.shape
    return reshaped(ops.transpose(x, integers(0, 2, 3, 1)).output(0), b, height * width, c)


def _picture(tokens: ov.Output, like: ov.Output) -> ov.Output:
    """(b h*w c) -> (b c h w), with the height and width of another."""
    b, _, c = tokens.shape
    _, _, height, width = like.shape
    return ops.transpose(reshaped(tokens, b, height, width, c), integers(0, 3, 1, 2)).output(0)


def _repeated(x: ov.Output, rows: int) -> ov.Output:
    """One row as many times as there are rows wanted."""
    return x if x.shape[0] == rows else ops.concat([x] * rows, 0).output(0)


def _enlarged(x: ov.Output, height: int, width: int) -> ov.Output:
    """To the nearest pixel, as torch picks it."""
    return ops.interpolate(
        x,
        integers(height, width),
        "nearest",
        "sizes",
        axes=integers(2, 3),
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    ).output(0)


def _halves(layer: nn.Module) -> tuple[slice, slice]:
    """The rows of each half of what a linear layer gives."""
    assert isinstance(layer, nn.Linear)
    middle = layer.out_features // 2
    return slice(middle), slice(middle, None)
