"""Parts of models, the layouts that they are written in, and the evidence by which a file is recognised."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from calotype.checkpoint.files import Shape, Weights
from calotype.checkpoint.keys import Binding, Table
from calotype.errors import DamagedFile, MissingKeys, UnsupportedModel

K = TypeVar("K")
Settings = Mapping[str, Any]  # a part's config.json, or what a single file's header says of it


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Evidence that a person can check: keys there, shapes they have (None: any size), keys not there."""

    has: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int | None, ...]], ...] = ()
    lacks: tuple[str, ...] = ()

    def objection(self, shapes: Mapping[str, Shape], prefix: str = "") -> str | None:
        """Why these keys are not what the signature describes; None where they are."""
        for key in self.has:
            if prefix + key not in shapes:
                return f"{key} is missing"
        for key in self.lacks:
            if prefix + key in shapes:
                return f"{key} is present"
        for key, wanted in self.shapes:
            shape = shapes.get(prefix + key)
            if shape is None:
                return f"{key} is missing"
            if len(shape) != len(wanted) or any(w not in (None, s) for s, w in zip(shape, wanted, strict=True)):
                shown = "(" + ", ".join("any" if side is None else str(side) for side in wanted) + ")"
                return f"{key} is {shape}, not {shown}"
        return None

    def prefixes(self, shapes: Mapping[str, Shape]) -> list[str]:
        """What stands before the first key of the signature, wherever all of it holds."""
        marker = self.has[0]
        found = [key[: -len(marker)] for key in shapes if key == marker or key.endswith("." + marker)]
        return [prefix for prefix in found if self.objection(shapes, prefix) is None]


@dataclass(frozen=True)
class Evidence:
    """What a configuration is inferred from: shapes, settings where there are some, and names for messages."""

    weights: Weights
    settings: Settings
    layout: str

    def size(self, key: str, axis: int = 0) -> int:
        """A side of a tensor; MissingKeys if it is not there."""
        entry = self.weights.get(key)
        if entry is None:
            raise MissingKeys(self.weights.source, self.layout, [key])
        if len(entry.shape) <= axis:
            raise DamagedFile(f"{self.weights.source}: {key!r} is {entry.shape}, which is no shape for {self.layout}")
        return entry.shape[axis]

    def count(self, name: str) -> int:
        """How many numbers `{i}` of a name like "double_blocks.{i}." are in use: one more than the largest."""
        pattern = re.compile(re.escape(name).replace(r"\{i\}", r"(\d{1,6})"))
        found = {int(match[1]) for key in self.weights if (match := pattern.match(key))}
        count = max(found, default=-1) + 1
        if count > 2 * len(found):
            raise DamagedFile(
                f"{self.weights.source}: {name} is numbered up to {count - 1}, with only {len(found)} there"
            )
        return count

    def number(self, name: str, default: int) -> int:
        """A whole number from the settings; null says as little as silence."""
        value = self.settings.get(name)
        if value is None:
            return default
        if type(value) is not int:
            raise DamagedFile(f"{self.weights.source}: config.json: {name} = {value!r} is not a whole number")
        return value

    def refuse(self, what: str) -> UnsupportedModel:
        """The error for a setting that the networks here do not have."""
        return UnsupportedModel(f"{self.weights.source}: {what} is not supported ({self.layout})")

    def require(self, **wanted: object) -> None:
        """UnsupportedModel where a setting is given and is not the one value that the networks here implement."""
        for name, value in wanted.items():
            given = self.settings.get(name, value)
            if given != value:
                raise self.refuse(f"{name} = {given!r}")


@dataclass(frozen=True, kw_only=True)
class Layout(Generic[K]):
    """One way to write a part: how it is recognised, which configuration it has, and its keys.

    `style` is the publisher's habit that it belongs to, original or diffusers; "" where both write it so. `settings`
    gives the config.json that goes with a configuration, for layouts that are folders.
    """

    name: str
    signature: Signature
    config: Callable[[Evidence], K]
    table: Callable[[K], Table]
    style: str = ""
    settings: Callable[[K], dict[str, Any]] | None = None


class _Unfilled(TorchFunctionMode):
    """Modules built without drawing their first weights: there is nothing to fill on meta, and to find that out torch
    would import eight hundred modules.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return given.get("tensor", next(iter(args), None))
        return func(*args, **given)


@dataclass(frozen=True, kw_only=True)
class Part(Generic[K]):
    """A network that models are made of. `name` is its role: transformer, clip, t5, vae."""

    name: str
    network: Callable[[K], nn.Module]
    layouts: tuple[Layout[K], ...]

    def layout(self, name: str) -> Layout[K] | None:
        return next((layout for layout in self.layouts if layout.name == name), None)

    def styled(self, style: str) -> Layout[K] | None:
        """The layout of that style; None where the part has only one way to be written."""
        return next((layout for layout in self.layouts if layout.style == style), None)

    def bind(self, layout: Layout[K], config: K) -> tuple[nn.Module, Binding]:
        """The network of a configuration, without memory behind it, and the layout's table for it."""
        with torch.device("meta"), _Unfilled():
            network = self.network(config)
        shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
        return network, layout.table(config).bind(shapes)


@dataclass(frozen=True)
class Found(Generic[K]):
    """A part recognised in some files, its keys without the prefix that they have there."""

    part: Part[K]
    layout: Layout[K]
    prefix: str
    weights: Weights
    settings: Settings = field(default_factory=dict[str, Any])

    def config(self, defaults: Settings | None = None) -> K:
        """The configuration that shapes and settings show; `defaults` are the family's own settings."""
        try:
            return self.layout.config(Evidence(self.weights, {**(defaults or {}), **self.settings}, self.title))
        except (ArithmeticError, TypeError, ValueError) as error:
            raise self._nonsense(error) from error

    def bind(self, config: K) -> tuple[nn.Module, Binding]:
        """The network on meta, and where its tensors are in these files."""
        try:
            return self.part.bind(self.layout, config)
        except (ArithmeticError, RuntimeError, ValueError) as error:
            raise self._nonsense(error) from error

    def _nonsense(self, error: Exception) -> DamagedFile:
        return DamagedFile(f"{self.weights.source}: its shapes or its config.json make no {self.title}: {error}")

    @property
    def title(self) -> str:
        return f"{self.part.name}/{self.layout.name}"
