"""How far a network that computes in fewer bits is from itself, seen on a job."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any

from calotype.backends.openvino import OpenVinoUNet
from calotype.families.unets import UNetModel
from calotype.generate import Model, Progress
from calotype.request import Request

TRIAL = Request(prompt="a red fox in the snow, morning light", seed=7, steps=3)
SIDE = 32  # latents: 256 pixels in all families that are published


def rounding_error(model: Model[Any]) -> float:
    """|int8 - torch| / |torch| of the UNet's answers over the steps of a small job, the largest of them."""
    family = model.family
    assert isinstance(family, UNetModel) and isinstance(family.unet, OpenVinoUNet)

    side = SIDE * family.grain

    def trial() -> None:
        with closing(model.stream(replace(TRIAL, width=side, height=side))) as events:
            next(event for event in events if isinstance(event, Progress) and event.step == event.steps)

    return family.unet.error(trial)
