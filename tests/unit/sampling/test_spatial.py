"""Denoisers by place: algebra on toy denoisers, and tiles that cover every picture."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from calotype.sampling.levels import FLOW_SCHEDULES, Level
from calotype.sampling.samplers import SAMPLERS
from calotype.sampling.spatial import Tiles, blended, boxes, keeping, starts, tiled

LEVELS = FLOW_SCHEDULES["linear"](8, 1.0, 1.0)
LEVEL = LEVELS.path[0]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def halved(x: Tensor, level: Level) -> Tensor:
    """A denoiser that looks at each place alone."""
    return x / (2 + level.sigma)


@given(length=some.integers(1, 200), size=some.integers(1, 80), share=some.floats(0.05, 1))
@settings(deadline=None)
def test_tiles_cover_every_length_and_never_go_beyond(length: int, size: int, share: float) -> None:
    stride = max(int(size * share), 1)
    begun = starts(length, size, stride)
    covered = {place for start in begun for place in range(start, min(start + size, length))}
    assert covered == set(range(length))
    assert all(start + size <= length for start in begun) or begun == (0,)
    assert list(begun) == sorted(set(begun))


@given(
    height=some.integers(1, 40),
    width=some.integers(1, 40),
    size=some.integers(1, 24),
    share=some.floats(0.1, 1),
)
@settings(deadline=None, max_examples=50)
def test_tiles_of_what_looks_at_each_place_alone_are_the_whole(
    height: int, width: int, size: int, share: float
) -> None:
    places = boxes(height, width, size, max(int(size * share), 1))
    tiles = [Tiles(places[first : first + 3], halved) for first in range(0, len(places), 3)]
    x = drawn(2, 3, height, width)
    torch.testing.assert_close(tiled(tiles, height, width)(x, LEVEL), halved(x, LEVEL), rtol=1e-6, atol=1e-6)


def test_no_border_of_a_tile_shows() -> None:
    """Tiles that say different things: from one to the other in small steps."""
    places = boxes(1, 64, 32, 16)
    tiles = [
        Tiles((box,), lambda x, _, value=number: torch.full_like(x, float(value))) for number, box in enumerate(places)
    ]
    said = tiled(tiles, 1, 64)(torch.zeros(1, 1, 1, 64), LEVEL)[0, 0, 0]
    assert said[0] == 0
    assert said[-1] == len(places) - 1
    assert (said.diff() >= -1e-6).all()
    assert said.diff().max() < 0.15  # a border would be a jump of a third and more


def test_what_is_known_is_reached_exactly_and_taken_back_to_each_level() -> None:
    known, noise = drawn(1, 2, 4, 4), drawn(1, 2, 4, 4, seed=1)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    mask[..., 2:] = 1
    x = LEVEL.alpha * known + LEVEL.sigma * noise
    for name in ("euler", "heun", "dpmpp_2m"):
        seen: list[tuple[Tensor, Level]] = []

        def watched(x: Tensor, level: Level, seen: list[tuple[Tensor, Level]] = seen) -> Tensor:
            seen.append((x, level))
            return halved(x, level)

        *_, last = SAMPLERS[name](keeping(watched, known, mask), x, LEVELS, lambda: noise)
        torch.testing.assert_close(last.x[..., :2], known[..., :2])
        assert not torch.allclose(last.x[..., 2:], known[..., 2:], atol=0.1)
        for met, level in seen:
            wanted = level.alpha * known + level.sigma * noise
            torch.testing.assert_close(met[..., :2], wanted[..., :2])


def test_a_soft_mask_is_between() -> None:
    known, x = drawn(1, 1, 2, 2), drawn(1, 1, 2, 2, seed=1)
    half = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    torch.testing.assert_close(keeping(halved, known, half)(x, LEVEL), (known + halved(x, LEVEL)) / 2)


def test_regions_count_by_mask_and_scale() -> None:
    weight = torch.tensor([[0.0, 1.0, 3.0]])[None, None]
    one, three, five = (torch.full((1, 1, 1, 3), value) for value in (1.0, 3.0, 5.0))
    torch.testing.assert_close(blended(one, [five], [weight]), torch.tensor([1.0, 3.0, 4.0])[None, None, None])
    both = blended(one, [five, three], [weight, weight])
    torch.testing.assert_close(both, torch.tensor([1.0, 3.0, 25 / 7])[None, None, None])
    rows = blended(torch.cat([one, one]), [torch.cat([five, three])], [torch.cat([weight, 0 * weight])])
    torch.testing.assert_close(rows, torch.tensor([[1.0, 3.0, 4.0], [1.0, 1.0, 1.0]])[:, None, None])
