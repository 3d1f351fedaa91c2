"""The objects the model learns and the words for them, from `objects.txt` (which explains its columns)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TABLE = Path(__file__).with_name("objects.txt")


@dataclass(frozen=True, kw_only=True)
class Object:
    """One thing that can be drawn. `plural` is empty for what is not counted ("fire", "french fries")."""

    code: str
    name: str
    plural: str
    kind: str
    colours: tuple[str, ...]  # what it has anyway: these words describe the unchanged picture
    synonyms: tuple[str, ...]
    flips: bool
    recolours: bool
    core: bool  # part of the small set


def load_objects(*, large: bool = False) -> tuple[Object, ...]:
    """Every object of the table, or without `large` the common ones only; the order is that of the table."""
    return tuple(thing for thing in _table() if thing.core or large)


def share(*words: str) -> float:
    """A number in 0..1 that is the same for the same words on every machine (Python's `hash` is not)."""
    digest = hashlib.sha256("\x1f".join(words).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@cache
def _table() -> tuple[Object, ...]:
    kind = ""
    objects: list[Object] = []
    for number, text in enumerate(TABLE.read_text("utf-8").splitlines(), 1):
        line = text.strip()
        if line.startswith("["):
            kind = line.strip("[]")
        elif line and not line.startswith("#"):
            objects.append(_parse(line, kind, number))
    taken: dict[str, Object] = {}
    for thing in objects:
        for word in {thing.name, thing.plural, *thing.synonyms} - {""}:
            if taken.setdefault(word, thing) is not thing:
                raise ValueError(f"{TABLE.name}: {word!r} means both {taken[word].name!r} and {thing.name!r}")
    return tuple(objects)


def _parse(line: str, kind: str, number: int) -> Object:
    columns = [column.strip() for column in line.split("|")]
    if not 2 <= len(columns) <= 5:
        raise ValueError(f"{TABLE.name}, line {number}: {len(columns)} columns, wanted 2 to 5: {line!r}")
    code, names, colours, synonyms, marks = columns + [""] * (5 - len(columns))
    name, _, plural = (part.strip() for part in names.partition("/"))
    unknown = set(marks.split()) - {"fixed", "own"}
    if unknown:
        raise ValueError(f"{TABLE.name}, line {number}: unknown marks {sorted(unknown)}")
    return Object(
        code=code.rstrip("+"),
        name=name,
        plural="" if plural == "-" else plural or _regular_plural(name),
        kind=kind,
        colours=tuple(colours.replace(",", " ").split()),
        synonyms=tuple(word.strip() for word in synonyms.split(",") if word.strip()),
        flips="fixed" not in marks.split(),
        recolours="own" not in marks.split(),
        core=not code.endswith("+"),
    )


def _regular_plural(name: str) -> str:
    if name.endswith(("s", "x", "z", "ch", "sh")):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"
