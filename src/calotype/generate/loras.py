"""LoRAs and their kin: what a request asks for is attached before its first step, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from calotype.checkpoint.files import Weights
from calotype.errors import RequestError
from calotype.families.model import FamilyModel
from calotype.lora.attach import Adapters
from calotype.lora.files import find
from calotype.request import Lora

C = TypeVar("C")


def wear(model: FamilyModel[C], loras: Sequence[Lora]) -> None:
    """Have the model draw with a request's LoRAs; what an earlier one asked for stays where this one has it too."""
    adapters = model.adapters
    if not loras and (adapters is None or not adapters.worn):
        return
    attaching = able(model)
    wanted: dict[str, float] = {}
    for number, lora in enumerate(loras):
        path = str(find(lora.file).resolve())
        if path in wanted:
            raise RequestError(f"loras[{number}]", str(lora.file), "each file once; add up its scales")
        wanted[path] = lora.scale
    attaching.wear(wanted, lambda path: Weights.of(path, [Path(path)]))


def able(model: FamilyModel[C]) -> Adapters:
    """What attaches adapters to a model. RequestError where it cannot have any, or not now."""
    adapters = model.adapters
    name = f"{model.family}/{model.variant}"
    if adapters is None or not adapters.applies_to(model.backbone):
        raise RequestError("loras", name, "none for it: its backend holds weights of its own; load it with torch")
    if model.memory.busy:
        raise RequestError("loras", name, "a change between jobs: finish or close the one that runs first")
    return adapters
