"""The families of models, one folder each."""

from __future__ import annotations

from calotype.families.coming import COMING
from calotype.families.flux.family import FAMILY as FLUX

FAMILIES = (FLUX,)

__all__ = ["COMING", "FAMILIES"]
