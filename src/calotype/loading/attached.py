"""Networks that go with a loaded model: in its type, on its device, on its rung of the memory ladder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from calotype.checkpoint.files import Weights
from calotype.checkpoint.layouts import Found
from calotype.families.model import FamilyModel
from calotype.loading.storage import stored_dtype
from calotype.memory.layers import Maker
from calotype.memory.pages import Mapping as MappedFile


def files_of(weights: Weights) -> tuple[MappedFile, ...]:
    """The files that weights are views of, as they are mapped."""
    return tuple(MappedFile.of(file.mapping) for file in dict.fromkeys(entry.file for entry in weights.values()))


def attached(
    found: Found[Any],
    config: Any,  # noqa: ANN401
    model: FamilyModel[Any],
    dtype: torch.dtype | None,
) -> nn.Module:
    """The network of a part, filled, and in the charge of the model's memory; `dtype` None keeps what is stored.

    Its weights are views of its file where the model's are.
    """
    network, binding = found.bind(config)
    dtype = dtype or stored_dtype(found.weights)
    network.to(dtype)
    resident = model.memory.rung == "resident"
    makers: dict[str, Maker] = {}
    files: tuple[MappedFile, ...] = ()
    if model.memory.mapped:
        state: dict[str, Tensor] = {}
        for name, value in binding.places(found.weights, dtype):
            if isinstance(value, Tensor):
                state[name] = value
            elif resident:
                state[name] = value()
            else:
                makers[name] = value
        files = files_of(found.weights)
    else:
        state = binding.load(found.weights, dtype, mapped=False)
    network.load_state_dict(state, strict=not makers, assign=True)
    network.requires_grad_(False).eval()
    if resident:
        network.to(model.device)
    model.memory.add(network, makers, files)
    return network
