"""Which of a network's own weights a layer's name in a file means.

No names are listed here: those that files have for layers are those that checkpoints have for weights, and each part
has tables of them (`calotype.checkpoint.keys`). A file names a layer as one of the part's layouts does, with dots or
with underscores in their place, after a prefix that says which network it is in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from calotype.checkpoint.files import Shape
from calotype.checkpoint.keys import Bound, Source
from calotype.checkpoint.layouts import Part
from calotype.nn.stored import StoredConv2d, StoredLinear

BACKBONE_DOTTED = ("", "unet.", "transformer.", "diffusion_model.", "model.diffusion_model.")
BACKBONE_JOINED = ("lora_unet_", "lora_transformer_", "lycoris_")
PEFT = "base_model.model."
# How ComfyUI and others call encoders, by their roles here.
CALLED = {
    "clip": ("clip_l",),
    "clip_l": ("clip_l",),
    "clip_g": ("clip_g",),
    "t5": ("t5xxl", "t5"),
    "bert": ("bert",),
}


@dataclass(frozen=True)
class Target:
    """One weight that a file's layer names: where the rows of theirs lie in ours."""

    network: nn.Module
    role: str
    parts: tuple[tuple[Bound, Source], ...]
    layout: str

    @property
    def shape(self) -> Shape:
        """The shape of a change: as many rows as theirs, each as wide as ours."""
        bound, source = self.parts[0]
        return source.shape if source.transposed else (source.shape[0], *bound.shape[1:])


@dataclass(frozen=True, eq=False)
class Adaptable:
    """A network that adapters may change. `folder` is its place in a diffusers folder, which files name it by."""

    role: str
    folder: str
    network: nn.Module
    part: Part[Any]
    config: Any
    backbone: bool

    @property
    def dotted(self) -> tuple[str, ...]:
        if self.backbone:
            return BACKBONE_DOTTED
        called = CALLED.get(self.role, (self.role,))
        return (f"{self.folder}.", *(f"{name}." for name in called)) + tuple(
            f"text_encoders.{name}.transformer." for name in called
        )

    @property
    def joined(self) -> tuple[str, ...]:
        if self.backbone:
            return BACKBONE_JOINED
        number = self.folder.removeprefix("text_encoder").lstrip("_") or "1"
        # FLUX.1 has T5 in the second place, where kohya has it in SD3's, the third.
        numbers = [number, *(["", "1"] if number == "1" else []), *(["3"] if self.role == "t5" else [])]
        return tuple(f"lora_te{each}_" for each in dict.fromkeys(numbers))

    @cached_property
    def layouts(self) -> tuple[Names, ...]:
        """The names that each layout has for the weights of this network's layers."""
        shapes = dict(_layers(self.network))
        return tuple(
            Names.of(layout.name, layout.table(self.config).bind(shapes).bound) for layout in self.part.layouts
        )


def _layers(network: nn.Module) -> Iterator[tuple[str, Shape]]:
    """The weights of layers that multiply: linear ones and convolutions, however they are stored."""
    for name, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            yield f"{name}.weight", tuple(module.weight.shape)
        elif isinstance(module, (StoredLinear, StoredConv2d)):
            yield f"{name}.weight", module.shape


@dataclass(frozen=True)
class Names:
    """A layout's names of layers, dotted, and with underscores for dots."""

    layout: str
    dotted: Mapping[str, tuple[tuple[Bound, Source], ...]]
    joined: Mapping[str, str]

    @classmethod
    def of(cls, layout: str, bound: Iterable[Bound]) -> Names:
        dotted: dict[str, list[tuple[Bound, Source]]] = {}
        for item in bound:
            for source in item.sources:
                # The one weight without that ending is OpenCLIP's projection.
                dotted.setdefault(source.key.removesuffix(".weight").removesuffix("_weight"), []).append((item, source))
        return cls(
            layout, {name: tuple(parts) for name, parts in dotted.items()}, {n.replace(".", "_"): n for n in dotted}
        )


class Resolver:
    """Finds the weights that one file's names mean in a set of networks; where layouts differ, as most names do."""

    def __init__(self, networks: Iterable[Adaptable], names: Iterable[str]) -> None:
        self._networks = tuple(networks)
        self._candidates = {name: list(self._all(name)) for name in names}
        self._votes = Counter((target.role, target.layout) for found in self._candidates.values() for target in found)

    def target(self, name: str) -> Target | None:
        """The weight that a layer's name means; None for a name that no layout has."""
        found = self._candidates[name]
        return max(found, key=lambda target: self._votes[target.role, target.layout], default=None)

    def _all(self, name: str) -> Iterator[Target]:
        bare = name.removeprefix(PEFT)
        for one in self._networks:
            for names in one.layouts:
                parts = _found(one, names, bare)
                if parts is not None:
                    yield Target(one.network, one.role, parts, names.layout)


def _found(one: Adaptable, names: Names, name: str) -> tuple[tuple[Bound, Source], ...] | None:
    for prefix in one.dotted:
        if name.startswith(prefix) and (parts := names.dotted.get(name[len(prefix) :])) is not None:
            return parts
    for prefix in one.joined:
        if name.startswith(prefix) and (dotted := names.joined.get(name[len(prefix) :])) is not None:
            return names.dotted[dotted]
    return None


def for_encoder(name: str) -> bool:
    """Whether a layer's name says that it is in a text encoder."""
    return name.removeprefix(PEFT).startswith(
        ("lora_te", "text_encoder", "clip_l.", "clip_g.", "t5xxl.", "te1.", "te2.")
    )
