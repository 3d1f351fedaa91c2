"""What blocks mean, bit for bit as the gguf library has it; float8 as torch has it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import tiny_gguf
import torch

from calotype.nn.formats import FORMATS

GGML = [name for name in FORMATS if not name.startswith("F8")]
BLOCKS = list(tiny_gguf.HALVES)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_blocks_mean_what_the_library_says(name: str, seed: int) -> None:
    made = tiny_gguf.blocks(name, 500, seed, spread=[0.02, 3.0][seed])
    got = FORMATS[name].widen(torch.from_numpy(made))
    wanted = tiny_gguf.widened(name, made)
    assert got.dtype == torch.float32
    assert torch.equal(got.view(torch.int32), wanted.view(torch.int32))


@pytest.mark.parametrize("name", BLOCKS)
def test_any_bytes_are_read_alike(name: str) -> None:
    """Scales that are tiny, huge, negative or no numbers too."""
    made = np.random.default_rng(3).integers(0, 256, (3000, FORMATS[name].bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        wanted = tiny_gguf.widened(name, made)
    got = FORMATS[name].widen(torch.from_numpy(made))
    assert torch.equal(got.isnan(), wanted.isnan())
    finite = ~wanted.isnan()
    assert finite.float().mean() > 0.5
    assert torch.equal(got[finite], wanted[finite])


@pytest.mark.parametrize("name", GGML)
def test_blocks_are_as_large_as_the_library_says(name: str) -> None:
    form = FORMATS[name]
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (form.weights, form.bytes)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_may_be_a_view_at_any_place(name: str) -> None:
    """As they are in a mapped file."""
    form = FORMATS[name]
    bytes_ = torch.from_numpy(tiny_gguf.blocks(name, 9))
    wanted = form.widen(bytes_)
    for skip in (1, 2, 3):
        place = torch.zeros(9 * form.bytes + skip, dtype=torch.uint8)
        place[skip:] = bytes_.flatten()
        assert torch.equal(form.widen(place[skip:].view(9, form.bytes)), wanted)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_float8_code(dtype: torch.dtype) -> None:
    codes = torch.arange(256).to(torch.uint8)[:, None]
    got = FORMATS["F8_E4M3" if dtype == torch.float8_e4m3fn else "F8_E5M2"].widen(codes)
    wanted = codes.view(dtype).float()
    assert torch.equal(got.isnan(), wanted.isnan())
    sound = ~wanted.isnan()
    assert torch.equal(got[sound].view(torch.int32), wanted[sound].view(torch.int32))  # zero has its sign


def test_float8_does_not_depend_on_subnormal_numbers_being_kept() -> None:
    codes = torch.arange(256).to(torch.uint8)[:, None]
    wanted = FORMATS["F8_E4M3"].widen(codes).nan_to_num(7)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush them")
    try:
        assert torch.equal(FORMATS["F8_E4M3"].widen(codes).nan_to_num(7), wanted)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize(("name", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_plain_types(name: str, dtype: torch.dtype) -> None:
    values = torch.randn(50, 1).to(dtype)
    assert torch.equal(FORMATS[name].widen(values.view(torch.uint8)), values.float())
