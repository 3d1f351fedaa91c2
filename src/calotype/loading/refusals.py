"""What does not load, and why: what sources are instead of a model, what they lack, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from calotype.checkpoint.layouts import Found
from calotype.errors import (
    LoadError,
    MissingKeys,
    MissingPart,
    NotAModel,
    UnknownModel,
    UnsupportedModel,
    WrongShape,
)
from calotype.families import FAMILIES
from calotype.families.family import Clues, Family, Role
from calotype.loading.gather import Chosen, Item, Opened, choose
from calotype.loading.manifests import Nearest, nearest

FEW = 2  # families that a part may go into, up to which all that they lack is told
ENOUGH = 8  # tensors outside all parts, from which on they may be the rest of one


def recognised(opened: Opened) -> tuple[Family, dict[str, Chosen], dict[str, Any]]:
    """The family whose backbone is among the sources, its parts and their configurations, by role.

    Raises a LoadError that says what the sources are where they are no model.
    """
    items = [item for item in opened.items if not is_embedding(item)]
    families = _with_backbone(opened)
    for item in items:
        _refuse_what_is_no_part(item, with_model=bool(families))
    strangers = [item for item in items if item.detected.recognised]
    for item in strangers:
        known = item.detected.recognised[0].known
        name = f"{item.group.weights.source}: {known.title}"
        if known.incomplete:
            raise MissingPart(f"{name}: {known.incomplete}")
        if families:
            raise UnsupportedModel(f"{name}, which does not go with the other sources ({families[0].title})")
        advice = known.advice or f"supported: {titles()}"
        raise UnsupportedModel(f"{name}: recognised, but not supported yet; {advice}")
    if not families:
        raise _without_backbone(opened)
    if len(families) > 1:
        raise LoadError(f"{_of_two_families(opened, families)}; give the files of one model")
    family = families[0]
    _refuse_what_has_no_role(opened, family)
    chosen = choose(family, opened)
    configs: dict[str, Any] = {}
    for role, part in chosen.items():
        try:
            configs[role] = part.config
        except MissingKeys as error:
            raise told_in_full(error, part.found) from error
    return family, chosen, configs


def refuse_incomplete(
    opened: Opened, family: Family, chosen: Mapping[str, Chosen], configs: Mapping[str, Any], clues: Clues
) -> None:
    """A LoadError where these parts make no model that runs."""
    refusal = family.refusal(configs[family.backbone.name], clues)
    if refusal is not None:
        raise UnsupportedModel(f"{opened.name}: {refusal}")
    lacking = family.lacking(chosen)
    if lacking:
        # What is there may be damaged: nobody should look for the rest in vain.
        refuse_damaged(chosen)
        names = " and its ".join(role.name for role in lacking)
        raise MissingPart(f"{opened.name}: a {family.title} model without its {names}; give also {_places(lacking)}")
    misfit = family.misfit(configs)
    if misfit is not None:
        role_name, why = misfit
        raise WrongShape(f"{chosen[role_name].found.weights.source}: {why}; it belongs to another family or model")


def refuse_damaged(chosen: Mapping[str, Chosen]) -> None:
    """A LoadError where a part's tensors are not those that its layout has."""
    for part in chosen.values():
        error = damage(part.found, part.role)
        if error is not None:
            raise error


def damage(found: Found[Any], role: Role | None = None) -> LoadError | None:
    """Why a part that was recognised is not sound; None where its tensors are just those that its layout has."""
    try:
        config = found.config({} if role is None else role.settings_of(found.part))
    except MissingKeys as error:
        return told_in_full(error, found)
    except LoadError as error:
        return error
    try:
        _, binding = found.bind(config)
        binding.resolve(found.weights)
    except LoadError as error:
        return error
    return None


def told_in_full(error: MissingKeys, found: Found[Any]) -> MissingKeys:
    """The error of a part without configuration, with all that is missing: the first loss was enough to stop at."""
    near = nearest(found.weights.shapes, found.part)
    if near is None or not set(error.keys) <= set(near.missing):
        return error
    return MissingKeys(error.source, near.title, near.missing, near.spare)


def fragment(item: Item) -> Nearest | None:
    """The known part that tensors are a piece of which belong to nothing recognised."""
    rest = [key for key in item.detected.rest if not any(fnmatchcase(key, p) for f in FAMILIES for p in f.harmless)]
    if item.detected.attachment is not None or len(rest) < ENOUGH:
        return None
    shapes = item.detected.weights.shapes
    near = nearest({key: shapes[key] for key in rest})
    return near if near is not None and near.missing else None


def unknown(item: Item) -> str:
    """Why nothing in a file is recognised."""
    return "; ".join(item.detected.objections) or (
        f"its tensors are called {', '.join(list(item.group.weights)[:3])}, ..."
    )


def is_embedding(item: Item) -> bool:
    return item.detected.attachment is not None and item.detected.attachment.kind == "embedding"


def titles() -> str:
    return ", ".join(family.title for family in FAMILIES)


