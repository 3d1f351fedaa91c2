"""float8 with scales, as ComfyUI writes it: beside a weight what its values are to be multiplied by.

X.weight                            float8
X.scale_weight or X.weight_scale    one number, or one a row
X.scale_input or X.input_scale      for products of float8, which are not taken here
scaled_fp8                          marks such a file
X.comfy_quant                       JSON that names the format, in newer files
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch

from calotype.checkpoint.entries import Entry
from calotype.checkpoint.files import Weights

SCALES = ("scale_weight", "weight_scale")
NEEDLESS = ("scale_input", "input_scale", "scaled_fp8")
QUANT = "comfy_quant"
KNOWN_QUANTS = ("float8_e4m3fn", "float8_e5m2")
MAX_JSON = 4096  # bytes
FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float32)


def with_scales(weights: Weights) -> Weights:
    """The weights with their scales where they belong, and not beside them any more.

    What is scaled otherwise (in blocks, with several scales, what is no float) is left as it is, to be refused by name.
    """
    scales = {key: entry for key, entry in weights.items() if key.rpartition(".")[2] in (*SCALES, QUANT)}
    if not scales and not any(key.rpartition(".")[2] in NEEDLESS for key in weights):
        return weights
    entries: dict[str, Entry] = {key: entry for key, entry in weights.items() if key.rpartition(".")[2] not in NEEDLESS}
    for key, scale in scales.items():
        owner, _, name = key.rpartition(".")
        weight = weights.get(f"{owner}.weight")
        if name == QUANT:
            if _format(weights, key) in KNOWN_QUANTS:
                del entries[key]
        elif weight is not None and _fits(weight, scale) and _of_known_format(weights, owner):
            del entries[key]
            entries[f"{owner}.weight"] = weight._replace(dtype=torch.float32, format=weight.stored, scale=scale)
    return Weights(weights.source, entries)


def _fits(weight: Entry, scale: Entry) -> bool:
    """Whether a scale is one number, or one a row."""
    count = math.prod(scale.shape)
    rows = weight.shape[:1]
    plain = weight.dtype in FLOATS and weight.strides is None and scale.dtype in FLOATS and scale.strides is None
    return plain and (count == 1 or (len(weight.shape) > 1 and scale.shape in (rows, (*rows, 1))))


def _of_known_format(weights: Mapping[str, Entry], owner: str) -> bool:
    key = f"{owner}.{QUANT}"
    return key not in weights or _format(weights, key) in KNOWN_QUANTS


def _format(weights: Mapping[str, Entry], key: str) -> str | None:
    """What a note beside a weight calls its format; None where that cannot be read."""
    entry = weights[key]
    if entry.dtype != torch.uint8 or not 0 < entry.stop - entry.start <= MAX_JSON:
        return None
    with entry.file.path.open("rb") as file:
        file.seek(entry.start)
        text = file.read(entry.stop - entry.start)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    named = content.get("format") if isinstance(content, dict) else None  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    return named if isinstance(named, str) else None
