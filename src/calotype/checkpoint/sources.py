"""What a user points at: a file, a shard, a folder of one part, a pipeline folder, a folder of loose files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calotype.checkpoint.files import PICKLE_SUFFIXES, Weights, looks_saved_by_torch, open_tensors
from calotype.checkpoint.layouts import Settings
from calotype.errors import DamagedFile, SourceNotFound

INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER = "scheduler_config.json"
CARD = "calotype.json"  # a model folder's own variant and defaults
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.(safetensors|bin)")
SHARDS_INDEX = re.compile(r".*\.index(\.\w+)?\.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
UNUSED = frozenset({"safety_checker", "feature_extractor", "image_encoder"})  # parts of pipelines that do not draw
# The files of a folder with a config.json, and all that may take their place: shards, variants.
SAFETENSORS = (("diffusion_pytorch_model.safetensors", "model.safetensors"), "*.safetensors")
PICKLES = (("diffusion_pytorch_model.bin", "pytorch_model.bin"), "*pytorch_model*.bin")
OWN_NAMES = frozenset(name.split(".")[0] for names, _ in (SAFETENSORS, PICKLES) for name in names)
# What a trainer leaves beside a model.
TRAINING = re.compile(r"(optimizer|scheduler|training_args|rng_state|random_states|scaler)(_\d+)?\.\w+")
# Weights as they were trained, and what stands before them where it lies beside: their moving average (Hunyuan-DiT).
AVERAGED = {"pytorch_model_module.pt": "pytorch_model_ema.pt"}
MAX_JSON = 16 * 2**20


@dataclass(frozen=True)
class Group:
    """Tensors that belong together, and what their folder says of them. `place` is where their tokenizer may lie."""

    weights: Weights
    settings: Settings
    place: Path
    component: str = ""  # its name in the pipeline folder


@dataclass
class Source:
    """One source, opened: headers read, no tensor yet."""

    name: str
    layout: str  # file, folder, diffusers
    groups: list[Group] = field(default_factory=list[Group])
    tokenizers: list[Path] = field(default_factory=list[Path])
    pipeline: str | None = None
    scheduler: Settings | None = None
    card: Settings = field(default_factory=dict[str, Any])
    index: Settings = field(default_factory=dict[str, Any])  # model_index.json


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; DamagedFile where it is none."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise DamagedFile(f"{path}: too large for a configuration")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise DamagedFile(f"{path}: a JSON object was expected")
    return content  # pyright: ignore[reportUnknownVariableType]


def has_config(name: str) -> bool:
    """Whether a file of this name goes with a config.json beside it: one that diffusers or transformers chose, or
    diffusers' with a word behind it."""
    stem = name.split(".", 1)[0].split("-", 1)[0]
    return stem in OWN_NAMES or stem.startswith("diffusion_pytorch_model_")


def open_source(path: Path, name: str | None = None) -> Source:
    """Open what lies at a path. `name` is what the user called it.

    Raises SourceNotFound, DamagedFile, UnsafeFile or UnsupportedModel.
    """
    name = name or str(path)
    if path.is_dir():
        return _folder(path, name)
    if not path.exists():
        raise SourceNotFound(f"{path}: no such file or folder")
    if path.name == INDEX:
        return _folder(path.parent, name)
    source = Source(name, "file")
    if path.name in TOKENIZER_FILES or path.name == "merges.txt":
        source.tokenizers.append(path.parent)
    elif path.name == SCHEDULER:
        source.scheduler = read_json(path)
    else:
        beside = path.parent / CONFIG
        settings = read_json(beside) if has_config(path.name) and beside.is_file() else {}
        source.groups.append(_group(name, _shards(path), settings, path.parent))
    return source


def _group(name: str, files: Iterable[Path], settings: Settings, place: Path, component: str = "") -> Group:
    weights = Weights.of(name, files)
    if not settings and "config" in weights.metadata:
        # What conversion from a folder left of its config.json.
        try:
            settings = json.loads(weights.metadata["config"])
        except ValueError:
            raise DamagedFile(f"{name}: the configuration in its header is not valid JSON") from None
        if not isinstance(settings, dict):
            raise DamagedFile(f"{name}: the configuration in its header is not a JSON object")
    return Group(weights, settings, place, component)


def _shards(path: Path) -> list[Path]:
    """The files of a sharded part, from one of them or from its index; a file that stands alone gives itself."""
    if SHARDS_INDEX.fullmatch(path.name):
        return _indexed(path)
    match = SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    stem, total, suffix = match[1], int(match[3]), match[4]
    files = [path.with_name(f"{stem}-{number + 1:05}-of-{total:05}.{suffix}") for number in range(min(total, 10_000))]
    for file in files:
        if not file.is_file():
            raise SourceNotFound(f"{file}: this shard is missing; {path.name} is one of {total}, which belong together")
    return files


