"""ControlNets, loaded for a model: in its type, on its device, on its rung of the memory ladder."""

from __future__ import annotations

import torch

from calotype.checkpoint.controlnets import CONTROLNET
from calotype.checkpoint.detect import detect
from calotype.checkpoint.layouts import Found
from calotype.checkpoint.sources import open_source
from calotype.errors import LoadError, RequestError, UnknownModel, UnsupportedModel, WrongShape
from calotype.families import FAMILIES
from calotype.families.family import Family
from calotype.families.model import FamilyModel
from calotype.families.unets import UNetModel, control_misfit
from calotype.loading.attached import attached
from calotype.loading.gather import locate
from calotype.nn.controlnet import ControlNet, ControlNetConfig
from calotype.nn.unet import UNet, UNetConfig


def load_control(source: str, model: FamilyModel[object], dtype: torch.dtype | None) -> ControlNet:
    """The ControlNet at a path, or on the hub, for a model; `dtype` None keeps what it is stored in.

    Raises WrongShape, naming the families that it fits, where it was trained for another; RequestError where the model
    is of a family without ControlNets, or runs with OpenVINO.
    """
    if not isinstance(model, UNetModel):
        raise RequestError("controls", source, f"none: ControlNets of {model.family} do not run here yet")
    if not isinstance(model.unet, UNet):
        raise RequestError("controls", source, "none with the backend openvino: load the model with torch")
    found = _found(source)
    config: ControlNetConfig = found.config()
    misfit = control_misfit(config, model.unet.config)
    if misfit is not None:
        fits = " and ".join(family.title for family in FAMILIES if _fits(config, family)) or "no family here"
        raise WrongShape(f"{source}: a ControlNet for {fits}: {misfit}; give one that was trained for {model.family}")
    network = attached(found, config, model, dtype)
    assert isinstance(network, ControlNet)
    return network


def _found(source: str) -> Found[ControlNetConfig]:
    opened = open_source(locate(source), source)
    if len(opened.groups) != 1:
        raise LoadError(f"{source}: {len(opened.groups)} files of tensors; name the one that is the ControlNet")
    group = opened.groups[0]
    shapes = group.weights.shapes
    for layout in CONTROLNET.layouts:
        for prefix in layout.signature.prefixes(shapes):
            entries = {key[len(prefix) :]: entry for key, entry in group.weights.items() if key.startswith(prefix)}
            return Found(CONTROLNET, layout, prefix, type(group.weights)(source, entries), group.settings)
    attached = detect(group.weights, (), (), {}).attachment
    if attached is not None and attached.kind == "controlnet":
        raise UnsupportedModel(f"{source}: {attached.title}, which does not run here yet")
    what = "no ControlNet" if attached is None else f"{attached.title}, and no ControlNet"
    raise UnknownModel(f"{source}: {what}; give a ControlNet of Stable Diffusion 1.x, SDXL or Kolors")


def _fits(config: ControlNetConfig, family: Family) -> bool:
    configs = [part.config for item in family.manifests for part in item.parts if part.part in family.backbone.parts]
    return any(isinstance(each, UNetConfig) and control_misfit(config, each) is None for each in configs)
