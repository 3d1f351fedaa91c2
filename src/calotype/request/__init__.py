"""What a picture is asked for with: one frozen type for every door (Python, command line, HTTP, batch file).

A `Request` holds what the user said; None means the family's default. `Request.complete` fills the gaps from a
family's `Defaults` and returns a `Job`, in which every value is settled. Both check themselves once, when built.
"""

from __future__ import annotations

from calotype.request.checks import MAX_COUNT, MAX_PROMPT, MAX_SEED, MAX_SIDE, MAX_STEPS
from calotype.request.parts import Control, HighRes, ImagePrompt, Lora, Region
from calotype.request.pictures import FINGERPRINT, extended, fingerprint, resized
from calotype.request.request import SIZES, Defaults, Job, Request
from calotype.request.size import Size

__all__ = [
    "FINGERPRINT",
    "MAX_COUNT",
    "MAX_PROMPT",
    "MAX_SEED",
    "MAX_SIDE",
    "MAX_STEPS",
    "SIZES",
    "Control",
    "Defaults",
    "HighRes",
    "ImagePrompt",
    "Job",
    "Lora",
    "Region",
    "Request",
    "Size",
    "extended",
    "fingerprint",
    "resized",
]
