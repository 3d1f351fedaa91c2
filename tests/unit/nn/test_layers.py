"""Layers that no family owns."""

from __future__ import annotations

import pytest
import torch
from tiny import scattered

from calotype.nn import linear
from calotype.nn.autoencoder import Autoencoder, AutoencoderConfig, ResidualBlock, SpatialAttention, preview_projection
from calotype.nn.embeddings import sinusoid
from calotype.nn.norms import RMSNorm, modulated
from calotype.nn.rope import rope_table, rotate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, linear.ROWS - 1, linear.ROWS, 200])
def test_half_precision_products_are_rounded_once(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the processor has no such arithmetic, the result is the exact one, rounded."""
    monkeypatch.setattr(linear, "native", lambda dtype: False)
    torch.manual_seed(0)
    layer = linear.Linear(96, 40).to(dtype)
    x = torch.randn(rows, 96).to(dtype)
    bias = layer.bias
    exact = x.double() @ layer.weight.double().T + bias.double()
    made = layer(x)
    assert made.dtype == dtype
    error = (made.double() - exact).abs().max()
    assert error <= exact.abs().max() * torch.finfo(dtype).eps * (1 if rows >= linear.ROWS else 8)


def test_float32_and_native_half_precision_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "native", lambda dtype: True)
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = linear.Linear(32, 16).to(dtype), torch.randn(100, 32).to(dtype)
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 1, 48), (3, 48)])
def test_products_do_not_depend_on_where_weights_lie(shape: tuple[int, ...]) -> None:
    """Views of a file lie at any multiple of four; MKL's order of summing follows the address on some CPUs."""
    torch.manual_seed(0)
    x = torch.randn(*shape[:-1], 2 * shape[-1])[..., : shape[-1]]  # a part of something, as inputs often are
    weight, bias = torch.randn(64, 48), torch.randn(64)
    room = torch.empty(weight.numel() + 16)
    made: list[torch.Tensor] = []
    for start in range(16):
        layer = linear.Linear(48, 64)
        place = room[start : start + weight.numel()].view(64, 48).copy_(weight)
        layer.load_state_dict({"weight": place, "bias": bias}, assign=True)
        with torch.inference_mode():
            made.append(layer(x))
    assert made[0].shape == (*shape[:-1], 64)
    torch.testing.assert_close(made[0], x @ weight.T + bias)
    assert all(torch.equal(one, made[0]) for one in made)


def test_rotated_products_depend_on_the_difference_of_positions() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 12, generator=rng).double()
    axes = (4, 4, 4)

    def product(at: tuple[int, int, int], of: tuple[int, int, int]) -> float:
        a, b = (rotate(x, rope_table(torch.tensor([p]), axes, 100.0)) for x, p in ((q, at), (k, of)))
        return float((a * b).sum())

    assert product((0, 3, 7), (0, 1, 2)) == pytest.approx(product((0, 5, 6), (0, 3, 1)), abs=1e-5)
    assert product((0, 3, 7), (0, 1, 2)) != pytest.approx(product((0, 3, 7), (0, 2, 2)), abs=1e-3)
    assert product((0, 0, 0), (0, 0, 0)) == pytest.approx(float((q * k).sum()), abs=1e-5)


def test_half_precision_norm_rounds_before_the_weight() -> None:
    norm = RMSNorm(64)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 64)
    half = RMSNorm(64)
    half.load_state_dict(norm.state_dict())
    half.bfloat16()
    assert torch.allclose(half(x.bfloat16()).float(), norm(x), atol=0.06)


def test_modulated_is_layer_norm_then_scale_and_shift() -> None:
    x, shift, scale = torch.randn(2, 3, 8), torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    plain = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    assert torch.allclose(modulated(x, shift, scale), plain * (1 + scale) + shift, atol=1e-5)


def test_sinusoid_begins_with_cosines() -> None:
    made = sinusoid(torch.tensor([0.0, 1.0]), 6)
    assert made[0].tolist() == [1, 1, 1, 0, 0, 0]
    assert made[1, 0] == pytest.approx(0.5403, abs=1e-4)
    assert made[1, 3] == pytest.approx(0.8415, abs=1e-4)


def test_the_preview_projection_follows_the_decoder() -> None:
    """Of a nearly linear decoder, a linear map explains nearly all, on latents that it was not fitted to."""
    config = AutoencoderConfig(
        latent_channels=4, widths=(32, 32, 32, 32), blocks=1, quant_convs=True, scale=0.5, shift=0.1
    )
    autoencoder = Autoencoder(config)
    scattered(autoencoder, 3, spread=0.2)
    with torch.no_grad():
        for module in autoencoder.modules():
            if isinstance(module, ResidualBlock):
                module.conv2.weight.zero_()
            if isinstance(module, SpatialAttention):
                module.out.weight.zero_()
        autoencoder.decoder.norm_out.bias.fill_(5.0)  # where SiLU is straight
    projection = preview_projection(autoencoder)
    assert projection.shape == (5, 3)
    latent = torch.nn.functional.interpolate(torch.randn(2, 4, 3, 3), size=(8, 8), mode="bilinear")
    with torch.inference_mode():
        wanted = torch.nn.functional.avg_pool2d(autoencoder.decode(latent), 8).permute(0, 2, 3, 1)
    made = latent.permute(0, 2, 3, 1) @ projection[:-1] + projection[-1]
    assert float(((made - wanted) ** 2).mean()) < 0.2 * float(wanted.var())
