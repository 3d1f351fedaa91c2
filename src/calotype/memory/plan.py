"""How much memory a model takes on each rung of the ladder, and which rung to choose."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from calotype.memory.free import free_memory
from calotype.memory.ladder import RUNGS, SMALL, Prepares, Rung
from calotype.memory.layers import layers_of

USABLE = 0.8  # of the memory that is free now: the rest is for activations, and for others


def weight_bytes(network: nn.Module) -> int:
    """Bytes of all of a network's weights, on meta too."""
    return sum(layer.bytes for layer in layers_of(network))


def held_bytes(network: nn.Module, rung: Rung) -> int:
    """The most that a network's weights take at a time while it computes on that rung."""
    layers = list(layers_of(network))
    everything = sum(layer.bytes for layer in layers)
    if rung == "resident":
        return everything
    passing = {layer.module for layer in layers if layer.bytes > SMALL and not any(layer.module.children())}
    if rung == "components":
        once = network.only_for_preparing() if isinstance(network, Prepares) else ()
        passing &= {inner for module in once for inner in module.modules()}
    staying = sum(layer.bytes for layer in layers if layer.module not in passing)
    # The one that computes, and the next on its way.
    belt = 2 * max((layer.bytes for layer in layers if layer.module in passing), default=0)
    return min(staying + belt, everything)


def model_bytes(networks: Mapping[str, nn.Module], rung: Rung) -> int:
    """The most that a model's weights take at a time on that rung."""
    held = [held_bytes(network, rung) for network in networks.values()]
    return sum(held) if rung == "resident" else max(held, default=0)


def choose(networks: Mapping[str, nn.Module], device: torch.device) -> Rung:
    """The highest rung whose weights fit into four fifths of the device's free memory; else the lowest."""
    room = USABLE * free_memory(device)
    for rung in RUNGS:
        if model_bytes(networks, rung) <= room:
            return rung
    return RUNGS[-1]
