"""IP-Adapters with their image encoders, loaded for a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from calotype.checkpoint.detect import detect
from calotype.checkpoint.files import Weights
from calotype.checkpoint.hub import fetch_folder, fetch_small, file_on_hub
from calotype.checkpoint.image_prompts import IMAGE_ADAPTER, VISION, found_in
from calotype.checkpoint.layouts import Found
from calotype.checkpoint.sources import open_source, read_json
from calotype.control.image_prompts import ImageReader
from calotype.errors import (
    LoadError,
    MissingPart,
    RequestError,
    SourceNotFound,
    UnknownModel,
    UnsupportedModel,
    WrongShape,
)
from calotype.families import FAMILIES
from calotype.families.family import Family
from calotype.families.model import FamilyModel
from calotype.families.unets import UNetModel, adapter_misfit
from calotype.loading.attached import attached
from calotype.loading.gather import locate_part
from calotype.nn.image_adapter import ImageAdapter, ImageAdapterConfig, Places, ProjectionConfig
from calotype.nn.unet import UNet, UNetConfig
from calotype.nn.vision import VisionConfig, VisionEncoder

FOLDER = "image_encoder"
# The published encoders: by what the base adapters take of them, and by what the others take.
BY_EMBEDDING = {768: "ViT-L/14", 1024: "ViT-H/14", 1280: "ViT-bigG/14"}
BY_STATES = {1024: "ViT-L/14", 1280: "ViT-H/14", 1664: "ViT-bigG/14"}


class ReaderLoader:
    """What loads image prompts' networks for one model, each once; `dtype` None keeps what they are stored in."""

    def __init__(self, model: FamilyModel[Any], dtype: torch.dtype | None) -> None:
        self._model = model
        self._dtype = dtype
        self._readers: dict[tuple[str, str | None], ImageReader] = {}
        self._encoders: dict[tuple[Path, ...], VisionEncoder] = {}

    def __call__(self, source: str, encoder: str | None) -> ImageReader:
        """The IP-Adapter at a path, or on the hub, with the encoder given or found beside it.

        Raises WrongShape, naming the families that it fits, where it was trained for another; MissingPart without an
        encoder; RequestError where the model is of a family without IP-Adapters, or runs with OpenVINO.
        """
        if (source, encoder) not in self._readers:
            self._readers[source, encoder] = self._load(source, encoder)
        return self._readers[source, encoder]

    def _load(self, source: str, encoder: str | None) -> ImageReader:
        model = self._model
        if not isinstance(model, UNetModel):
            raise RequestError("image_prompts", source, f"none: IP-Adapters of {model.family} do not run here yet")
        if not isinstance(model.unet, UNet):
            raise RequestError("image_prompts", source, "none with the backend openvino: load the model with torch")
        found, place = _adapter(source)
        config: ImageAdapterConfig = found.config()
        misfit = adapter_misfit(config, model.unet.config)
        if misfit is not None:
            fits = " and ".join(family.title for family in fitting(config)) or "no family here"
            raise WrongShape(f"{source}: an IP-Adapter for {fits}: {misfit}; give one trained for {model.family}")
        seen = _given(encoder, config) if encoder is not None else _beside(source, place, config)
        files = tuple(path.resolve() for path in seen.weights.files)
        if files not in self._encoders:
            network = attached(seen, seen.config(), model, self._dtype)
            assert isinstance(network, VisionEncoder)
            self._encoders[files] = network
        adapter = attached(found, config, model, self._dtype)
        assert isinstance(adapter, ImageAdapter)
        return ImageReader(adapter=adapter, encoder=self._encoders[files], places=Places.of(model.unet.config))


def fitting(config: ImageAdapterConfig) -> list[Family]:
    """The families whose published models an IP-Adapter goes with."""

    def fits(family: Family) -> bool:
        parts = [part for item in family.manifests for part in item.parts if part.part in family.backbone.parts]
        return any(isinstance(p.config, UNetConfig) and adapter_misfit(config, p.config) is None for p in parts)

    return [family for family in FAMILIES if fits(family)]


