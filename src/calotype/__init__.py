"""Calotype: an image-synthesis studio.

    model = calotype.load()
    picture = model.generate("a red fox in the snow", seed=7)

Importing it costs milliseconds: torch comes in with the first model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calotype.errors import (
        CalotypeError,
        DamagedFile,
        GenerationError,
        LoadError,
        MetadataError,
        MissingKeys,
        MissingPart,
        NonFiniteImage,
        NotAModel,
        OutOfMemory,
        OutputError,
        RequestError,
        SourceNotFound,
        UnexpectedKeys,
        UnknownModel,
        UnsafeFile,
        UnsupportedModel,
        WrongShape,
    )
    from calotype.generate import Lowered, Model, Picture, Progress
    from calotype.image import read_metadata, save
    from calotype.loading import Description, describe, load
    from calotype.request import Control, HighRes, ImagePrompt, Lora, Region, Request, Size
    from calotype.version import VERSION as __version__

__all__ = [
    "CalotypeError",
    "Control",
    "DamagedFile",
    "Description",
    "GenerationError",
    "HighRes",
    "ImagePrompt",
    "LoadError",
    "Lora",
    "Lowered",
    "MetadataError",
    "MissingKeys",
    "MissingPart",
    "Model",
    "NonFiniteImage",
    "NotAModel",
    "OutOfMemory",
    "OutputError",
    "Picture",
    "Progress",
    "Region",
    "Request",
    "RequestError",
    "Size",
    "SourceNotFound",
    "UnexpectedKeys",
    "UnknownModel",
    "UnsafeFile",
    "UnsupportedModel",
    "WrongShape",
    "__version__",
    "describe",
    "load",
    "read_metadata",
    "save",
]

_HOMES = {
    "Description": "loading",
    "HighRes": "request",
    "ImagePrompt": "request",
    "Lora": "request",
    "Lowered": "generate",
    "Model": "generate",
    "Picture": "generate",
    "Progress": "generate",
    "Region": "request",
    "Control": "request",
    "Request": "request",
    "Size": "request",
    "describe": "loading",
    "load": "loading",
    "read_metadata": "image",
    "save": "image",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("calotype.version").VERSION
    if name not in __all__:
        raise AttributeError(f"module 'calotype' has no attribute {name!r}")
    value = getattr(import_module(f"calotype.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value
