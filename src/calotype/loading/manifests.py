"""The checkpoint files known by name: every key with its shape, from our own tables and networks."""

from __future__ import annotations

from calotype.checkpoint.files import Shape
from calotype.errors import RequestError
from calotype.families import FAMILIES
from calotype.families.family import Manifest, ManifestPart

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
        layout = item.part.layout(item.layout)
        assert layout is not None
        _, binding = item.part.bind(layout, item.config)
        for key, shape in binding.manifest(item.extras):
            if key.startswith(item.only):
                listed.append((item.prefix + _spelt(key[len(item.only) :], item), shape))
    listed += [(extra.theirs, extra.shape) for extra in _ALL[name].more if extra.shape is not None]
    return sorted(listed)


def _spelt(key: str, item: ManifestPart) -> str:
    """A key of the part's table as this file has it."""
    for ours, theirs in item.spelt:
        key = key.replace(ours, theirs)
    return key.replace(".", "") if item.undotted else key
