"""How the parts of a model are stored: as their files have them, or in fewer bits; and what the latter loses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from calotype.checkpoint.entries import Entry
from calotype.checkpoint.files import Weights
from calotype.checkpoint.keys import Binding, put_together
from calotype.errors import RequestError
from calotype.families.family import Family
from calotype.loading.gather import Chosen
from calotype.nn import quantized
from calotype.nn.conv import Conv2d
from calotype.nn.linear import Linear
from calotype.nn.packed import packed
from calotype.nn.quantized import KINDS, Kind, relative_error, replace
from calotype.nn.stored import Stored

FILE = "file"
"""As the file has it: the blocks of GGUF and float8 stay, and are widened when they are used."""
NONE = "none"
"""In the dtype that it computes in, whatever the file has."""
ALL = "*"
"""The backbone and the largest encoder."""
CHOICES = (*KINDS, NONE)


def asked(storage: Mapping[str, str] | str | None) -> dict[str, str]:
    """The wish for each part by name, or for ALL. Raises RequestError for what is no kind of storage."""
    wishes = {ALL: storage} if isinstance(storage, str) else dict(storage or {})
    for role, kind in wishes.items():
        if kind not in CHOICES:
            raise RequestError("storage", f"{role}={kind}", "a part with one of " + ", ".join(CHOICES))
    return wishes


def kinds(family: Family, chosen: Mapping[str, Chosen], wishes: Mapping[str, str]) -> dict[str, str]:
    """How each part is stored: one of CHOICES, or FILE.

    The backbone and encoders stay as the file has them, what is asked for aside; autoencoders never do. Raises
    RequestError for a wish that is for none of them.
    """
    able = [role.name for role in family.roles if role.name in chosen and (role is family.backbone or role.tokenizer)]
    for role in wishes:
        if role != ALL and role not in able:
            raise RequestError("storage", role, f"one of the parts {', '.join(able)} for this {family.title} model")
    found = {role: FILE if role in able else NONE for role in chosen}
    if ALL in wishes:
        encoders = [role for role in able if role != family.backbone.name]
        largest = max(encoders, key=lambda role: parameters(chosen[role].found.weights), default=None)
        found |= {role: wishes[ALL] for role in (family.backbone.name, largest) if role is not None}
    return found | {role: kind for role, kind in wishes.items() if role != ALL}


def parameters(weights: Weights) -> int:
    return sum(math.prod(entry.shape) for entry in weights.values())


def lossy(kind: str) -> Kind | None:
    """The kind of storage that loses something, if it is one."""
    return next((each for each in KINDS if each == kind), None)


def keep(network: nn.Module, binding: Binding, weights: Weights, dtype: torch.dtype, *, mapped: bool) -> frozenset[str]:
    """Give a network on meta the layers whose weights the file has in fewer bits, as they are there.

    With `mapped` they are views of the file. The names of those weights are returned; the rest is yet to be loaded.
    What a table turns around, and tensors that belong to no layer, are among the rest.
    """
    names = binding.resolve(weights)
    kept: set[str] = set()
    for item in binding.bound:
        place, _, leaf = item.ours.rpartition(".")
        if leaf != "weight" or not any(_narrow(weights[names[source.key]]) for source in item.sources):
            continue
        owner = network.get_submodule(place)
        large = isinstance(owner, nn.Embedding) and math.prod(item.shape) >= quantized.LEAST
        if type(owner) not in (Linear, Conv2d) and not large:
            continue
        pieces = binding.pieces(item, weights, names, mapped=mapped)
        layer = None if pieces is None else packed(owner, pieces, dtype)
        if layer is not None:
            replace(network, place, layer)
            kept.add(item.ours)
    return frozenset(kept)


def _narrow(entry: Entry) -> bool:
    """Whether a tensor is stored in fewer bits than anything computes in."""
    return entry.format is not None or (entry.dtype.is_floating_point and entry.dtype.itemsize == 1)


def storage_error(network: nn.Module, part: Chosen, config: Any) -> float:  # noqa: ANN401
    """How far weights in fewer bits are from those in the file, |stored - read| / |read|, over every eighth layer."""
    _, binding = part.found.bind(config)
    weights = part.found.weights
    names = binding.resolve(weights)
    read = {item.ours: item for item in binding.bound}
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, Stored)]
    errors = [
        relative_error(layer, put_together(read[f"{name}.weight"], weights, names, torch.float32, mapped=True))
        for name, layer in layers[::8]
    ]
    return sum(errors) / len(errors) if errors else 0.0


def stored_dtype(weights: Weights) -> torch.dtype:
    """The floating type that most of a part is stored in; what has fewer bits than any computes as bfloat16."""
    held: dict[torch.dtype, int] = {}
    for entry in weights.values():
        dtype = torch.bfloat16 if _narrow(entry) else entry.dtype
        if dtype.is_floating_point:
            held[dtype] = held.get(dtype, 0) + math.prod(entry.shape)
    return max(held, key=lambda dtype: held[dtype], default=torch.float32)
