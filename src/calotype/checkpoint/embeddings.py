"""Textual inversion files (Gal et al. 2022): vectors that stand in a prompt for a word, in every form they come in.

    A1111 .pt       string_to_param.* (m d), as the pickle reader flattens it; string_to_token.* beside it counts not
    A1111           emb_params (m d)
    SDXL            clip_l (m 768) and clip_g (m 1280), or one of them; diffusers' trainer: text_encoders_0 and _1
    SD3, FLUX.1     t5xxl or t5 (m 4096) beside these, or alone: known by name, but not read
    diffusers       the word itself, as "<cat-toy>", with (d) or (m d); one word a file

The width says which encoder they are for: 768 CLIP ViT-L, 1024 OpenCLIP ViT-H (Stable Diffusion 2), 1280 OpenCLIP bigG,
4096 T5 XXL.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from calotype.checkpoint.files import Shape, Weights
from calotype.errors import DamagedFile, LoadError, UnsupportedModel

T5_WIDTH = 4096
WIDTHS = (768, 1024, 1280, T5_WIDTH)
NAMED = frozenset({"emb_params", "clip_l", "clip_g", "t5", "t5xxl", "text_encoders_0", "text_encoders_1"})
MAX_VECTORS = 75  # what a prompt has room for; a matrix with more rows is something else
PARAMETERS, TOKENS = "string_to_param.", "string_to_token."
LAYERS = frozenset({"weight", "bias", "scale", "gamma", "beta", "alpha"})  # names of layers' tensors, and no words


def embedding_keys(shapes: Mapping[str, Shape]) -> dict[int, str] | None:
    """For each width the key of its vectors, where these tensors are an embedding and nothing else; otherwise None."""
    keys = [key for key in shapes if not key.startswith(TOKENS)]
    if not 1 <= len(keys) <= 3:
        return None
    known = all(key in NAMED or key.startswith(PARAMETERS) for key in keys)
    if not known and (len(keys) > 1 or not _word(keys[0])):
        return None
    found: dict[int, str] = {}
    for key in keys:
        shape = shapes[key]
        rows = shape[0] if len(shape) == 2 else 1
        if len(shape) not in (1, 2) or shape[-1] not in WIDTHS or shape[-1] in found or not 1 <= rows <= MAX_VECTORS:
            return None
        found[shape[-1]] = key
    return found


def _word(key: str) -> bool:
    """Whether a key may be a word of a prompt: a tensor of a network has dots in its name, or a layer's name."""
    return key not in LAYERS and ("." not in key or (key.startswith("<") and key.endswith(">")))


def read_embedding(weights: Weights) -> dict[int, Tensor]:
    """The vectors, float32 (m d), by their width d. Their word is the file's name, which is the caller's.

    Raises LoadError for what is no embedding, UnsupportedModel for one with vectors for T5, DamagedFile for values that
    are not finite numbers.
    """
    keys = embedding_keys(weights.shapes)
    if keys is None:
        listed = ", ".join(f"{key!r} {shape}" for key, shape in list(weights.shapes.items())[:3]) or "nothing"
        raise LoadError(
            f"{weights.source}: no textual inversion embedding: it holds {listed}; wanted is one tensor of up to "
            f"{MAX_VECTORS} vectors, or one for each text encoder, of width {', '.join(map(str, WIDTHS))}; run "
            f"`calotype info {weights.source}` to see what it is"
        )
    if T5_WIDTH in keys:
        raise UnsupportedModel(
            f"{weights.source}: an embedding with vectors for T5 ({keys[T5_WIDTH]!r}), which are not read here: T5 "
            "reads a prompt as it stands; take that tensor out of the file to use those for CLIP"
        )
    found: dict[int, Tensor] = {}
    for width, key in keys.items():
        vectors = torch.atleast_2d(weights.mapped(key)).to(torch.float32, copy=True)
        if not weights[key].dtype.is_floating_point or not vectors.isfinite().all():
            raise DamagedFile(f"{weights.source}: {key!r} has values that are no finite numbers; fetch the file again")
        found[width] = vectors
    return found
