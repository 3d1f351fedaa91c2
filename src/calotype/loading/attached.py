"""Networks that go with a loaded model: in its type, on its device, on its rung of the memory ladder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from calotype.checkpoint.layouts import Found
from calotype.families.model import FamilyModel
from calotype.loading.storage import stored_dtype
from calotype.memory.layers import Maker
from calotype.memory.pages import Mapping as MappedFile


def attached(
    found: Found[Any],
    config: Any,  # noqa: ANN401
    model: FamilyModel[Any],
    dtype: torch.dtype | None,
) -> nn.Module:
    """The network of a part, filled, and in the charge of the model's memory; `dtype` None keeps what is stored."""
    network, binding = found.bind(config)
    dtype = dtype or stored_dtype(found.weights)
    network.to(dtype)
    makers: dict[str, Maker] = {}
    files: tuple[MappedFile, ...] = ()
    resident = model.memory.rung == "resident"
    if resident:
        network.load_state_dict(binding.load(found.weights, dtype, mapped=False), assign=True)
    else:
        views: dict[str, Tensor] = {}
        for name, value in binding.places(found.weights, dtype):
            if isinstance(value, Tensor):
                views[name] = value
            else:
                makers[name] = value
        network.load_state_dict(views, strict=False, assign=True)
        mappings = dict.fromkeys(entry.file for entry in found.weights.values())
        files = tuple(MappedFile.of(file.mapping) for file in mappings)
    network.requires_grad_(False).eval()
    if resident:
        network.to(model.device)
    model.memory.add(network, makers, files)
    return network
