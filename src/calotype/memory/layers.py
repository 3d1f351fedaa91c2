"""Layers whose weights come when they compute, and leave after."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from calotype.memory import pages as paging

Maker = Callable[[], Tensor]
"""Reads a tensor that the file does not hold as it is wanted: in another type, in pieces."""


class Weight(NamedTuple):
    """One parameter or buffer of a layer: where its values are while it does not compute."""

    name: str
    parameter: bool
    shown: Tensor  # what the module has meanwhile; on meta where `made` reads the values
    made: Maker | None
    pages: paging.Pages | None

    def value(self) -> Tensor:
        return self.shown if self.made is None else self.made()


class Layer:
    """A module's own weights, without those of its children."""

    def __init__(self, module: nn.Module, makers: Mapping[str, Maker], files: Iterable[paging.Mapping]) -> None:
        """`makers` reads those of the module's weights that are on meta; `files` may hold the others."""
        files = tuple(files)
        self.module = module
        named: list[tuple[str, bool, Tensor]] = []
        named += [(name, True, tensor) for name, tensor in module.named_parameters(recurse=False)]
        named += [(name, False, tensor) for name, tensor in module.named_buffers(recurse=False)]
        self.weights = tuple(
            Weight(
                name,
                parameter,
                tensor,
                makers.get(name) if tensor.is_meta else None,
                paging.pages_of(tensor, files) if files else None,
            )
            for name, parameter, tensor in named
        )

    @property
    def bytes(self) -> int:
        return sum(weight.shown.nbytes for weight in self.weights)

    def fetch(self, device: torch.device) -> tuple[Tensor, ...]:
        """The weights on a device. A copy from pinned memory is not waited for."""
        return tuple(weight.value().to(device, non_blocking=True) for weight in self.weights)

    def put(self, values: Iterable[Tensor]) -> None:
        """Give the module these weights, in the order of `fetch`."""
        for weight, value in zip(self.weights, values, strict=True):
            if value is weight.shown:
                continue
            setattr(self.module, weight.name, nn.Parameter(value, requires_grad=False) if weight.parameter else value)

    def leave(self) -> None:
        """Take the weights away again, and give back the pages that they were read from."""
        for weight in self.weights:
            setattr(self.module, weight.name, weight.shown)
            if weight.pages is not None:
                weight.pages.drop()

    def expect(self) -> None:
        """Tell the system that the weights will be read soon."""
        for weight in self.weights:
            if weight.pages is not None:
                weight.pages.expect()

    def pin(self) -> None:
        """Keep the weights in memory that a device can copy from by itself: one more copy of them on the host."""
        self.weights = tuple(
            weight._replace(shown=self._pinned(weight), made=None, pages=None) for weight in self.weights
        )
        self.leave()

    def _pinned(self, weight: Weight) -> Tensor:
        pinned = weight.value().detach().pin_memory()
        if weight.pages is not None:
            weight.pages.drop()
        return nn.Parameter(pinned, requires_grad=False) if weight.parameter else pinned


def layers_of(
    network: nn.Module, makers: Mapping[str, Maker] | None = None, files: Iterable[paging.Mapping] = ()
) -> Iterator[Layer]:
    """Every module inside a network (itself included) that has weights of its own.

    `makers` are by the weights' full names.
    """
    owned: dict[str, dict[str, Maker]] = {}
    for name, maker in (makers or {}).items():
        path, _, leaf = name.rpartition(".")
        owned.setdefault(path, {})[leaf] = maker
    files = tuple(files)
    for path, module in network.named_modules():
        layer = Layer(module, owned.get(path, {}), files)
        if layer.weights:
            yield layer
