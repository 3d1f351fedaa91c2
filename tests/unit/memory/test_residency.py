"""Modules are on the computing device inside the block, and back home after it, however it ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from calotype.memory.residency import resident

META = torch.device("meta")
CPU = torch.device("cpu")


def test_a_module_that_is_there_is_not_touched() -> None:
    module = nn.Linear(2, 2)
    before = module.weight
    with resident(module, device=CPU):
        assert module.weight is before
    assert module.weight is before


@pytest.mark.parametrize("fails", [False, True])
def test_moved_modules_go_home_on_every_way_out(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[torch.device] = []
    module = nn.Linear(2, 2, device=META)

    def move(device: torch.device) -> nn.Module:
        moves.append(device)
        return module

    monkeypatch.setattr(module, "to", move)
    try:
        with resident(module, device=CPU):
            assert moves == [CPU]
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert moves == [CPU, META]
