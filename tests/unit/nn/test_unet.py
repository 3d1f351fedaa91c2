"""The UNet: what is hoisted out of its steps changes nothing, and what two prompts share is computed once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from calotype.nn.image_adapter import Places
from calotype.nn.unet import CrossAttention, ResidualBlock, SelfAttention, UNet, UNetConfig

TINY = UNetConfig(
    channels_in=4,
    channels_out=4,
    widths=(32, 64, 64),
    blocks=2,
    depths=(1, 2, 0),
    middle_depth=1,
    heads=(4, 4, 4),
    text_width=24,
    text_width_in=None,
    vector_width=None,
    size_width=8,
    convolved=True,
)
TOLD = replace(TINY, depths=(0, 1, 2), vector_width=40, text_width_in=12)


def random_net(config: UNetConfig) -> UNet:
    torch.manual_seed(0)
    net = UNet(config)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(gain + 0.1 * torch.randn(parameter.shape))
    return net.eval().requires_grad_(False)


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def width_in(config: UNetConfig) -> int:
    return config.text_width_in or config.text_width


def vector(config: UNetConfig, rows: int) -> Tensor | None:
    return None if config.vector_width is None else drawn(rows, config.vector_width, seed=5)


@pytest.mark.parametrize("config", [TINY, TOLD], ids=["sd1", "sdxl"])
def test_levels_prepared_together_are_those_prepared_alone(config: UNetConfig) -> None:
    net, x, text = random_net(config), drawn(1, 4, 10, 6), drawn(1, 7, width_in(config), seed=2)
    times = torch.tensor([981.0, 500.5, 1.0])
    together = net.prepare([text], vector(config, 1), times)
    for number, time in enumerate(times):
        alone = net.prepare([text], vector(config, 1), time[None])
        torch.testing.assert_close(net(x, *together.at(number)), net(x, *alone.at(0)))
    assert not torch.allclose(net(x, *together.at(0)), net(x, *together.at(2)))


@pytest.mark.parametrize("config", [TINY, TOLD], ids=["sd1", "sdxl"])
@pytest.mark.parametrize("lengths", [(7, 7), (7, 14)], ids=["same-length", "another-length"])
def test_one_row_meets_two_prompts(config: UNetConfig, lengths: tuple[int, int]) -> None:
    """Both sides of guidance in one pass are the two passes."""
    net, x, time = random_net(config), drawn(1, 4, 8, 8), torch.tensor([301.0])
    texts = [drawn(1, n, width_in(config), seed=n + k) for k, n in enumerate(lengths)]
    vectors = vector(config, 2)
    grouped = [torch.cat(texts)] if lengths[0] == lengths[1] else texts
    both = net(x, *net.prepare(grouped, vectors, time).at(0))
    assert len(both) == 2
    for k, text in enumerate(texts):
        own = None if vectors is None else vectors[k : k + 1]
        torch.testing.assert_close(both[k : k + 1], net(x, *net.prepare([text], own, time).at(0)))


@pytest.mark.parametrize("lengths", [(7, 7), (7, 14)], ids=["same-length", "another-length"])
def test_pictures_are_read_beside_text(lengths: tuple[int, int]) -> None:
    """By both sides of guidance in one pass as in two; one whose values are zero counts for nothing."""
    net, x, time = random_net(TINY), drawn(1, 4, 8, 8), torch.tensor([301.0])
    texts = [drawn(1, n, 24, seed=n + k) for k, n in enumerate(lengths)]
    blocks = [block for block in net.modules() if isinstance(block, CrossAttention)]
    shapes = [(2, block.heads, 3, block.q.in_features // block.heads) for block in blocks]
    read = [((drawn(*shape, seed=k), drawn(*shape, seed=k + 50)),) for k, shape in enumerate(shapes)]
    grouped = [torch.cat(texts)] if lengths[0] == lengths[1] else texts
    both = net(x, *net.prepare(grouped, None, time).at(0), pictures=read)
    for row, text in enumerate(texts):
        own = [((k[row : row + 1], v[row : row + 1]),) for ((k, v),) in read]
        prepared = net.prepare([text], None, time).at(0)
        alone = net(x, *prepared, pictures=own)
        torch.testing.assert_close(both[row : row + 1], alone)
        assert not torch.allclose(alone, net(x, *prepared), atol=1e-3)
        nothing = [((k, torch.zeros_like(v)),) for ((k, v),) in own]
        assert torch.equal(net(x, *prepared, pictures=nothing), net(x, *prepared))


@pytest.mark.parametrize("config", [TINY, TOLD], ids=["sd1", "sdxl"])
def test_places_are_those_of_the_cross_attentions(config: UNetConfig) -> None:
    places, net = Places.of(config), random_net(config)
    found = [(block.q.in_features, block.heads) for block in net.modules() if isinstance(block, CrossAttention)]
    pairs = zip(places.widths, places.heads, strict=True)
    ordered = places.in_forward_order(tuple((torch.tensor(width), torch.tensor(heads)) for width, heads in pairs))
    assert [(int(width), int(heads)) for width, heads in ordered] == found
    assert places.down == sum(isinstance(block, CrossAttention) for block in net.down.modules())


def rows_seen(net: UNet, x: Tensor, text: Tensor, vectors: Tensor | None) -> dict[str, int]:
    """How many rows entered each module of a pass with two prompts."""
    seen: dict[str, int] = {}

    def hook(name: str) -> object:
        def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            seen[name] = len(given[0])

        return note

    for name, module in net.named_modules():
        if isinstance(module, (ResidualBlock, SelfAttention, CrossAttention)) or name in ("conv_in", "conv_out"):
            module.register_forward_pre_hook(hook(name))
    net(x, *net.prepare([text], vectors, torch.tensor([301.0])).at(0))
    return seen


def test_sd1_computes_all_before_the_first_cross_attention_once() -> None:
    net = random_net(TINY)
    seen = rows_seen(net, drawn(1, 4, 8, 8), drawn(2, 7, 24), None)
    first = "down.0.transformers.0.blocks.0"
    once = {"conv_in", "down.0.blocks.0", f"{first}.self_attention", f"{first}.cross_attention"}
    assert {name for name, rows in seen.items() if rows == 1} == once


def test_sdxl_computes_the_first_convolution_once() -> None:
    net = random_net(TOLD)
    seen = rows_seen(net, drawn(1, 4, 8, 8), drawn(2, 7, 12), vector(TOLD, 2))
    assert {name for name, rows in seen.items() if rows == 1} == {"conv_in", "down.0.blocks.0"}


def test_steps_need_neither_text_nor_time_weights() -> None:
    """What `prepare` has used could leave memory: a step does not touch it."""
    net, x = random_net(TOLD), drawn(1, 4, 8, 8)
    prepared = net.prepare([drawn(1, 7, 12)], vector(TOLD, 1), torch.tensor([301.0]))
    before = net(x, *prepared.at(0))
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, CrossAttention):
                module.k.weight.fill_(torch.nan)
                module.v.weight.fill_(torch.nan)
            if isinstance(module, ResidualBlock):
                module.time.weight.fill_(torch.nan)
        assert net.text_in is not None
        net.text_in.weight.fill_(torch.nan)
    assert torch.equal(net(x, *prepared.at(0)), before)


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (5, 12)])
def test_any_size(size: tuple[int, int]) -> None:
    net = random_net(TINY)
    prepared = net.prepare([drawn(1, 7, 24)], None, torch.tensor([10.0]))
    assert net(drawn(1, 4, *size), *prepared.at(0)).shape == (1, 4, *size)
