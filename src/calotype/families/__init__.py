"""The families of models, one folder each."""

from __future__ import annotations

from calotype.families.coming import COMING
from calotype.families.flux.family import FAMILY as FLUX
from calotype.families.hunyuan_dit.family import FAMILY as HUNYUAN_DIT
from calotype.families.kolors.family import FAMILY as KOLORS
from calotype.families.sd1.family import FAMILY as SD1
from calotype.families.sd3.family import FAMILY as SD3
from calotype.families.sdxl.family import FAMILY as SDXL

FAMILIES = (FLUX, SD1, SDXL, SD3, KOLORS, HUNYUAN_DIT)

__all__ = ["COMING", "FAMILIES"]
