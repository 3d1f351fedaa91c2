"""Annotators that others trained, through libraries that run them: asked for by name, imported when first used.

Weights come from the hub, through those libraries, and are let go after each picture.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from PIL import Image

from calotype.errors import RequestError, SourceNotFound


def require(module: str, extra: str) -> Any:
    """The library. Raises RequestError where it is missing or does not work, with what to do."""
    remedy = f'`pip install "calotype[{extra}]"` brings it'
    if importlib.util.find_spec(module) is None:
        raise RequestError("kind", module, f"kinds that need no {module}, as it is not installed; {remedy}")
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision for another torch raises the second
        why = f"as it does not start ({error})"
        raise RequestError(
            "kind", module, f"kinds that need no {module}, {why}; {remedy}, with the torchvision that is for your torch"
        ) from error


def detect(name: str, picture: Image.Image, resolution: int, weights: str, device: str, **options: Any) -> Image.Image:
    """What a detector of controlnet-aux draws, RGB, of the picture's size."""
    detector = getattr(require("controlnet_aux", "annotators"), name)
    try:
        model = detector.from_pretrained(weights).to(device)
    except OSError as error:
        raise _not_found(weights, error) from error
    drawn: Image.Image = model(picture, detect_resolution=resolution, image_resolution=resolution, **options)
    return drawn.convert("RGB").resize(picture.size, Image.Resampling.BICUBIC)


def depth(picture: Image.Image, weights: str, device: str) -> Image.Image:
    """What a depth-estimation model of transformers sees, the nearest white, the farthest black."""
    transformers = require("transformers", "depth")
    import torch
    import torch.nn.functional as F

    try:
        processor = transformers.AutoImageProcessor.from_pretrained(weights)
        model = transformers.AutoModelForDepthEstimation.from_pretrained(weights).to(device).eval()
    except OSError as error:
        raise _not_found(weights, error) from error
    with torch.inference_mode():
        inputs = processor(images=picture, return_tensors="pt").to(device)
        nearness = model(**inputs).predicted_depth.float().cpu()[None]
        nearness = F.interpolate(nearness, (picture.height, picture.width), mode="bicubic", align_corners=False)[0, 0]
        low, high = nearness.min(), nearness.max()
        levels = (nearness - low) / (high - low).clamp_min(1e-6) * 255
    return Image.fromarray(levels.round().byte().numpy()).convert("RGB")


def _not_found(weights: str, error: OSError) -> SourceNotFound:
    return SourceNotFound(f"{weights}: an annotator's weights could not be fetched or read ({error}); name others")
