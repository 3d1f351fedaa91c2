"""GGUF files written by the gguf library itself: tensors in any of its formats, with sane or random blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calotype.nn.formats import FORMATS

# Where a block has float16 numbers.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
REACH = {"Q4_K": 15 * 63, "Q5_K": 31 * 63, "Q6_K": 32 * 127, "Q2_K": 3 * 15, "Q3_K": 4 * 32, "IQ4_XS": 113 * 32}


def blocks(name: str, count: int, seed: int = 0, spread: float = 0.1) -> NDArray[np.uint8]:
    """Random blocks whose weights are about as large as `spread`."""
    rng = np.random.default_rng(seed)
    made = rng.integers(0, 256, (count, FORMATS[name].bytes), dtype=np.uint8)
    for place in HALVES[name]:
        scale = rng.uniform(0.5, 1, (count, 1)) * spread / REACH.get(name, 127 if name == "Q8_0" else 16)
        made[:, place : place + 2] = scale.astype(np.float16).view(np.uint8)
    return made


def packed(name: str, tensor: Tensor, seed: int = 0) -> NDArray[np.uint8]:
    """A tensor in a format: quantised by the library, or random blocks where it cannot do that."""
    kind = gguf.GGMLQuantizationType[name]
    form = FORMATS[name]
    try:
        made = gguf.quantize(tensor.float().numpy(), kind)
    except NotImplementedError:
        made = blocks(name, tensor.numel() // form.weights, seed)
    return made.view(np.uint8).reshape(*tensor.shape[:-1], tensor.shape[-1] // form.weights * form.bytes)


def widened(name: str, made: NDArray[np.uint8]) -> Tensor:
    """What the library says that these bytes mean, float32."""
    return torch.from_numpy(gguf.dequantize(made, gguf.GGMLQuantizationType[name]).copy())


def write(
    path: Path,
    tensors: Mapping[str, tuple[str, Tensor]],
    architecture: str = "flux",
    *,
    reshaped: bool = False,
) -> dict[str, Tensor]:
    """A file with these tensors, each in its format; returns what they are there, float32.

    With `reshaped`, tensors whose rows are no whole blocks are written in rows of 256, as city96's converter does.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    held: dict[str, Tensor] = {}
    for number, (key, (name, tensor)) in enumerate(tensors.items()):
        shape = tuple(tensor.shape)
        if name in ("F32", "F16"):
            plain = tensor.to(torch.float32 if name == "F32" else torch.float16)
            writer.add_tensor(key, plain.numpy())
            held[key] = plain.float()
            continue
        if reshaped and shape[-1] % FORMATS[name].weights:
            tensor = tensor.reshape(-1, 256)
            writer.add_array(f"comfy.gguf.orig_shape.{key}", list(shape))
        made = packed(name, tensor, seed=number)
        writer.add_tensor(key, made, raw_dtype=gguf.GGMLQuantizationType[name])
        held[key] = widened(name, made).reshape(shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held
