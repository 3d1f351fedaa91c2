"""Which of a network's own weights a layer's name in a file means.

No names are listed here: those that files have for layers are those that checkpoints have for weights, and each part
has tables of them (`calotype.checkpoint.keys`). A file names a layer as one of the part's layouts does, with dots or
with underscores in their place, after a prefix that says which network it is in.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

from torch import nn

from calotype.checkpoint.bert import BERT
from calotype.checkpoint.files import Shape
from calotype.checkpoint.keys import Bound, Source
from calotype.checkpoint.layouts import Part
from calotype.checkpoint.text_encoders import CLIP, T5
from calotype.nn.stored import StoredConv2d, StoredLinear
from calotype.text.bert import HUNYUAN_CLIP
from calotype.text.clip import BIG_G, VIT_L
from calotype.text.t5 import XXL

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
# What says of a layer's name that it is in a text encoder: these before it, or an encoder's own names.
ENCODERS = ("lora_te", "text_encoder", *(f"{name}." for names in CALLED.values() for name in names))
OWN = ("text_model.", "encoder.layer", "encoder.block.")
PIECE = re.compile(r"(.+)[._](\d)")  # one of the layers that are fused in another: OneTrainer's qkv.0, qkv.1, ...


@dataclass(frozen=True)
class Target:
    """One weight that a file's layer names: where the rows of theirs lie in ours."""

    owner: Adaptable
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
        forms = ("{}.transformer.", "{}.", "text_encoders.{}.transformer.")
        return (f"{self.folder}.", *(form.format(name) for name in called for form in forms))

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
        return tuple(Names.of(name, bound) for name, bound in self._bound.items())

    @cached_property
    def fused(self) -> dict[str, tuple[tuple[Bound, Source], ...]]:
        """The weights that a layout has in several pieces, one on top of another, by our names: q, k and v."""
        found: dict[str, tuple[tuple[Bound, Source], ...]] = {}
        for item in (item for bound in self._bound.values() for item in bound if len(item.sources) > 1):
            found[item.ours] = tuple((item, source) for source in item.sources)
        return found

    @cached_property
    def _bound(self) -> dict[str, tuple[Bound, ...]]:
        shapes = dict(_layers(self.network))
        return {layout.name: layout.table(self.config).bind(shapes).bound for layout in self.part.layouts}

    def named(self, name: str) -> bool:
        """Whether a layer's name says that it is in this network, whatever follows."""
        return name.startswith((*self.dotted, *self.joined))


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
        parts = Counter(one.part.name for one in self._networks if not one.backbone)
        # An encoder that is alone of its kind needs no prefix.
        self._alone = {one for one in self._networks if not one.backbone and parts[one.part.name] == 1}
        self._candidates = {name: list(self._all(name.removeprefix(PEFT))) for name in names}
        self._votes = Counter((one.owner, one.layout) for found in self._candidates.values() for one in found)

    def target(self, name: str) -> Target | None:
        """The weight that a layer's name means; None for a name that no layout has."""
        found = self._candidates[name]
        return max(found, key=lambda target: self._votes[target.owner, target.layout], default=None)

    def _all(self, name: str) -> list[Target]:
        found = list(self._whole(name))
        piece = None if found else PIECE.fullmatch(name)
        if piece is not None:
            number = int(piece[2])
            for target in self._whole(piece[1]):
                pieces = target.owner.fused.get(target.parts[0][0].ours, ()) if len(target.parts) == 1 else ()
                if number < len(pieces):
                    found.append(replace(target, parts=pieces[number : number + 1]))
        return found

    def _whole(self, name: str) -> Iterator[Target]:
        for one in self._networks:
            for names in one.layouts:
                parts = _found(one, names, name, bare=one in self._alone)
                if parts is not None:
                    yield Target(one, parts, names.layout)


def _found(one: Adaptable, names: Names, name: str, *, bare: bool) -> tuple[tuple[Bound, Source], ...] | None:
    for prefix in (*one.dotted, "") if bare else one.dotted:
        if name.startswith(prefix) and (parts := names.dotted.get(name[len(prefix) :])) is not None:
            return parts
    for prefix in one.joined:
        if name.startswith(prefix) and (dotted := names.joined.get(name[len(prefix) :])) is not None:
            return names.dotted[dotted]
    return None


def for_encoder(name: str) -> bool:
    """Whether a layer's name says that it is in a text encoder."""
    return name.removeprefix(PEFT).startswith((*ENCODERS, *OWN))


def elsewhere(networks: Iterable[Adaptable], names: Iterable[str]) -> frozenset[str]:
    """Which of these layers are of text encoders that other models have, and that are not among the networks."""
    names = tuple(names)
    here = [one for one in networks if not one.backbone]
    resolvers = [(one, Resolver([one], names)) for one in _encoders()] if names else []
    return frozenset(
        name
        for one, resolver in resolvers
        for name in names
        if resolver.target(name) is not None
        and not any(own.part.name == one.part.name and own.named(name.removeprefix(PEFT)) for own in here)
    )


@cache
def _encoders() -> tuple[Adaptable, ...]:
    """The text encoders that files may have layers of, in the places that families have for them, on meta."""
    return (
        _on_meta("clip_l", "text_encoder", CLIP, replace(VIT_L, projection=VIT_L.width)),
        _on_meta("clip_g", "text_encoder_2", CLIP, BIG_G),
        _on_meta("bert", "text_encoder", BERT, HUNYUAN_CLIP),
        _on_meta("t5", "text_encoder_2", T5, XXL),
        _on_meta("t5", "text_encoder_3", T5, XXL),
    )


def _on_meta(role: str, folder: str, part: Part[Any], config: Any) -> Adaptable:  # noqa: ANN401
    network, _ = part.bind(part.layouts[0], config)
    return Adaptable(role, folder, network, part, config, False)
