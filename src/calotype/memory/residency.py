"""Residency: a `with` block says which modules are on the computing device, and undoes it on every way out."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def resident(*modules: nn.Module, device: torch.device) -> Generator[None, None, None]:
    """Hold `modules` on `device` inside the block, and put back where they were those that had to be moved.

    A module that is there already costs nothing, so a model that fits stays resident from one job to the next.
    """
    moved: list[tuple[nn.Module, torch.device]] = []
    try:
        for module in modules:
            home = next(module.parameters()).device
            if home != device:
                moved.append((module, home))
                module.to(device)
        yield
    finally:
        for module, home in moved:
            module.to(home)
