"""ControlNets, loaded for a model: in its type, on its device, on its rung of the memory ladder."""

from __future__ import annotations

from typing import Any

import torch

from calotype.checkpoint.detect import detect
from calotype.checkpoint.files import Weights
from calotype.checkpoint.known import Attachment, attachment
from calotype.checkpoint.layouts import Found, Part, Settings
from calotype.checkpoint.sources import open_source
from calotype.errors import LoadError, RequestError, UnknownModel, UnsupportedModel, WrongShape
from calotype.families import FAMILIES
from calotype.families.family import Family
from calotype.families.model import FamilyModel
from calotype.loading.attached import attached
from calotype.loading.gather import locate_part
from calotype.nn.leader import Leader


def load_control(source: str, model: FamilyModel[Any], dtype: torch.dtype | None) -> Leader:
    """The ControlNet at a path or on the hub, for a model; `dtype` None keeps what it is stored in.

    Raises WrongShape, naming the families that it fits, where it was trained for another; RequestError where the model
    is of a family without ControlNets, or runs with OpenVINO.
    """
    family = next(family for family in FAMILIES if family.name == model.family)
    if family.controls is None:
        raise RequestError("controls", source, f"none: ControlNets of {family.title} do not run here yet")
    if not isinstance(model.backbone, tuple(part.network for part in family.backbone.parts)):  # pyright: ignore[reportArgumentType]
        raise RequestError("controls", source, "none with the backend openvino: load the model with torch")
    found = _found(source)
    config = found.config()
    misfit = "its layers are others"
    if found.part is family.controls.part:
        misfit = family.controls.misfit(config, model.backbone.config)
    if misfit is not None:
        fits = " and ".join(each.title for each in fitting(found.part, config)) or "no family here"
        raise WrongShape(f"{source}: a ControlNet for {fits}: {misfit}; give one that was trained for {model.family}")
    network = attached(found, config, model, dtype)
    assert isinstance(network, Leader)
    return network


def _found(source: str) -> Found[Any]:
    opened = open_source(locate_part(source), source)
    if len(opened.groups) != 1:
        raise LoadError(f"{source}: {len(opened.groups)} files of tensors; name the one that is the ControlNet")
    group = opened.groups[0]
    found = control_in(group.weights, group.settings)
    if found is not None:
        return found
    named = detect(group.weights, (), (), {}).attachment
    if named is not None and named.kind == "controlnet":
        raise UnsupportedModel(f"{source}: {named.title}, which {refusal(named)}")
    what = "no ControlNet" if named is None else f"{named.title}, and no ControlNet"
    titles = ", ".join(family.title for family in FAMILIES if family.controls is not None)
    raise UnknownModel(f"{source}: {what}; give a ControlNet of one of {titles}")


def control_in(weights: Weights, settings: Settings) -> Found[Any] | None:
    """The ControlNet that these tensors are; None for others, and for those that do not run here."""
    named = attachment(weights.shapes)
    if named is not None and named.instead:
        return None
    parts = dict.fromkeys(family.controls.part for family in FAMILIES if family.controls is not None)
    for part in parts:
        for layout in part.layouts:
            for prefix in layout.signature.prefixes(weights.shapes):
                entries = {key[len(prefix) :]: entry for key, entry in weights.items() if key.startswith(prefix)}
                return Found(part, layout, prefix, type(weights)(weights.source, entries), settings)
    return None


def refusal(named: Attachment) -> str:
    """What is said of a ControlNet that is known by name and does not run."""
    return "does not run here yet" + (f": {named.instead}" if named.instead else "")


def fitting(part: Part[Any], config: Any) -> list[Family]:  # noqa: ANN401
    """The families whose published models a ControlNet fits."""
    return [family for family in FAMILIES if _fits(part, config, family)]


def _fits(part: Part[Any], config: Any, family: Family) -> bool:  # noqa: ANN401
    if family.controls is None or family.controls.part is not part:
        return False
    published = [each.config for item in family.manifests for each in item.parts if each.part in family.backbone.parts]
    return any(family.controls.misfit(config, each) is None for each in published)