def _with_backbone(opened: Opened) -> list[Family]:
    parts = {id(found.part) for item in opened.items for found in item.detected.found}
    return [family for family in FAMILIES if any(id(part) in parts for part in family.backbone.parts)]


def _refuse_what_is_no_part(item: Item, *, with_model: bool) -> None:
    source, detected = item.group.weights.source, item.detected
    if detected.attachment is not None:
        do = "it is not supported yet: leave it out" if with_model else "give the model itself as the source"
        if detected.attachment.kind == "lora" and with_model:
            do = "attach it to the model: --lora FILE on the command line, or Model.attach(FILE)"
        if detected.attachment.kind == "controlnet" and with_model:
            do = "give it in a request's controls (--control), or to load_control, instead"
        if detected.attachment.kind == "ip_adapter" and with_model:
            do = "give it with a picture, in a request's image_prompts (--image-prompt), instead"
        if detected.attachment.kind == "image_encoder" and with_model:
            do = "give it as the encoder of an image prompt, instead"
        raise NotAModel(f"{source}: {detected.attachment.title}, which goes with a model and is none; {do}")
    if detected.quantised is not None:
        raise UnsupportedModel(f"{source}: weights quantised by {detected.quantised} are not supported yet")
    broken = fragment(item)
    if broken is not None:
        raise MissingKeys(source, broken.title, broken.missing, broken.spare)
    if not detected.found and not detected.recognised:
        raise UnknownModel(f"{source}: no known model: {unknown(item)}; supported: {titles()}")


def _without_backbone(opened: Opened) -> LoadError:
    """For sources without a UNet or transformer: what they are, and what they want."""
    pipeline = next((source.pipeline for source in opened.sources if source.pipeline), None)
    if pipeline not in (None, *(family.pipeline for family in FAMILIES)):
        return UnknownModel(f"{opened.name}: a {pipeline}, which is not supported; supported: {titles()}")
    found = [piece for item in opened.items for piece in item.detected.found]
    if not found:
        embedding = next((item for item in opened.items if is_embedding(item)), None)
        if embedding is not None and embedding.detected.attachment is not None:
            word = embedding.group.weights.files[0].stem
            return NotAModel(
                f"{embedding.group.weights.source}: {embedding.detected.attachment.title}, which goes with a model and "
                f"is none; give the model too, and write {word!r} in a prompt"
            )
        return MissingPart(f"{opened.name}: nothing to make a model of; give also {_backbones(list(FAMILIES))}")
    takers = takers_of(found)
    held = ", ".join(sorted({piece.part.name for piece in found}))
    if len(takers) > FEW:
        return MissingPart(f"{opened.name}: only {held} to make a model of; give also {_backbones(takers)}")
    wanted = [_rest(family, found) for family in takers]
    if len(takers) == 1:
        roles = {role.name: role for piece in found if (role := takers[0].taking(piece)) is not None}
        held = " and ".join(f"the {name}" for name in sorted(roles)) + f" of {takers[0].title}"
    return MissingPart(f"{opened.name}: only {held} to make a model of; give also {'; or '.join(wanted)}")


def _rest(family: Family, found: list[Found[Any]]) -> str:
    """What a family's model has beside these parts, and where to get it."""
    names = {role.name for piece in found if (role := family.taking(piece)) is not None}
    return ", ".join(f"the {role.name} of {family.title} ({role.where})" for role in family.lacking(names))


def takers_of(found: list[Found[Any]]) -> list[Family]:
    """The families that all of these parts may go into; where there is none, those that any of them may."""
    fits = {family.name: [family.taking(piece) is not None for piece in found] for family in FAMILIES}
    takers = [family for family in FAMILIES if all(fits[family.name])]
    return takers or [family for family in FAMILIES if any(fits[family.name])] or list(FAMILIES)


def _backbones(families: list[Family]) -> str:
    return " or ".join(f"the {f.backbone.name} of {f.title} ({f.backbone.where})" for f in families)


def _places(roles: Sequence[Role]) -> str:
    """Where to find parts: one by itself, or several by name."""
    if len(roles) == 1:
        return roles[0].where
    return "; ".join(f"for the {role.name} {role.where}" for role in roles)


def _of_two_families(opened: Opened, families: list[Family]) -> str:
    """a.safetensors holds the unet of SDXL, b.safetensors that of Kolors"""
    told: list[str] = []
    for family in families:
        source = next(
            item.group.weights.source
            for item in opened.items
            if any(found.part in family.backbone.parts for found in item.detected.found)
        )
        told.append(f"{source} holds the {family.backbone.name} of {family.title}")
    return ", ".join(told)


def _refuse_what_has_no_role(opened: Opened, family: Family) -> None:
    """Parts of another family, given by themselves: nothing is left out in silence."""
    for item in opened.items:
        if len(item.detected.found) == 1 and not item.group.component:
            found = item.detected.found[0]
            if not family.roles_of(found.part):
                others = ", ".join(other.title for other in takers_of([found]))
                raise LoadError(
                    f"{item.group.weights.source}: a {found.part.name}, which goes with {others}, and not with the "
                    f"{family.title} model among the sources; leave it out"
                )
