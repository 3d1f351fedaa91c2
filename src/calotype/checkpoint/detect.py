"""From keys and shapes to parts: what a file holds, and under which prefix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calotype.checkpoint.files import Entry, Shape, Weights
from calotype.checkpoint.known import Attachment, Known, attachment, quantised
from calotype.checkpoint.layouts import Found, Part, Settings, Signature
from calotype.checkpoint.scaled import with_scales


@dataclass(frozen=True)
class Recognised:
    """A part that has a name but does not run here."""

    known: Known
    prefix: str
    weights: Weights


@dataclass(frozen=True)
class Detected:
    """All that one file, or one set of shards, holds.

    `rest` are the keys that belong to nothing recognised; `objections` say, where nothing was, why.
    """

    weights: Weights
    found: tuple[Found[Any], ...] = ()
    recognised: tuple[Recognised, ...] = ()
    attachment: Attachment | None = None
    quantised: str | None = None
    rest: tuple[str, ...] = ()
    objections: tuple[str, ...] = ()


def detect(weights: Weights, parts: Sequence[Part[Any]], known: Iterable[Known], settings: Settings) -> Detected:
    """Which of these parts the weights hold. Reads names and shapes only."""
    weights = with_scales(_with_side(weights))
    shapes = weights.shapes
    attached = attachment(shapes)
    if attached is not None:
        return Detected(weights, attachment=attached, rest=tuple(weights))

    candidates: list[tuple[str, str, Signature, Any]] = [
        (part.name, layout.name, layout.signature, (part, layout)) for part in parts for layout in part.layouts
    ]
    # Strangers first: their evidence has the sizes that tell them from what runs here. Halves of parts last.
    strangers = [(item.part, item.layout, item.signature, item) for item in known if not item.incomplete]
    halves = [(item.part, item.layout, item.signature, item) for item in known if item.incomplete]
    candidates = [*strangers, *candidates, *halves]
    claims: list[tuple[str, Any]] = []
    markers: set[str] = set()
    for _, _, signature, what in candidates:
        for prefix in signature.prefixes(shapes):
            # The same tensors may answer to a second, laxer signature: the first one in the list has them.
            evidence = {prefix + key for key in signature.has}
            if not evidence & markers and prefix not in (taken for taken, _ in claims):
                markers |= evidence
                claims.append((prefix, what))

    owned: dict[str, dict[str, Entry]] = {prefix: {} for prefix, _ in claims}
    rest: list[str] = []
    by_length = sorted(owned, key=len, reverse=True)
    for key, entry in weights.items():
        prefix = next((prefix for prefix in by_length if key.startswith(prefix)), None)
        if prefix is None:
            rest.append(key)
        else:
            owned[prefix][key[len(prefix) :]] = entry

    found: list[Found[Any]] = []
    recognised: list[Recognised] = []
    for prefix, what in claims:
        own = Weights(weights.source, owned[prefix])
        if isinstance(what, Known):
            recognised.append(Recognised(what, prefix, own))
        else:
            part, layout = what
            found.append(Found(part, layout, prefix, own, settings))
    return Detected(
        weights,
        tuple(found),
        tuple(recognised),
        quantised=quantised(shapes),
        rest=tuple(rest),
        objections=() if claims else _objections(shapes, candidates),
    )


def _objections(shapes: Mapping[str, Shape], candidates: Sequence[tuple[str, str, Signature, Any]]) -> tuple[str, ...]:
    """Why nothing was recognised: what the signatures miss for which there is most evidence."""
    shares = [sum(key in shapes for key in signature.has) / len(signature.has) for _, _, signature, _ in candidates]
    most = max(shares, default=0.0)
    found = (
        f"not {part}/{layout}: {signature.objection(shapes)}"
        for share, (part, layout, signature, _) in zip(shares, candidates, strict=True)
        if share == most > 0
    )
    return tuple(dict.fromkeys(found))[:3]


SIDES = {"encoder": ("0.weight", "1.conv.0.weight"), "decoder": ("1.weight", "3.conv.0.weight")}


def side(weights: Weights) -> str | None:
    """Which half of a tiny autoencoder a file is: the original's two files are bare lists of layers."""
    for name, (first, block) in SIDES.items():
        if block in weights and first in weights and len(weights[first].shape) == 4:
            return name
    return None


def _with_side(weights: Weights) -> Weights:
    """The tiny autoencoder's keys with the side in front, as its table has them."""
    name = side(weights)
    if name is not None:
        return Weights(weights.source, {f"{name}.{key}": entry for key, entry in weights.items()})
    if "taesd_encoder.0.weight" in weights:
        return Weights(weights.source, {key.removeprefix("taesd_"): entry for key, entry in weights.items()})
    return weights
