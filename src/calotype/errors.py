"""Everything Calotype raises on purpose.

    CalotypeError
    ├── RequestError          a request's value that cannot be honoured: names field, value, what is allowed
    ├── LoadError             a source that does not become a model
    │   ├── SourceNotFound        nothing at that path, or no such model on the hub
    │   ├── DamagedFile           a known format, cut short, inconsistent or hostile
    │   ├── UnsafeFile            a pickle that asks for more than tensors
    │   ├── UnknownModel          a sound file that no family claims
    │   ├── UnsupportedModel      recognised by name, but not run (yet)
    │   ├── NotAModel             an adapter, ControlNet or other attachment given as a model
    │   ├── MissingPart           a model without one of its parts
    │   ├── MissingKeys           a part without some of its tensors
    │   ├── UnexpectedKeys        a part with tensors that its layout does not have
    │   └── WrongShape            a tensor whose shape the layout does not allow
    ├── GenerationError       a job that started and could not be finished
    │   ├── NonFiniteImage        the network or the decoder returned NaN or infinity
    │   └── OutOfMemory           the job does not fit, with as little of the model in memory as possible
    ├── OutputError           a result that could not be written where it was asked for
    └── MetadataError         a picture without readable Calotype metadata

Every message says what came, what was wanted, and what to do. `assert` is kept for our own invariants. `args` holds
what the constructor took, so that errors can be pickled from one process to another.
"""

from __future__ import annotations

import os
from collections.abc import Sequence


class CalotypeError(Exception):
    """Base of all errors that Calotype raises on purpose."""


class RequestError(CalotypeError, ValueError):
    """A request's value that cannot be honoured.

    `field` is the name of the field, `value` what came, `allowed` what would have been accepted.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(field, value, allowed)
        self.field = field
        self.value = value
        self.allowed = allowed

    def under(self, prefix: str) -> RequestError:
        """The same of a field of a part: high_res[0].steps."""
        return RequestError(prefix + self.field, self.value, self.allowed)

    def __str__(self) -> str:
        shown = repr(os.fspath(self.value) if isinstance(self.value, os.PathLike) else self.value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownMemberType]
        if len(shown) > 80:
            # Both ends: a path's tells the file.
            shown = f"{shown[:40]} ... {shown[-30:]} ({len(shown):,} characters)"
        return f"{self.field}: got {shown}; allowed: {self.allowed}"


class LoadError(CalotypeError):
    """A source that does not become a model."""


class SourceNotFound(LoadError, FileNotFoundError):
    """Nothing at that path, or no such model on the hub."""


class DamagedFile(LoadError):
    """A file of a known format that is cut short, inconsistent or hostile."""


class UnsafeFile(LoadError):
    """A pickle that names what no checkpoint needs, and might run code in a program that trusts it."""


class UnknownModel(LoadError):
    """A sound file that no family claims."""


class UnsupportedModel(LoadError):
    """A model that is recognised by name, but that Calotype does not run (yet)."""


class NotAModel(LoadError):
    """An adapter, ControlNet or other attachment given where a model is wanted."""


class MissingPart(LoadError):
    """A model without one of the parts that it needs."""


def _listed(keys: Sequence[str]) -> str:
    shown = ", ".join(repr(key) for key in keys[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"


def _counted(keys: Sequence[str]) -> str:
    return f"{len(keys)} tensor" + ("" if len(keys) == 1 else "s")


def _are(keys: Sequence[str]) -> str:
    return "is" if len(keys) == 1 else "are"


class MissingKeys(LoadError):
    """A part without some of the tensors that its layout has; `spare` are those in their place, as far as known."""

    def __init__(self, source: str, layout: str, keys: Sequence[str], spare: Sequence[str] = ()) -> None:
        super().__init__(source, layout, keys, spare)
        self.source = source
        self.layout = layout
        self.keys = tuple(keys)
        self.spare = tuple(spare)

    @property
    def what(self) -> str:
        """What is missing, without the source and the advice."""
        text = f"{_counted(self.keys)} of the layout {self.layout} {_are(self.keys)} missing: {_listed(self.keys)}"
        if self.spare:
            text += f"; {len(self.spare)} that it does not have {_are(self.spare)} there: {_listed(self.spare)}"
        return text

    def __str__(self) -> str:
        if len(self.spare) >= len(self.keys):
            do = f"if they were renamed, rename them back; `calotype info {self.source}` says what the file is"
        else:
            do = f"the file is incomplete: fetch it again, or run `calotype info {self.source}` to see what it is"
        return f"{self.source}: {self.what}; {do}"


class UnexpectedKeys(LoadError):
    """A part with tensors that its layout does not have; `advice` says what to do instead of looking at the file."""

    def __init__(self, source: str, layout: str, keys: Sequence[str], advice: str = "") -> None:
        super().__init__(source, layout, keys, advice)
        self.advice = advice
        self.source = source
        self.layout = layout
        self.keys = tuple(keys)

    @property
    def what(self) -> str:
        """What does not belong, without the source and the advice."""
        do = "does" if len(self.keys) == 1 else "do"
        return f"{_counted(self.keys)} {do} not belong to the layout {self.layout}: {_listed(self.keys)}"

    def __str__(self) -> str:
        return (
            f"{self.source}: {self.what}; {self.advice or f'run `calotype info {self.source}` to see what the file is'}"
        )


class WrongShape(LoadError):
    """A tensor whose shape its layout does not allow."""


class GenerationError(CalotypeError):
    """A job that started and could not be finished."""


class NonFiniteImage(GenerationError):
    """The network or the decoder returned NaN or infinity: never shown as a black picture."""


class OutOfMemory(GenerationError, MemoryError):
    """A job that does not fit, with as little of the model in memory as possible. The next, smaller one may."""


class OutputError(CalotypeError, OSError):
    """A result that could not be written where it was asked for."""


class MetadataError(CalotypeError):
    """A picture without readable Calotype metadata."""
