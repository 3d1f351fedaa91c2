"""Key maps as tables: patterned, invertible, strict.

A table says how *their* tensors (a file's) become *ours* (a network's state dict), and back. Patterns name indices:

    Same("double_blocks.{i}.img_mlp.0.*", "joint.{i}.image.mlp_in.*")

`{i}` in ours is any number, and may be shifted or reversed in theirs (`{i+1}`, `{last-i}` with last given to the
table); `*` is the parameter's own name, weight or bias. What a table lists must be there, what it does not list must
not, and saving what was loaded gives the same tensors, bit for bit.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from calotype.checkpoint.files import Shape, Weights
from calotype.errors import MissingKeys, UnexpectedKeys, UnsupportedModel, WrongShape
from calotype.nn.packed import Piece


class Span(NamedTuple):
    """`height` rows at `theirs` in one of their tensors lie at `ours` in ours."""

    theirs: int
    ours: int
    height: int


class Place(NamedTuple):
    """The shape of one of theirs, and where its rows go; `transposed` theirs has the axes of ours exchanged."""

    shape: Shape
    spans: tuple[Span, ...]
    transposed: bool = False


class Source(NamedTuple):
    """One of their tensors and its place."""

    key: str
    shape: Shape
    spans: tuple[Span, ...]
    transposed: bool


class Bound(NamedTuple):
    """One of our tensors and all that it is made of."""

    ours: str
    shape: Shape
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Rule(ABC):
    """How one of ours is made of theirs."""

    @property
    @abstractmethod
    def names(self) -> tuple[tuple[str, ...], str]:
        """Patterns of theirs, and of ours."""

    @abstractmethod
    def places(self, shape: Shape) -> tuple[Place, ...]:
        """Theirs for one of ours of this shape, in the order of `names`."""


@dataclass(frozen=True)
class Same(Rule):
    """The same tensor under another name."""

    theirs: str
    ours: str

    @property
    def names(self) -> tuple[tuple[str, ...], str]:
        return (self.theirs,), self.ours

    def places(self, shape: Shape) -> tuple[Place, ...]:
        return (Place(shape, (_whole(shape),)),)


@dataclass(frozen=True)
class Pointwise(Same):
    """Theirs is a convolution of size 1, ours the linear layer that it is: weights differ by two trailing axes."""

    def places(self, shape: Shape) -> tuple[Place, ...]:
        return (Place((*shape, 1, 1) if len(shape) == 2 else shape, (_whole(shape),)),)


@dataclass(frozen=True)
class Transposed(Same):
    """Theirs is a matrix that stands on the right of its product, ours a linear layer's."""

    def places(self, shape: Shape) -> tuple[Place, ...]:
        return (Place(shape[::-1], (_whole(shape),), transposed=True),)


@dataclass(frozen=True)
class Sliced(Same):
    """Ours is one of `parts` equal blocks of rows of theirs, number `part` from 0."""

    part: int
    parts: int

    def places(self, shape: Shape) -> tuple[Place, ...]:
        return (Place((self.parts * shape[0], *shape[1:]), (Span(self.part * shape[0], 0, shape[0]),)),)


@dataclass(frozen=True)
class Swapped(Same):
    """Theirs has the two halves of ours in the other order."""

    def places(self, shape: Shape) -> tuple[Place, ...]:
        half = shape[0] // 2
        return (Place(shape, (Span(0, half, half), Span(half, 0, half))),)


@dataclass(frozen=True)
class Stacked(Rule):
    """Ours is several of theirs on top of one another, `rows` of each."""

    theirs: tuple[str, ...]
    ours: str
    rows: tuple[int, ...]

    @property
    def names(self) -> tuple[tuple[str, ...], str]:
        return self.theirs, self.ours

    def places(self, shape: Shape) -> tuple[Place, ...]:
        starts = [sum(self.rows[:k]) for k in range(len(self.rows))]
        return tuple(
            Place((rows, *shape[1:]), (Span(0, start, rows),)) for start, rows in zip(starts, self.rows, strict=True)
        )


@dataclass(frozen=True)
class Extra:
    """Tensors that files may also have, and that nothing here needs; `*` is any text.

    `shape` is that of the known files, for manifests; None where no manifest has them.
    """

    theirs: str
    shape: Shape | None = None


@dataclass(frozen=True)
class Alias:
    """A second name of a listed tensor: used where the first is absent, a harmless copy where it is present."""

    other: str
    theirs: str


def _whole(shape: Shape) -> Span:
    return Span(0, 0, shape[0] if shape else 1)


