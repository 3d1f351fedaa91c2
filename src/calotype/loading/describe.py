"""What a source is, from its headers alone."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from calotype.checkpoint.embeddings import T5_WIDTH, embedding_keys
from calotype.checkpoint.files import Entry, Weights
from calotype.checkpoint.known import Known, unread
from calotype.checkpoint.layouts import Found
from calotype.errors import LoadError, MissingKeys, UnexpectedKeys, UnsupportedModel
from calotype.families import FAMILIES
from calotype.families.adapters import fitting
from calotype.families.family import Family, Role
from calotype.loading.controls import control_in, refusal
from calotype.loading.controls import fitting as fitting_control
from calotype.loading.gather import Item, Opened, choose, gather
from calotype.loading.image_prompts import adapter_in
from calotype.loading.image_prompts import fitting as fitting_adapter
from calotype.loading.refusals import damage, fragment, refuse_damaged, takers_of
from calotype.lora.files import summary
from calotype.nn.leader import Leader


@dataclass(frozen=True, kw_only=True)
class PartDescription:
    """One part of a source. `name` is its role (transformer, clip, t5, vae, unet, lora, unknown, ...)."""

    name: str
    layout: str
    dtypes: dict[str, int]  # safetensors' and ggml's names of types -> number of tensors
    tensors: int
    parameters: int
    bytes: int
    files: tuple[str, ...]
    prefix: str


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a source is. `kind` is model, part, lora, controlnet, ...; family and variant are None where unknown.

    `supported` says whether `load` can use it; `note` says what a user should know about it.
    """

    source: str
    kind: str
    family: str | None
    variant: str | None
    layout: str | None
    supported: bool
    note: str
    parts: tuple[PartDescription, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def describe(source: str | os.PathLike[str]) -> Description:
    """What a file, folder or hub model is, without reading tensor data.

    What no family claims is described too, as unknown. Raises SourceNotFound, DamagedFile or UnsafeFile.
    """
    try:
        opened = gather([source])
    except UnsupportedModel as error:
        return _described(str(source), "model", note=str(error))
    parts = tuple(part for item in opened.items for part in _parts(item))
    for item in opened.items:
        attachment = item.detected.attachment
        if attachment is not None:
            note = f"goes with a model, and is none itself{_use(attachment.kind)}"
            known_family = attachment.family
            if attachment.kind == "embedding" and T5_WIDTH in (embedding_keys(item.detected.weights.shapes) or ()):
                note = f"with vectors for T5, which are not read here; {note}"
            if attachment.kind == "ip_adapter":
                note = f"{_adapter(item.detected.weights)}{note}"
            if attachment.kind == "controlnet":
                known_family, what = _control(item)
                note = f"{what}{note}"
            if attachment.kind == "lora":
                other = unread(item.detected.weights)
                note = str(other[0]) if other else f"{summary(item.detected.weights)}; {note}"
                known_family = known_family or next(iter(fitting(item.detected.weights)), None)
            return _described(
                opened.name,
                attachment.kind,
                family=known_family,
                layout=attachment.layout,
                note=note,
                parts=parts,
            )
    recognised = [piece for item in opened.items for piece in item.detected.recognised]
    if recognised:
        known = recognised[0].known
        whole = any(item.detected.found for item in opened.items) or known.part in ("unet", "transformer")
        return _described(
            opened.name,
            "model" if whole else "part",
            family=known.family,
            variant=known.variant if known.family else None,
            layout=_layout(opened, known.layout),
            note=known.incomplete or _unsupported(known),
            parts=parts,
        )
    broken = next((near for item in opened.items if (near := fragment(item)) is not None), None)
    if broken is not None:
        return _described(
            opened.name,
            "part",
            family=broken.family.name,
            layout=_layout(opened, broken.item.layout),
            note=f"does not load: {MissingKeys('', broken.title, broken.missing, broken.spare).what}",
            parts=parts,
        )
    if not any(item.detected.found for item in opened.items):
        why = "; ".join(objection for item in opened.items for objection in item.detected.objections)
        pipeline = next((f" ({source.pipeline})" for source in opened.sources if source.pipeline), "")
        note = f"no known model{pipeline}{': ' + why if why else ''}"
        return _described(opened.name, "unknown", note=note, parts=parts)
    return _of_family(opened, parts)


def _use(kind: str) -> str:
    """What to do with something that goes with a model."""
    if kind == "embedding":
        return "; give it beside one, and write its file's name in a prompt"
    if kind == "controlnet":
        return "; lead it by a picture: --control, or a request's controls"
    if kind == "ip_adapter":
        return "; draw with it and a picture: --image-prompt, or a request's image_prompts"
    return "; attach it with --lora, or Model.attach" if kind == "lora" else ""


def _control(item: Item) -> tuple[str | None, str]:
    """The family of a ControlNet, and what it is."""
    attachment = item.detected.attachment
    assert attachment is not None
    found = control_in(item.group.weights, item.group.settings)
    if found is None:
        return attachment.family, f"{refusal(attachment)}; "
    try:
        config = found.config()
        families = fitting_control(found.part, config)
        network, _ = found.bind(config)
    except LoadError as error:
        return attachment.family, f"does not load: {error}; "
    assert isinstance(network, Leader)
    what = f"a union, which must be told one of {', '.join(network.kinds)}; " if network.count else ""
    what += "for inpainting, with a mask_image; " if network.sees == "masked" else ""
    names = [family.name for family in families]
    own = attachment.family if attachment.family in names or not names else names[0]
    return own, f"{what}for {_titles(families)}; "


def _titles(families: Sequence[Family]) -> str:
    """The families whose published models something fits."""
    return " and ".join(family.title for family in families) or "a model of other sizes than the published ones"


def _adapter(weights: Weights) -> str:
    """Which form an IP-Adapter has, and which families it fits."""
    found = adapter_in(weights)
    if found is None:
        return "does not run here yet; "
    try:
        config = found.config()
        families = fitting_adapter(config)
    except LoadError as error:
        return f"does not load: {_reason(error)}; "
    titles = _titles(families)
    return f"{found.layout.name}, for {titles}; "


def _of_family(opened: Opened, parts: tuple[PartDescription, ...]) -> Description:
    found = [piece for item in opened.items for piece in item.detected.found]
    quantised = next((item.detected.quantised for item in opened.items if item.detected.quantised), None)
    for family in FAMILIES:
        backbone = next((piece for piece in found if piece.part in family.backbone.parts), None)
        if backbone is None:
            continue
        variant, present, refusal = _judged(opened, family, backbone)
        if quantised is not None:
            refusal = f"weights quantised by {quantised} are not supported yet"
        lacking = [role.name for role in family.lacking(present)]
        note = refusal or (f"to run, it needs also: {', '.join(lacking)}" if lacking else _complete(family, present))
        return _described(
            opened.name,
            "part" if lacking and len(present) == 1 else "model",
            family=family.name,
            variant=opened.card.get("variant") or variant,
            layout=_layout(opened, backbone.layout.name),
            supported=refusal is None,
            note=note,
            parts=parts,
        )
    names = ", ".join(dict.fromkeys(piece.part.name for piece in found))
    takers = [family.name for family in takers_of(found)]
    damages = (damage(piece, takers_of([piece])[0].taking(piece)) for piece in found)
    broken = next((error for error in damages if error is not None), None)
    note = f"{names} alone; families with such a part: {', '.join(takers)}"
    if broken is not None:
        note = f"does not load: {_reason(broken)}"
    if quantised is not None:
        note = f"weights quantised by {quantised} are not supported yet"
    return _described(
        opened.name,
        "part",
        layout=_layout(opened, found[0].layout.name),
        supported=quantised is None and broken is None,
        note=note,
        parts=parts,
    )


def _complete(family: Family, present: set[str]) -> str:
    """For a model that runs: that nothing is missing, or what it does without."""
    left_out = [f"without {role.name} {role.optional}" for role in family.left_out(present)]
    return f"runs; {'; '.join(left_out)}" if left_out else "complete"


def _judged(opened: Opened, family: Family, backbone: Found[Any]) -> tuple[str | None, set[str], str | None]:
    """A model's variant, the roles that are there, and why it does not load (None where it does)."""
    present = {
        role.name
        for item in opened.items
        for piece in item.detected.found
        if (role := _role(family, piece, item.group.component)) is not None
    }
    try:
        config = backbone.config(family.backbone.settings_of(backbone.part))
    except LoadError as error:
        return None, present, f"does not load: {_reason(damage(backbone, family.backbone) or error)}"
    clues = opened.clues(backbone)
    try:
        variant = family.variant(config, clues)
        refusal = family.refusal(config, clues)
        if refusal is not None:
            return variant, present, refusal
    except LoadError as error:  # a scheduler_config.json that asks for what is not done here
        return None, present, f"does not load: {_reason(error)}"
    try:
        chosen = choose(family, opened)
        refuse_damaged(chosen)
    except LoadError as error:
        return variant, present, f"does not load: {_reason(error)}"
    configs = {name: part.config for name, part in chosen.items()}
    misfit = None if family.lacking(chosen) else family.misfit(configs)
    return variant, present, None if misfit is None else f"does not load: {misfit[1]}"


def _role(family: Family, piece: Found[Any], component: str) -> Role | None:
    try:
        return family.role(piece, component)
    except LoadError:  # damaged, which is told elsewhere
        return family.taking(piece)


def _reason(error: LoadError) -> str:
    """An error's text without the source, which a description has, and without the advice to look at it."""
    if isinstance(error, (MissingKeys, UnexpectedKeys)):
        return error.what
    return str(error).split(": ", 1)[-1]


def _unsupported(known: Known) -> str:
    what = "not supported yet" if known.family else f"{known.variant}: not supported"
    return f"{what}; {known.advice}" if known.advice else what


def _parts(item: Item) -> list[PartDescription]:
    detected = item.detected
    out = [_part(piece.part.name, piece.layout.name, piece.weights, piece.prefix) for piece in detected.found]
    out += [_part(piece.known.part, piece.known.layout, piece.weights, piece.prefix) for piece in detected.recognised]
    if detected.rest:
        name, layout = "other", ""
        if detected.attachment is not None:
            name, layout = detected.attachment.kind, detected.attachment.layout
        elif not out:
            name = "unknown"
        rest = Weights(detected.weights.source, {key: detected.weights[key] for key in detected.rest})
        out.append(_part(name, layout, rest, ""))
    return out


def _part(name: str, layout: str, weights: Weights, prefix: str) -> PartDescription:
    return PartDescription(
        name=name,
        layout=layout,
        dtypes=dict(Counter(_type(entry) for entry in weights.values()).most_common()),
        tensors=len(weights),
        parameters=sum(math.prod(entry.shape) for entry in weights.values()),
        bytes=sum(entry.stop - entry.start for entry in weights.values()),
        files=tuple(str(path) for path in weights.files),
        prefix=prefix,
    )


def _type(entry: Entry) -> str:
    """F8_E4M3 scaled"""
    return entry.stored + (" scaled" if entry.scale is not None else "")


def _layout(opened: Opened, layout: str) -> str:
    """The source's own layout: a pipeline folder is diffusers whatever its parts are."""
    return "diffusers" if opened.sources[0].layout == "diffusers" else layout


def _described(
    source: str,
    kind: str,
    *,
    family: str | None = None,
    variant: str | None = None,
    layout: str | None = None,
    supported: bool = False,
    note: str,
    parts: tuple[PartDescription, ...] = (),
) -> Description:
    return Description(
        source=source,
        kind=kind,
        family=family,
        variant=variant,
        layout=layout,
        supported=supported,
        note=note,
        parts=parts,
    )
