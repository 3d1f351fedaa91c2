"""What the user pointed at, opened and recognised; shared by loading, describing and converting."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from calotype.checkpoint.detect import Detected, detect, side
from calotype.checkpoint.files import Weights
from calotype.checkpoint.hub import fetch_file, fetch_model, file_on_hub, looks_like_hub_id
from calotype.checkpoint.layouts import Found, Part, Settings
from calotype.checkpoint.sources import Group, Source, open_source
from calotype.errors import LoadError, SourceNotFound, UnexpectedKeys
from calotype.families import COMING, FAMILIES
from calotype.families.family import Clues, Family, Role

BUILTIN = Path(__file__).parents[1] / "builtin"
PARTS: tuple[Part[Any], ...] = tuple(
    dict.fromkeys(part for family in FAMILIES for role in family.roles for part in role.parts)
)
FOLDERS = frozenset(
    name for family in FAMILIES for role in family.roles for name in (role.folder, role.tokenizer) if name
) | {"scheduler"}


@dataclass(frozen=True)
class Item:
    """One group of tensors and what it turned out to be."""

    group: Group
    detected: Detected


@dataclass(frozen=True)
class Opened:
    """All sources, opened."""

    sources: tuple[Source, ...]
    items: tuple[Item, ...]

    @property
    def name(self) -> str:
        return ", ".join(source.name for source in self.sources)

    @property
    def scheduler(self) -> Settings | None:
        return next((source.scheduler for source in self.sources if source.scheduler is not None), None)

    @property
    def card(self) -> Settings:
        return next((source.card for source in self.sources if source.card), {})

    def clues(self, backbone: Found[Any]) -> Clues:
        """What speaks for a variant beside this backbone's configuration."""
        rest = next((item.detected.rest for item in self.items if backbone in item.detected.found), ())
        return Clues(
            markers=frozenset(rest),
            settings=backbone.settings,
            scheduler=self.scheduler,
            name=_name(backbone),
        )


def _name(backbone: Found[Any]) -> str:
    """What its publisher called a backbone: its file's name, or that of the model whose folder it is in."""
    parts = [part for part in Path(backbone.weights.source).parts if part not in FOLDERS]
    return parts[-1] if parts else ""


def locate(source: str | os.PathLike[str]) -> Path:
    """The local path of a source: itself, or the hub model of that name. A path that exists never asks the hub."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if isinstance(source, str) and looks_like_hub_id(source):
        return fetch_model(source, FOLDERS)
    raise SourceNotFound(f"{source}: no such file or folder")


def locate_part(source: str) -> Path:
    """As `locate`, for what goes with a model: also one file, or one folder, of a hub model, as org/name/path."""
    if not Path(source).expanduser().exists() and file_on_hub(source) is not None:
        return fetch_file(source)
    return locate(source)


def gather(given: Sequence[str | os.PathLike[str]]) -> Opened:
    """Open and recognise sources; none means the built-in model. Reads headers only."""
    if not given and not BUILTIN.is_dir():
        raise SourceNotFound(f"{BUILTIN}: the built-in model is not part of this installation; name a model to load")
    sources = [open_source(locate(source), str(source)) for source in given] or [open_source(BUILTIN, "built-in")]
    groups = _joined_halves([group for source in sources for group in source.groups])
    items = tuple(Item(group, detect(group.weights, PARTS, COMING, group.settings)) for group in groups)
    return Opened(tuple(sources), items)


def _joined_halves(groups: list[Group]) -> list[Group]:
    """The tiny autoencoder's two original files are one part."""
    halves = {side(group.weights): group for group in groups}
    if not {"encoder", "decoder"} <= set(halves):
        return groups
    encoder, decoder = halves["encoder"], halves["decoder"]
    both = {
        f"{name}.{key}": entry
        for name, half in (("encoder", encoder), ("decoder", decoder))
        for key, entry in half.weights.items()
    }
    joined = replace(encoder, weights=Weights(f"{encoder.weights.source} and {decoder.weights.source}", both))
    return [joined if group is encoder else group for group in groups if group is not decoder]


@dataclass(frozen=True)
class Chosen:
    """A part that plays a role in the model to be."""

    role: Role
    found: Found[Any]
    group: Group

    @property
    def config(self) -> Any:  # noqa: ANN401
        return self.found.config(self.role.settings_of(self.found.part))


def choose(family: Family, opened: Opened) -> dict[str, Chosen]:
    """The parts that play each role of a family; those that are not there are left out.

    A part given by itself stands before the same part of a whole model: so one gives another autoencoder. Raises
    LoadError for a role given twice otherwise, UnexpectedKeys for tensors outside all parts.
    """
    chosen: dict[str, Chosen] = {}
    held = {id(item): _companions(item, opened) for item in opened.items}
    of: dict[str, Item] = {}
    for item in opened.items:
        rest = [key for key in item.detected.rest if not any(fnmatchcase(key, p) for p in family.harmless)]
        if item.detected.found and rest:
            raise UnexpectedKeys(item.group.weights.source, family.name, rest)
        for found in item.detected.found:
            role = family.role(found, item.group.component)
            if role is None:
                continue
            if role.name in chosen:
                earlier = held[id(of[role.name])]
                if (earlier == 1) == (held[id(item)] == 1):
                    first, second = chosen[role.name].found.weights.source, found.weights.source
                    raise LoadError(
                        f"the {role.name} is given twice, by {first} and by {second}; leave one of them out"
                    )
                if earlier == 1:
                    continue
            chosen[role.name] = Chosen(role, found, item.group)
            of[role.name] = item
    return chosen


def _companions(item: Item, opened: Opened) -> int:
    """How many parts the source that an item comes from holds."""
    source = next((source for source in opened.sources if any(group is item.group for group in source.groups)), None)
    groups = [item.group] if source is None else source.groups
    return sum(len(each.detected.found) for each in opened.items if any(each.group is group for group in groups))