def adapter_in(weights: Weights) -> Found[ImageAdapterConfig] | None:
    """The IP-Adapter that a file holds; None for one that does not run here."""
    return found_in(weights, {}, IMAGE_ADAPTER)


def _adapter(source: str) -> tuple[Found[ImageAdapterConfig], Path]:
    """The adapter of a file, or the one in a folder, and the folder that it lies in."""
    opened = open_source(locate_part(source), source)
    adapters = [(found, group.place) for group in opened.groups if (found := adapter_in(group.weights)) is not None]
    if len(adapters) == 1:
        return adapters[0]
    if adapters:
        raise LoadError(f"{source}: {len(adapters)} IP-Adapters; name the file of one")
    kinds = [detect(group.weights, (), (), {}).attachment for group in opened.groups]
    kind = next((kind for kind in kinds if kind is not None), None)
    if kind is not None and kind.kind == "ip_adapter":
        raise UnsupportedModel(f"{source}: {kind.title}, which does not run here yet")
    what = "no IP-Adapter" if kind is None else f"{kind.title}, and no IP-Adapter"
    raise UnknownModel(f"{source}: {what}; give an IP-Adapter of Stable Diffusion 1.x, SDXL or Kolors")


def _given(source: str, config: ImageAdapterConfig) -> Found[VisionConfig]:
    found = _encoder(locate_part(source), source)
    if found is None:
        raise UnknownModel(f"{source}: no image encoder of CLIP with a projection; {_wanted(config)}")
    if not config.sees(found.config()):
        raise WrongShape(f"{source}: an image encoder that this IP-Adapter was not trained with; {_wanted(config)}")
    return found


def _encoder(path: Path, name: str) -> Found[VisionConfig] | None:
    for group in open_source(path, name).groups:
        found = found_in(group.weights, group.settings, VISION)
        if found is not None:
            return found
    return None


def _beside(source: str, place: Path, config: ImageAdapterConfig) -> Found[VisionConfig]:
    """The encoder beside an adapter's file, which the hub is asked for where the adapter came from there."""
    on_hub = None if Path(source).expanduser().exists() else file_on_hub(source)
    if on_hub is not None:
        name, file = on_hub
        for folder in _hub_folders(PurePosixPath(file).parent):
            settings = fetch_small(name, f"{folder}/config.json")
            if settings is not None and _described(read_json(settings), config):
                fetch_folder(name, folder)
                break
    tried = list(dict.fromkeys((place / FOLDER, place.parent / FOLDER, place.parent / "models" / FOLDER)))
    for folder in tried:
        if not folder.is_dir():
            continue
        try:
            found = _encoder(folder, str(folder))
        except SourceNotFound:  # an empty folder
            continue
        if found is not None and config.sees(found.config()):
            return found
    looked = " and ".join(str(folder) for folder in tried)
    raise MissingPart(f"{source}: no image encoder that it was trained with in {looked}; {_wanted(config)}")


def _hub_folders(beside: PurePosixPath) -> Iterator[str]:
    """Where an encoder may be in a hub model, from the place of an adapter: those of `_beside`."""
    for folder in (beside / FOLDER, beside.parent / FOLDER, beside.parent / "models" / FOLDER):
        yield str(folder)


def _described(settings: dict[str, Any], config: ImageAdapterConfig) -> bool:
    """Whether the encoder of a config.json is one that an adapter takes."""
    projection = isinstance(config.form, ProjectionConfig)
    return settings.get("projection_dim" if projection else "hidden_size") == config.seen_width


def _wanted(config: ImageAdapterConfig) -> str:
    known = BY_EMBEDDING if isinstance(config.form, ProjectionConfig) else BY_STATES
    name = known.get(config.seen_width)
    what = f"CLIP {name}" if name else f"CLIP with answers of width {config.seen_width}"
    return f"give {what} with its projection as the image prompt's encoder: a folder or a file of transformers' layout"
