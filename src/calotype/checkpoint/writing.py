"""Writing safetensors: the header first, then one tensor at a time, never a half-written file in place."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from calotype.checkpoint.files import NAMES, Shape
from calotype.errors import OutputError


class Planned(NamedTuple):
    """A tensor that a file will hold."""

    key: str
    dtype: torch.dtype
    shape: Shape


def write(
    path: Path,
    plan: Iterable[Planned],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file of the planned tensors, asking for each when its turn comes.

    The file appears under its name when complete. Raises OutputError where it cannot be written.
    """
    # Wide types first, so that every tensor lies at a multiple of its type's size.
    order = sorted(plan, key=lambda item: -item.dtype.itemsize)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(header(order, metadata or {}))
            for item in order:
                value = tensor(item.key).detach().cpu().contiguous()
                assert value.dtype == item.dtype
                assert tuple(value.shape) == item.shape, (item, value.shape)
                if value.numel():
                    file.write(value.reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def header(order: Iterable[Planned], metadata: Mapping[str, str]) -> bytes:
    """A safetensors header for tensors in this order, its length in front, padded to eight bytes."""
    content: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for item in order:
        stop = place + math.prod(item.shape) * item.dtype.itemsize
        content[item.key] = {
            "dtype": NAMES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [place, stop],
        }
        place = stop
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_random(
    path: Path, manifest: Iterable[tuple[str, Shape]], dtype: torch.dtype, seed: int = 0, spread: float = 0.02
) -> None:
    """A file of random weights for a manifest: for measuring at full size what only shapes and types matter to.

    Normal with this spread, one-dimensional gains (".scale", "norm...weight") near 1. A large tensor repeats the same
    four million values: drawing twelve billion would take longer than what is measured.
    """
    rng = torch.Generator().manual_seed(seed)
    plan = [Planned(key, dtype, shape) for key, shape in manifest]
    shapes = {item.key: item.shape for item in plan}

    def tensor(key: str) -> Tensor:
        shape = shapes[key]
        count = math.prod(shape)
        drawn = (torch.randn(min(count, 2**22), generator=rng) * spread).to(dtype)
        gain = len(shape) == 1 and (key.endswith(".scale") or ("norm" in key and key.endswith("weight")))
        if gain:
            drawn += 1
        return drawn.repeat(-(-count // max(len(drawn), 1)))[:count].view(shape)

    write(path, plan, tensor)