@dataclass(frozen=True)
class Table:
    """The layout of one part for one configuration.

    `name` is for messages: flux/original. `numbers` are the constants that patterns mention.
    """

    name: str
    rules: tuple[Rule, ...]
    extras: tuple[Extra, ...] = ()
    aliases: tuple[Alias, ...] = ()
    numbers: Mapping[str, int] = field(default_factory=dict[str, int])

    def bind(self, ours: Mapping[str, Shape]) -> Binding:
        """The table applied to a network's own keys and shapes, each of which exactly one rule must cover."""
        patterns = [(_pattern(rule.names[1]), rule) for rule in self.rules]
        bound: list[Bound] = []
        for key, shape in ours.items():
            found = [(match, rule) for pattern, rule in patterns if (match := pattern.fullmatch(key))]
            assert len(found) == 1, f"{self.name}: {len(found)} rules for {key}"
            match, rule = found[0]
            sources = tuple(
                Source(_filled(name, match.groupdict(), self.numbers), *place)
                for name, place in zip(rule.names[0], rule.places(shape), strict=True)
            )
            bound.append(Bound(key, shape, sources))
        return Binding(self, tuple(bound))


class Binding:
    """A table bound to one network: what files must hold, and how to read and write them."""

    def __init__(self, table: Table, bound: tuple[Bound, ...]) -> None:
        self.table = table
        self.bound = bound
        self.shapes: dict[str, Shape] = {source.key: source.shape for item in bound for source in item.sources}
        self._made_of: dict[str, list[tuple[Bound, Source]]] = {}
        for item in bound:
            for source in item.sources:
                self._made_of.setdefault(source.key, []).append((item, source))

    def manifest(self, extras: Sequence[str] = ()) -> list[tuple[str, Shape]]:
        """Their keys and shapes; `extras` names those of the optional tensors that a known file has."""
        optional = {extra.theirs: extra.shape for extra in self.table.extras if extra.shape is not None}
        optional |= {alias.other: self.shapes.get(alias.theirs) for alias in self.table.aliases}
        listed = list(self.shapes.items())
        for name in extras:
            shape = optional[name]
            assert shape is not None
            listed.append((name, shape))
        return listed

    def resolve(self, weights: Weights) -> dict[str, str]:
        """Which key of the file each of the layout's tensors has.

        Raises MissingKeys, UnexpectedKeys or WrongShape, naming what is wrong.
        """
        other = {key: key for key in self.shapes}
        spare = set(weights) - set(self.shapes)
        for alias in self.table.aliases:
            pattern = _pattern(alias.other)
            for key in sorted(spare):
                if match := pattern.fullmatch(key):
                    spare.discard(key)
                    target = _filled(alias.theirs, match.groupdict(), self.table.numbers)
                    if target not in weights:
                        other[target] = key
        for extra in self.table.extras:
            pattern = re.compile(re.escape(extra.theirs).replace(r"\*", ".*"))
            spare -= {key for key in spare if pattern.fullmatch(key)}
        missing = [key for key, found in other.items() if found not in weights]
        if missing:
            raise MissingKeys(weights.source, self.table.name, missing, sorted(spare))
        if spare:
            raise UnexpectedKeys(weights.source, self.table.name, sorted(spare))
        for key, shape in self.shapes.items():
            if weights[other[key]].shape != shape:
                raise WrongShape(
                    f"{weights.source}: {other[key]!r} is {weights[other[key]].shape}, but the layout "
                    f"{self.table.name} has {shape} there; the file is not of one model, or not of this family"
                )
        return other

    def load(
        self,
        weights: Weights,
        dtype: torch.dtype | None = None,
        *,
        mapped: bool = True,
        without: Collection[str] = (),
    ) -> dict[str, Tensor]:
        """Our state dict from their files, `without` some of ours; `dtype` None keeps what is stored.

        With `mapped`, tensors that are stored as they are needed are views of the file. All others are read, piece by
        piece, into their place.
        """
        return dict(self.tensors(weights, dtype, mapped=mapped, without=without))

    def tensors(
        self,
        weights: Weights,
        dtype: torch.dtype | None = None,
        *,
        mapped: bool = True,
        without: Collection[str] = (),
    ) -> Iterator[tuple[str, Tensor]]:
        """As `load`, one at a time. The whole layout is checked before the first."""
        names = self.resolve(weights)
        wanted = (item for item in self.bound if item.ours not in without)
        return ((item.ours, put_together(item, weights, names, dtype, mapped=mapped)) for item in wanted)

    def places(
        self, weights: Weights, dtype: torch.dtype | None = None, *, without: Collection[str] = ()
    ) -> Iterator[tuple[str, Tensor | Callable[[], Tensor]]]:
        """As `load`, but what is no view of the file is not read yet: it comes as what reads it."""
        names = self.resolve(weights)
        for item in (item for item in self.bound if item.ours not in without):
            if is_view(item, weights, names, dtype):
                yield item.ours, put_together(item, weights, names, dtype, mapped=True)
            else:
                yield item.ours, partial(put_together, item, weights, names, dtype, mapped=False)

    def pieces(self, item: Bound, weights: Weights, names: Mapping[str, str], *, mapped: bool) -> list[Piece] | None:
        """One of ours as the pieces of files that it is made of, from its first row on; None where it is not so made.

        `names` are those that `resolve` gave.
        """
        found: list[tuple[int, Piece]] = []
        for source in item.sources:
            for span in source.spans:
                piece = None
                if not source.transposed and item.shape:
                    piece = weights.piece(names[source.key], span.theirs, span.height, mapped=mapped)
                if piece is None:
                    return None
                found.append((span.ours, piece))
        return [piece for _, piece in sorted(found, key=lambda one: one[0])]

    def save(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Their tensors from our state dict, one at a time: the inverse of `load`."""
        for key in self.shapes:
            yield key, self.theirs(key, state.__getitem__)

    def owners(self, key: str) -> tuple[str, ...]:
        """Which of ours one of their tensors goes into."""
        return tuple(item.ours for item, _ in self._made_of[key])

    def theirs(self, key: str, ours: Callable[[str], Tensor]) -> Tensor:
        """One of their tensors, made of ours."""
        pieces = self._made_of[key]
        first, source = pieces[0]
        if len(pieces) == 1 and source.spans == (_whole(first.shape),):
            value = ours(first.ours)
            return (value.t() if source.transposed else value).reshape(source.shape)
        value = ours(first.ours)
        out = torch.empty((source.shape[0], *value.shape[1:]), dtype=value.dtype)
        for item, source in pieces:
            value = ours(item.ours)
            for span in source.spans:
                out[span.theirs : span.theirs + span.height] = value[span.ours : span.ours + span.height]
        return out.reshape(source.shape)


def is_view(item: Bound, weights: Weights, names: Mapping[str, str], dtype: torch.dtype | None) -> bool:
    """Whether one of ours lies in the file just as it is wanted."""
    first, *more = item.sources
    entry = weights[names[first.key]]
    one = not (more or first.transposed) and len(first.spans) == 1
    return one and entry.format is None and entry.dtype == (dtype or entry.dtype)


def put_together(
    item: Bound, weights: Weights, names: Mapping[str, str], dtype: torch.dtype | None, *, mapped: bool
) -> Tensor:
    """One of ours from theirs; `names` are their keys in the file."""
    stored = {weights[names[source.key]].dtype for source in item.sources}
    if dtype is None and len(stored) > 1:
        kinds = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in stored))
        raise UnsupportedModel(
            f"{weights.source}: {names[item.sources[0].key]!r} and those that go with it are stored in different types "
            f"({kinds}); ask for a dtype"
        )
    target = dtype or next(iter(stored))
    first = item.sources[0]
    if first.transposed:
        return weights.mapped(names[first.key]).t().to(target, copy=True).contiguous()
    if mapped and is_view(item, weights, names, dtype):
        span, theirs = first.spans[0], weights.mapped(names[first.key])
        return (theirs[span.theirs : span.theirs + span.height] if item.shape else theirs).reshape(item.shape)
    out = torch.empty(item.shape, dtype=target)
    for source in item.sources:
        for span in source.spans:
            place = out[span.ours : span.ours + span.height] if item.shape else out
            weights.read(names[source.key], place, row=span.theirs)
    return out


PLACEHOLDER = re.compile(r"\{([^}]*)\}|\*")


@cache
def _pattern(name: str) -> re.Pattern[str]:
    """A name of a rule as a regular expression: `{i}` is a number, `*` the last component."""
    out, end = "", 0
    for match in PLACEHOLDER.finditer(name):
        out += re.escape(name[end : match.start()])
        out += f"(?P<{match[1]}>0|[1-9][0-9]*)" if match[1] else r"(?P<leaf>weight|bias)"
        end = match.end()
    return re.compile(out + re.escape(name[end:]))


def _filled(name: str, found: Mapping[str, str], numbers: Mapping[str, int]) -> str:
    """A name with its placeholders replaced: sums and differences of what was found and of constants."""

    def value(match: re.Match[str]) -> str:
        if not match[1]:
            return found["leaf"]
        total = 0
        for sign, term in re.findall(r"([+-]?)(\w+)", match[1]):
            number = int(term) if term.isdigit() else int(found[term]) if term in found else numbers[term]
            total += -number if sign == "-" else number
        return str(total)

    return PLACEHOLDER.sub(value, name)
