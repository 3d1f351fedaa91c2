"""The checkpoint files known by name: every key with its shape, from our own tables and networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calotype.checkpoint.files import Shape
from calotype.checkpoint.layouts import Part
from calotype.errors import RequestError
from calotype.families import FAMILIES
from calotype.families.family import Family, Manifest, ManifestPart

_ALL: dict[str, Manifest] = {item.name: item for family in FAMILIES for item in family.manifests}


def manifests() -> tuple[str, ...]:
    """The names of the files known, without spaces."""
    return tuple(_ALL)


def manifest(name: str) -> list[tuple[str, Shape]]:
    """Keys and shapes of a known file, built on meta, sorted by key. RequestError for an unknown name."""
    if name not in _ALL:
        raise RequestError("manifest", name, "one of " + ", ".join(_ALL))
    listed: list[tuple[str, Shape]] = []
    for item in _ALL[name].parts:
        listed += ((item.prefix + key, shape) for key, shape in _listed(item))
    listed += [(extra.theirs, extra.shape) for extra in _ALL[name].more if extra.shape is not None]
    return sorted(listed)


@dataclass(frozen=True)
class Nearest:
    """The part of a known file that some tensors come closest to, and how they differ from it."""

    family: Family
    item: ManifestPart
    missing: tuple[str, ...]  # with the prefix that the others have
    spare: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.item.part.name}/{self.item.layout} ({self.family.title})"


def nearest(shapes: Mapping[str, Shape], part: Part[Any] | None = None) -> Nearest | None:
    """What most of these tensors are a piece of, for files that are damaged or whose keys were renamed.

    `part` says what they are, where that is known. None where no known part has at least half of them. Takes a second
    or two where many parts have keys like these.
    """
    best: tuple[int, Nearest] | None = None
    tried: list[tuple[str, object, str]] = []
    for family in FAMILIES:
        for item in (item for manifest in family.manifests for item in manifest.parts):
            kind = (item.layout, item.config, item.only)
            if item.undotted or item.spelt or kind in tried or part not in (None, item.part):
                continue
            tried.append(kind)
            for prefix in _prefixes(item, shapes):
                own = {key: shape for key, shape in shapes.items() if key.startswith(prefix)}
                known = {prefix + key: shape for key, shape in _listed(item)}
                common = sum(own.get(key) == shape for key, shape in known.items())
                if 2 * common >= len(own) and (best is None or common > best[0]):
                    missing, spare = sorted(known.keys() - own.keys()), sorted(own.keys() - known.keys())
                    best = (common, Nearest(family, item, tuple(missing), tuple(spare)))
    return None if best is None else best[1]


def _prefixes(item: ManifestPart, shapes: Mapping[str, Shape]) -> list[str]:
    """What may stand before the part's keys: what does before one of those that it is known by."""
    layout = item.part.layout(item.layout)
    assert layout is not None
    marks = [mark[len(item.only) :] for mark in layout.signature.has if mark.startswith(item.only)]
    found = [key[: -len(mark)] for mark in marks for key in shapes if key == mark or key.endswith("." + mark)]
    return list(dict.fromkeys(found))[:4]


def _listed(item: ManifestPart) -> list[tuple[str, Shape]]:
    """The part's keys and shapes in this file, without the prefix."""
    layout = item.part.layout(item.layout)
    assert layout is not None
    _, binding = item.part.bind(layout, item.config)
    listed = binding.manifest(item.extras)
    return [(_spelt(key[len(item.only) :], item), shape) for key, shape in listed if key.startswith(item.only)]


def _spelt(key: str, item: ManifestPart) -> str:
    """A key of the part's table as this file has it."""
    for ours, theirs in item.spelt:
        key = key.replace(ours, theirs)
    return key.replace(".", "") if item.undotted else key
