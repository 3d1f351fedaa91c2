"""Which families an adapter's file fits, for those who gave it to another one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

from calotype.checkpoint.files import Weights
from calotype.checkpoint.known import unread
from calotype.errors import LoadError
from calotype.families import FAMILIES
from calotype.families.family import Family
from calotype.lora.files import groups, sides
from calotype.lora.targets import Adaptable, Resolver, for_encoder


def fitting(weights: Weights) -> tuple[str, ...]:
    """The families whose published models have every layer of the backbone that a file names, the likeliest first.

    A layer fits where its matrices are as wide as the published model's. What has other tensors too fits none.
    """
    found, rest = groups(weights)
    layers = [name for name in found if not for_encoder(name)]
    if not layers or rest or unread(weights):
        return ()
    fits: dict[str, float] = {}
    for family in FAMILIES:
        for one in _published(family):
            if fits.get(family.name) == 1:
                break
            resolver = Resolver([one], layers)
            sound = 0
            for layer in layers:
                target = resolver.target(layer)
                made = sides(found[layer], weights)
                if target is None or made is None:
                    continue
                rows = 3 * target.shape[1] if found[layer].leading else target.shape[0]
                sound += made[0] == rows and made[1] in (target.shape[1], math.prod(target.shape[1:]))
            fits[family.name] = max(fits.get(family.name, 0.0), sound / len(layers))
    return tuple(name for name, share in sorted(fits.items(), key=lambda item: -item[1]) if share == 1)


def misfit(weights: Weights, family: str) -> str:
    """What to tell somebody whose file has layers that this family's model does not; "" for nothing of use."""
    try:
        others = [name for name in fitting(weights) if name != family]
    except LoadError:
        return ""
    if not others:
        return ""
    titles = " or ".join(one.title for one in FAMILIES if one.name in others)
    return f"the file fits {titles}: attach it to such a model"


def _published(family: Family) -> Iterator[Adaptable]:
    """The backbones of a family that files are known of, on meta."""
    pieces = [piece for manifest in family.manifests for piece in manifest.parts]
    seen: set[object] = set()
    for number, piece in enumerate(pieces):
        if piece.part in family.backbone.parts and piece.config not in seen:
            seen.add(piece.config)
            yield _backbone(FAMILIES.index(family), number)


@cache
def _backbone(family: int, number: int) -> Adaptable:
    """One of them, kept: to build it takes a good part of a second."""
    role = FAMILIES[family].backbone
    piece = [piece for manifest in FAMILIES[family].manifests for piece in manifest.parts][number]
    layout = piece.part.layout(piece.layout)
    assert layout is not None
    network, _ = piece.part.bind(layout, piece.config)
    return Adaptable(role.name, role.folder, network, piece.part, piece.config, True)