def _indexed(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map", {})
    if not isinstance(names, dict) or not names:
        raise DamagedFile(f"{index}: it has no weight_map")
    files: list[Path] = []
    for name in sorted({str(value) for value in names.values()}):  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        if Path(name).name != name:
            raise DamagedFile(f"{index}: {name[:80]!r} is not the name of a file beside it")
        if not (index.parent / name).is_file():
            raise SourceNotFound(f"{index.parent / name}: this shard is missing, though {index.name} lists it")
        files.append(index.parent / name)
    present = {key for file in files for key in open_tensors(file).entries}
    lost = sorted(set(names) - present)  # pyright: ignore[reportUnknownArgumentType]
    if lost:
        raise DamagedFile(f"{index}: {len(lost)} tensors that it lists are in none of its shards, first {lost[0]!r}")
    return files


def _folder(path: Path, name: str) -> Source:
    if (path / INDEX).is_file():
        return _pipeline(path, name)
    source = Source(name, "folder")
    _take(source, path, name)
    if not (path / CONFIG).is_file():
        # Loose original files, with whole parts in folders beside them.
        for folder in sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")):
            _take(source, folder, f"{name}/{folder.name}" if name else folder.name)
    if (path / CARD).is_file():
        source.card = read_json(path / CARD)
    if not source.groups and not source.tokenizers and source.scheduler is None:
        raise SourceNotFound(f"{path}: no file of tensors in this folder (.safetensors, .gguf, .ckpt, .pt, .pth, .bin)")
    return source


def _take(source: Source, folder: Path, name: str, component: str = "") -> None:
    """Add what one folder holds itself: a part with its config.json, a tokenizer, a scheduler, loose files."""
    if (folder / SCHEDULER).is_file():
        source.scheduler = read_json(folder / SCHEDULER)
    config = folder / CONFIG
    files = _part_files(folder) if config.is_file() else []
    if files:
        source.groups.append(_group(name, files, read_json(config), folder, component))
        return
    if any((folder / file).is_file() for file in TOKENIZER_FILES):
        source.tokenizers.append(folder)
        return
    seen: set[Path] = set()
    sound = sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")])
    for file in sound or _loose_pickles(folder):
        if file not in seen:
            shards = _shards(file)
            seen.update(shards)
            source.groups.append(_group(f"{name}/{file.name}", shards, {}, folder, component))


def _loose_pickles(folder: Path) -> list[Path]:
    """What torch.save wrote into a folder without safetensors, told by content: much else is called .bin."""
    found: list[Path] = []
    for file in sorted(file for file in folder.iterdir() if file.suffix.lower() in PICKLE_SUFFIXES and file.is_file()):
        with file.open("rb") as opened:
            if looks_saved_by_torch(opened.read(9)) and not TRAINING.fullmatch(file.name):
                found.append(file)
    averages = {file.name for file in found} & set(AVERAGED.values())
    return [file for file in found if AVERAGED.get(file.name) not in averages]


def _part_files(folder: Path) -> list[Path]:
    """The weights of a part's folder: safetensors before pickles, one file before shards, variants last."""
    return _files_as(folder, *SAFETENSORS) or _files_as(folder, *PICKLES)


def _files_as(folder: Path, names: tuple[str, ...], pattern: str) -> list[Path]:
    """The weights of a folder in one format."""
    plain = next((folder / name for name in names if (folder / name).is_file()), None)
    if plain is not None:
        return [plain]
    indexes = sorted(folder.glob(f"{pattern}.index*.json"), key=lambda index: (index.name.count("."), index.name))
    if indexes:
        return _indexed(indexes[0])
    every = sorted(folder.glob(pattern))
    if not every:
        return []
    shards = _shards(every[0])
    if set(shards) != set(every):
        raise DamagedFile(f"{folder}: it holds several versions ({', '.join(f.name for f in every[:3])}): name one")
    return shards


def _pipeline(path: Path, name: str) -> Source:
    """A diffusers folder: the parts that its index names, as far as they are there."""
    index = read_json(path / INDEX)
    source = Source(name, "diffusers", pipeline=str(index.get("_class_name")), index=index)
    for component, value in index.items():
        named = isinstance(value, list) and len(value) == 2 and value[1] is not None  # pyright: ignore[reportUnknownArgumentType]
        folder = path / component
        if not named or component in UNUSED or Path(component).name != component or not folder.is_dir():
            continue
        _take(source, folder, f"{name}/{component}", component)
    if (path / CARD).is_file():
        source.card = read_json(path / CARD)
    return source
