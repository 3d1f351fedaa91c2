"""From one layout to another, tensor by tensor, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calotype.checkpoint.keys import put_together
from calotype.checkpoint.layouts import Found, Layout
from calotype.checkpoint.sources import CARD, INDEX, SCHEDULER, TOKENIZER_FILES
from calotype.checkpoint.text_encoders import CLIP
from calotype.checkpoint.writing import Planned, write
from calotype.errors import NotAModel, OutputError, RequestError, UnknownModel, UnsupportedModel
from calotype.families import FAMILIES
from calotype.families.family import Family
from calotype.loading.gather import Chosen, Opened, choose, gather
from calotype.loading.refusals import takers_of

STYLES = ("original", "diffusers")


def convert(source: str | os.PathLike[str], out: str | os.PathLike[str], layout: str) -> tuple[Path, ...]:
    """Write a model, or one part of one, in another layout; returns the files written.

    `layout` is "original" (the authors' own files) or "diffusers" (a folder a part, with its config.json). One part
    becomes a file (original, where `out` ends in .safetensors) or a folder; several become a folder. Tensors are copied
    one at a time, and no bit of them changes; a projection that a file leaves out for being the identity is written.

    Raises a LoadError for what cannot be read, OutputError where `out` is taken or cannot be written.
    """
    if layout not in STYLES:
        raise RequestError("layout", layout, "one of " + ", ".join(STYLES))
    opened = gather([source])
    family, parts, unknown = _parts(opened)
    target = Path(out)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise OutputError(f"{target}: it exists already; give a name that is not taken")
    single = len(parts) == 1
    as_file = target.suffix == ".safetensors"
    if as_file and (layout == "diffusers" or not single):
        raise RequestError("out", str(out), "a folder: several files are written")
    backbone = parts.get(family.backbone.name)
    variant = family.variant(backbone.config, opened.clues(backbone.found)) if backbone is not None else ""
    written: list[Path] = []
    for role, part in parts.items():
        if layout == "diffusers":
            folder = target if single else target / part.role.folder
            written += _as_folder(part, folder, unknown)
        elif part.found.part.styled(layout) is None:
            written += _as_folder(part, target if single else target / part.role.folder, unknown)
        else:
            name = part.role.file.format(variant) or f"{role}.safetensors"
            written += _as_file(part, layout, target if as_file else target / name, as_file, unknown)
    if not single:
        written += _beside(opened, family, parts, target, layout, variant)
    return tuple(written)


def _parts(opened: Opened) -> tuple[Family, dict[str, Chosen], frozenset[str]]:
    """The family, by its backbone if that is there, its parts, and which of their settings nothing shows.

    A part alone may be several families': an autoencoder's scale then depends on the model that it will go into.
    """
    for item in opened.items:
        if item.detected.attachment is not None:
            raise NotAModel(
                f"{opened.name}: {item.detected.attachment.title}; only models and their parts are converted"
            )
        if item.detected.quantised is not None or item.detected.recognised:
            what = item.detected.quantised or item.detected.recognised[0].known.title
            raise UnsupportedModel(f"{opened.name}: {what} is recognised, but not converted yet")
    found = [piece for item in opened.items for piece in item.detected.found]
    for entry in (entry for piece in found for entry in piece.weights.values() if entry.format is not None):
        what = f"{entry.stored} with scales" if entry.scale is not None else entry.stored
        raise UnsupportedModel(
            f"{opened.name}: {entry.key!r} is stored as {what}, which is not converted; convert the file that it was "
            "made from"
        )
    if not found:
        raise UnknownModel(f"{opened.name}: no known model or part; run `calotype info {opened.name}`")
    with_backbone = [family for family in FAMILIES if any(piece.part in family.backbone.parts for piece in found)]
    if with_backbone:
        return with_backbone[0], choose(with_backbone[0], opened), frozenset()
    families = takers_of(found)
    return (
        families[0],
        choose(families[0], opened),
        frozenset(key for piece in found for key in _unsaid(piece, families)),
    )


def _unsaid(found: Found[Any], families: Sequence[Family]) -> set[str]:
    """The settings of a part that depend on the family, as far as these families have it."""
    roles = [role for family in families if (role := family.taking(found)) is not None]
    settings = [role.settings_of(found.part) for role in roles]
    return {key for one in settings for key in one if any(other.get(key) != one[key] for other in settings)}


def _as_folder(part: Chosen, folder: Path, unknown: frozenset[str]) -> list[Path]:
    """A part as a folder: config.json and one file of weights."""
    known = (part.found.part.styled("diffusers"), part.found.layout, *part.found.part.layouts)
    layout = next(layout for layout in known if layout is not None and layout.settings is not None)
    assert layout.settings is not None
    config, projection = _projected(part)
    settings = _known(layout.settings(config), unknown)
    weights = folder / ("diffusion_pytorch_model.safetensors" if "_class_name" in settings else "model.safetensors")
    metadata = {key: value for key, value in part.found.weights.metadata.items() if key != "config"}
    _write(part, layout, weights, {**metadata, "format": "pt"}, more=projection)
    _write_json(folder / "config.json", {**settings, **part.found.settings})
    return [weights, folder / "config.json"]


def _projected(part: Chosen) -> tuple[Any, dict[str, Tensor]]:
    """A part's configuration, and the projection that other programs ask of its folder though its file has none.

    That is the identity, for the first CLIP of Stable Diffusion 3.
    """
    config = part.config
    if part.found.part is not CLIP or config.projection or not part.role.settings_of(CLIP).get("project"):
        return config, {}
    dtype = next(iter(part.found.weights.values())).dtype
    identity = torch.eye(config.width).to(dtype)
    return replace(config, projection=config.width), {"text_projection.weight": identity}


def _known(settings: dict[str, Any], unknown: frozenset[str]) -> dict[str, Any]:
    """Settings less those that would be a guess: left out, they are the model's that the part is loaded into."""
    return {key: value for key, value in settings.items() if key not in unknown}


def _as_file(part: Chosen, style: str, path: Path, named: bool, unknown: frozenset[str]) -> list[Path]:
    """A part as its original file; what its config.json said goes into the header."""
    layout = part.found.part.styled(style)
    assert layout is not None
    metadata = dict(part.found.weights.metadata)
    own = part.found.layout.settings
    known = part.found.settings or (_known(own(part.config), unknown) if own else {})
    if known:
        metadata["config"] = json.dumps(dict(known))
    if layout.name != "taesd":
        _write(part, layout, path, metadata)
        return [path]
    if named:
        raise RequestError("out", str(path), "a folder: this layout has a file for each side")
    paths = [path.with_name(f"taesd_{side}.safetensors") for side in ("encoder", "decoder")]
    for side, half in zip(("encoder.", "decoder."), paths, strict=True):
        _write(part, layout, half, metadata, only=side)
    return paths


def _write(
    part: Chosen,
    layout: Layout[Any],
    path: Path,
    metadata: Mapping[str, str],
    *,
    only: str = "",
    more: Mapping[str, Tensor] | None = None,
) -> None:
    """One file in the layout, each tensor made when its turn comes.

    `only` keeps one half and takes its name off; `more` are tensors beside those of the part.
    """
    found, more = part.found, more or {}
    beside = [Planned(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in more.items()]
    if layout is found.layout and not only:
        plan = [Planned(key, entry.dtype, entry.shape) for key, entry in found.weights.items()]
        write(path, plan + beside, lambda key: more[key] if key in more else found.weights.mapped(key), metadata)
        return
    config = part.config
    _, theirs = found.bind(config)
    _, wanted = found.part.bind(layout, config)
    names = theirs.resolve(found.weights)
    here = {item.ours: item for item in theirs.bound}
    dtypes = {ours: found.weights[names[item.sources[0].key]].dtype for ours, item in here.items()}
    plan = [
        Planned(key[len(only) :], dtypes[wanted.owners(key)[0]], shape)
        for key, shape in wanted.shapes.items()
        if key.startswith(only)
    ]

    # What one of theirs is cut from, the next one often is too.
    @lru_cache(maxsize=1)
    def ours(key: str) -> Tensor:
        return put_together(here[key], found.weights, names, None, mapped=True)

    write(path, plan + beside, lambda key: more[key] if key in more else wanted.theirs(only + key, ours), metadata)


def _beside(
    opened: Opened, family: Family, parts: Mapping[str, Chosen], out: Path, layout: str, variant: str
) -> list[Path]:
    """What a whole model has beside its weights: tokenizers, scheduler, card, and last the index."""
    written: list[Path] = []
    own = {role.tokenizer for role in family.roles if role.tokenizer}
    for folder in (folder for source in opened.sources for folder in source.tokenizers if folder.name in own):
        for file in sorted(file for file in folder.iterdir() if file.is_file()):
            (out / folder.name).mkdir(parents=True, exist_ok=True)
            written.append(Path(shutil.copyfile(file, out / folder.name / file.name)))
    for part in parts.values():
        if part.role.tokenizer and not (out / part.role.tokenizer).is_dir():
            written += _tokenizer_beside(part.group.place, out / part.role.tokenizer)
    given = opened.scheduler
    scheduler = given if given is not None or layout == "original" else family.scheduler(variant)
    if scheduler is not None:
        written.append(out / "scheduler" / SCHEDULER)
        _write_json(written[-1], scheduler)
    if opened.card:
        written.append(out / CARD)
        _write_json(written[-1], opened.card)
    if layout == "diffusers":
        written.append(out / INDEX)
        _write_json(written[-1], _index(family, parts, out, scheduler or {}))
    return written


def _tokenizer_beside(place: Path, target: Path) -> list[Path]:
    """A tokenizer that lies beside its encoder's weights (Hunyuan-DiT's mT5), copied to a folder of its own."""
    if not any((place / name).is_file() for name in TOKENIZER_FILES):
        return []
    target.mkdir(parents=True, exist_ok=True)
    names = (*TOKENIZER_FILES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
    files = [place / name for name in names if (place / name).is_file()]
    return [Path(shutil.copyfile(file, target / file.name)) for file in files]


def _index(family: Family, parts: Mapping[str, Chosen], out: Path, scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """model_index.json: which class of which library each folder is for."""
    index: dict[str, Any] = {"_class_name": family.pipeline}
    index["scheduler"] = ["diffusers", scheduler.get("_class_name")]
    for part in parts.values():
        settings = json.loads((out / part.role.folder / "config.json").read_text())
        kind = settings.get("_class_name")
        index[part.role.folder] = ["diffusers", kind] if kind else ["transformers", settings["architectures"][0]]
        if part.role.tokenizer and (out / part.role.tokenizer).is_dir():
            file = out / part.role.tokenizer / "tokenizer_config.json"
            named = json.loads(file.read_text()).get("tokenizer_class") if file.is_file() else None
            index[part.role.tokenizer] = ["transformers", named or "PreTrainedTokenizerFast"]
    for role in family.left_out(parts):
        index[role.folder] = index[role.tokenizer] = [None, None]
    return index


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
