"""Large pictures go through the autoencoders strip by strip, and come out as in one piece."""

from __future__ import annotations

import subprocess
import sys

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as some
from tiny import scattered
from torch import Tensor, nn

from calotype.memory import ladder
from calotype.memory.ladder import Memory
from calotype.nn import linear, strips
from calotype.nn.autoencoder import Autoencoder, AutoencoderConfig
from calotype.nn.strips import Kept, Moments, Upsampled, convolved, halved, lent, strips_of
from calotype.nn.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig

CONFIG = AutoencoderConfig(latent_channels=4, widths=(32, 64, 64), blocks=2, quant_convs=True, scale=0.18, shift=0.1)
TINY = TinyAutoencoderConfig(
    latent_channels=4, width=8, encoder_blocks=(1, 1, 2), decoder_blocks=(2, 1, 1), scale=0.9, shift=0.1
)
SIZES = ((16, 16), (10, 14), (7, 5), (1, 3))  # of latents
HEIGHTS = (2, 6, 1000)  # rows of a strip of the widest tensor


def network(config: AutoencoderConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Autoencoder:
    net = scattered(Autoencoder(config), 1).to(dtype)
    assert isinstance(net, Autoencoder)
    return net


def both(net: Autoencoder, way: str, x: Tensor, height: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """In one piece, and in strips of so many rows."""
    side = x.shape[-1] * (net.config.factor if way == "decode" else 1)
    function = net.decode if way == "decode" else net.encode
    monkeypatch.setattr(strips, "WHOLE", 2**40)
    whole = function(x)
    monkeypatch.setattr(strips, "WHOLE", 0)
    monkeypatch.setattr(strips, "STRIP", height * side * x.shape[0] * max(net.config.widths))
    return whole, function(x)


def given(way: str, size: tuple[int, int], config: AutoencoderConfig = CONFIG, batch: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    height, width = size
    if way == "decode":
        return torch.randn(batch, config.latent_channels, height, width, generator=rng)
    return torch.rand(batch, 3, height * config.factor, width * config.factor, generator=rng)


@pytest.mark.parametrize("way", ["decode", "encode"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("height", HEIGHTS)
def test_strips_are_equal_to_one_piece(
    way: str, size: tuple[int, int], height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, made = both(network(), way, given(way, size, batch=2), height, monkeypatch)
    assert made.dtype == whole.dtype and made.shape == whole.shape
    assert not torch.equal(made, whole)  # else nothing was taken in strips
    assert (made - whole).abs().max() <= 1e-5 * whole.abs().max()


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@hypothesis.given(
    way=some.sampled_from(["decode", "encode"]),
    size=some.tuples(some.integers(1, 6), some.integers(2, 6)),  # one latent alone has two values a norm: 2e-5
    rows=some.integers(1, 16),
)
def test_any_size_in_strips_of_any_height_is_one_piece(
    way: str, size: tuple[int, int], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AutoencoderConfig(latent_channels=4, widths=(64, 64), blocks=1, quant_convs=False, scale=1, shift=0)
    whole, made = both(network(config), way, given(way, size, config), rows, monkeypatch)
    assert made.shape == whole.shape
    assert (made - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("widths", [(32,), (32, 32), (64, 32, 32), (32, 64, 64, 64)])
@pytest.mark.parametrize("way", ["decode", "encode"])
def test_any_widths(way: str, widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoencoderConfig(latent_channels=4, widths=widths, blocks=1, quant_convs=False, scale=1, shift=0)
    whole, made = both(network(config), way, given(way, (5, 6), config), 2, monkeypatch)
    assert (made - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("way", ["decode", "encode"])
def test_odd_sizes_of_a_level(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that are no multiple of the factor are encoded as in one piece too."""
    x = given("encode", (9, 7))[:, :, :-3, :-1] if way == "encode" else given("decode", (3, 1))
    whole, made = both(network(), way, x, 2, monkeypatch)
    assert (made - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("way", ["decode", "encode"])
@pytest.mark.parametrize("size", [*SIZES, (9, 4)])
@pytest.mark.parametrize("height", [1, 5, 24, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tiny_autoencoder_in_strips(
    way: str, size: tuple[int, int], height: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = scattered(TinyAutoencoder(TINY), 2).to(dtype)
    assert isinstance(net, TinyAutoencoder)
    x = given(way, size, batch=2)
    if way == "encode":
        x = x[:, :, : -3 if size[0] > 1 else None]  # no multiple of the factor
    function = net.decode if way == "decode" else net.encode
    whole = function(x)
    monkeypatch.setattr(strips, "WHOLE", 0)
    monkeypatch.setattr(strips, "STRIP", height * 2 * TINY.width * 4 * size[1])
    made = function(x)
    assert made.dtype == whole.dtype and made.shape == whole.shape
    assert (made - whole).abs().max() <= (1e-5 if dtype == torch.float32 else 0.05) * whole.abs().max()


def test_strips_are_kept_until_taken() -> None:
    x = torch.randn(1, 1, 9, 2)
    kept = Kept(iter(x.split(4, dim=2)))
    passed = kept.passing()
    next(passed)
    assert torch.equal(kept.take(0, 3), x[:, :, :3])
    assert len([*passed]) == 2
    assert torch.equal(kept.take(3, 9), x[:, :, 3:])


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("way", ["decode", "encode"])
def test_strips_in_bfloat16_are_as_near_to_float32_as_one_piece_is(
    way: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "native", lambda dtype: native)
    x = given(way, (10, 14))
    exact, _ = both(network(), way, x, 2, monkeypatch)
    whole, made = both(network(dtype=torch.bfloat16), way, x, 2, monkeypatch)
    assert made.dtype == torch.float32
    assert (made - exact).abs().mean() <= 1.5 * (whole - exact).abs().mean()
    assert (made - exact).abs().max() <= 2 * (whole - exact).abs().max()


def test_large_means_do_not_spoil_the_moments() -> None:
    x = torch.randn(2, 64, 9, 13) + 100 * torch.randn(1, 64, 1, 1)
    known = Moments(32)
    for strip in x.split(4, dim=2):
        known.add(strip)
    norm = scattered(nn.GroupNorm(32, 64, eps=1e-6), 0)
    assert isinstance(norm, nn.GroupNorm)
    affine = known.affine(norm)
    exact = norm.double()(x.double())
    assert (x.double() * affine.scale + affine.shift - exact).abs().max() < 1e-4


def test_a_convolution_may_write_over_what_it_reads() -> None:
    layer = scattered(nn.Conv2d(8, 8, 3, padding=1), 0)
    assert isinstance(layer, nn.Conv2d)
    x = torch.randn(1, 8, 13, 6)
    wanted = layer(layer(x))
    start = 0
    for strip in convolved(convolved(strips_of(x, 2), lent(layer), 13), lent(layer), 13):
        x[:, :, start : start + strip.shape[2]] = strip
        start += strip.shape[2]
    assert torch.allclose(x, wanted, atol=1e-5)


def test_upsampling_needs_fewer_products_for_the_same_numbers() -> None:
    up, after = (scattered(layer, 0) for layer in (nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 4, 1)))
    assert isinstance(up, nn.Conv2d) and isinstance(after, nn.Conv2d)
    small = torch.randn(2, 8, 5, 7)
    wanted = up(nn.functional.interpolate(small, scale_factor=2.0))
    made = torch.cat([*Upsampled(small, lent(up)).strips(4)], dim=2)
    assert torch.allclose(made, wanted, atol=1e-5)
    both = Upsampled(small, lent(up)).then(lent(after))
    assert torch.allclose(both.rows(2, 8), after(wanted)[:, :, 2:8], atol=1e-5)


def test_halving_pads_on_the_right_and_below() -> None:
    layer = scattered(nn.Conv2d(4, 4, 3, stride=2), 0)
    assert isinstance(layer, nn.Conv2d)
    for height, width in ((8, 6), (9, 7), (2, 2)):
        x = torch.randn(1, 4, height, width)
        wanted = layer(nn.functional.pad(x, (0, 1, 0, 1)))
        assert torch.allclose(torch.cat([*halved(x, lent(layer), 2)], dim=2), wanted, atol=1e-5)


def test_gradients_are_taken_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network().requires_grad_(True)
    monkeypatch.setattr(strips, "WHOLE", 0)
    net.decode(given("decode", (2, 2))).sum().backward()
    assert net.decoder.conv_in.weight.grad is not None


@pytest.mark.parametrize("way", ["decode", "encode"])
def test_layers_that_come_and_go_are_read_while_they_are_called(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each once: a layer that is called again is read from its file again."""
    monkeypatch.setattr(ladder, "SMALL", 0)
    monkeypatch.setattr(strips, "WHOLE", 0)
    monkeypatch.setattr(strips, "STRIP", 2**12)
    x = given(way, (6, 5))
    with torch.inference_mode():
        wanted = network().decode(x) if way == "decode" else network().encode(x)
        net = network()
        state = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
        net.to("meta")
        read: list[str] = []

        def maker(name: str) -> object:
            def make() -> Tensor:
                read.append(name)
                return state[name].clone()

            return make

        memory = Memory(torch.device("cpu"), "stream", makers={net: {name: maker(name) for name in state}})
        with memory.holding(net):
            made = net.decode(x) if way == "decode" else net.encode(x)
    assert torch.equal(made, wanted)
    assert len(read) == len(set(read))
    side = ("decoder.", "post_quant.") if way == "decode" else ("encoder.", "quant.")
    assert set(read) == {name for name in state if name.startswith(side)}


MEASURE = """
import re, sys
from pathlib import Path
import torch
from calotype.nn import autoencoder, strips

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) / 2**10

torch.set_num_threads(1)
strips.STRIP = 2**17
config = autoencoder.AutoencoderConfig(
    latent_channels=4, widths=(32, 64, 128, 128), blocks=1, quant_convs=False, scale=1, shift=0
)
net = autoencoder.Autoencoder(config).requires_grad_(False)
run = {"decode": net.decode, "encode": net.encode}[sys.argv[1]]
x = torch.rand(1, *((4, 64, 64) if sys.argv[1] == "decode" else (3, 768, 768)))
before = 0
for pixels, piece in ((0, x[:, :, :8, :8]), (0, x), (2**40, x)):
    strips.WHOLE = pixels
    run(piece)
    print(peak() - before)
    before = before or peak()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("way", "share"), [("decode", 1 / 4), ("encode", 1 / 3)])
def test_strips_take_a_part_of_the_memory(way: str, share: float) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE, way], capture_output=True, text=True, check=True)
    _, made, whole = map(float, done.stdout.split())
    assert made <= whole * share, (made, whole)
