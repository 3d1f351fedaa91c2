"""Pickles read as data. Nothing that a pickle names is ever imported, called or given an attribute.

A pickle is a program for a small stack machine; Python's own runs it with real classes and functions. `Machine` runs
the same program (its opcodes: Lib/pickletools.py of CPython) on values of its own: a class or function is a `Name`, and
what would be constructed is a `Thing`, which keeps the items that a dict would get. Only functions handed in by the
caller, which are ours, run. There is no way out of that to guard.

Names are refused all the same where no checkpoint has a reason for them (`os.system`): such a file is an attack on
other programs, and better reported than read. Steps and sizes are limited, and nothing that a pickle says becomes a
key of a Python dict, so that its reading takes time and memory in proportion to its length.
"""

from __future__ import annotations

import re
import struct
import sys
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from calotype.errors import DamagedFile, UnsafeFile

MAX_STEPS = 500_000  # a tensor takes some 35; Stable Diffusion 1.x with optimizer states 120,000
MAX_LONG = 1024  # bytes of an integer; the state of a random generator has some
MAX_ARGUMENTS = 16
MAX_NAME = 256
MODULE = re.compile(r"[A-Za-z_]\w*(\.\w+)*", re.ASCII)
CLASS = re.compile(r"_*[A-Z]\w*(\._*[A-Z]\w*)*", re.ASCII)
STOP = ord(".")
DICTS = frozenset({"dict", "OrderedDict", "defaultdict", "Counter"})
BUILTINS = frozenset(
    [
        "bool",
        "bytearray",
        "bytes",
        "complex",
        "dict",
        "float",
        "frozenset",
        "int",
        "list",
        "object",
        "range",
        "set",
        "slice",
        "str",
        "tuple",
        "type",
    ]
)
# What checkpoints hold of Python itself beside tensors; third parties' classes are harmless by their form alone.
PLAIN: dict[str, frozenset[str]] = {
    "builtins": BUILTINS,
    "__builtin__": BUILTINS | {"long", "unicode"},
    "collections": frozenset({"OrderedDict", "defaultdict", "Counter", "deque"}),
    "argparse": frozenset({"Namespace"}),
    "datetime": frozenset({"date", "datetime", "time", "timedelta", "timezone"}),
    "decimal": frozenset({"Decimal"}),
    "fractions": frozenset({"Fraction"}),
    "pathlib": frozenset({"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"}),
    "pathlib._local": frozenset({"PosixPath", "WindowsPath"}),
    "types": frozenset({"SimpleNamespace"}),
    "typing": frozenset({"Any", "Dict", "List", "Optional", "Tuple", "Union"}),
    "uuid": frozenset({"UUID"}),
    "copyreg": frozenset({"_reconstructor"}),
    "copy_reg": frozenset({"_reconstructor"}),
    "_codecs": frozenset({"encode"}),
    "numpy": frozenset(
        [
            "dtype",
            "ndarray",
            "bool_",
            "float16",
            "float32",
            "float64",
            "int8",
            "int16",
            "int32",
            "int64",
            "uint8",
            "uint16",
            "uint32",
            "uint64",
        ]
    ),
    "numpy.core.multiarray": frozenset({"_reconstruct", "scalar"}),
    "numpy._core.multiarray": frozenset({"_reconstruct", "scalar"}),
    "torch": frozenset(
        [
            "device",
            "strided",
            "contiguous_format",
            "preserve_format",
            "channels_last",
            "per_tensor_affine",
            "per_channel_affine",
        ]
    ),
    "torch.serialization": frozenset({"_get_layout"}),  # of sparse tensors, which are refused by their own name
}
PYTHON = sys.stdlib_module_names | IMPORT_MAPPING.keys()  # and as Python 2 called them


class Name(NamedTuple):
    """A class or function that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Thing:
    """What a pickle would have constructed by calling `kind` with `arguments`; a dict too."""

    def __init__(self, kind: Name) -> None:
        self.kind = kind
        self.pairs: list[tuple[object, object]] = []
        self.state: object = None

    @cached_property
    def items(self) -> dict[str, object]:
        """What has a text or a number for its key, which becomes text; of several the last counts."""
        return {
            str(key): value
            for key, value in self.pairs
            if isinstance(key, str) or (type(key) is int and abs(key) < 2**63)
        }


DICT = Name("builtins", "dict")
SET = Name("builtins", "set")
Function = Callable[..., object]


class Machine:
    """Runs the pickles in `data`.

    `functions` stand in for what a pickle calls by these names; they get its arguments, of any number and type.
    `constants` stand for names by themselves, `stored` for a persistent id. `what` begins every message.
    Raises UnsafeFile for a name that no checkpoint has a reason to ask for, DamagedFile for all else.
    """

    def __init__(
        self,
        what: str,
        data: bytes,
        functions: Mapping[Name, Function],
        constants: Callable[[Name], object | None],
        stored: Callable[[object], object],
    ) -> None:
        self.at = 0  # the next byte
        self._what = what
        self._data = data
        self._functions = functions
        self._constants = constants
        self._stored = stored
        self._steps = 0
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> object:
        """The object of the pickle that begins at `at`; afterwards `at` is where it ended."""
        self._stack, self._marks, self._memo = [], [], {}
        data, size, operations = self._data, len(self._data), self._OPERATIONS
        try:
            while self._steps < MAX_STEPS and self.at < size:
                opcode = data[self.at]
                self.at += 1
                self._steps += 1
                if opcode == STOP:
                    return self._stack.pop()
                operation = operations.get(opcode)
                if operation is None:
                    raise self._damaged(f"byte {self.at - 1:,} is no opcode that torch.save writes")
                operation(self)
        except IndexError:
            raise self._damaged("it takes more from the stack than there is") from None
        except UnicodeDecodeError:
            raise self._damaged("its text is not UTF-8") from None
        if self.at >= size:
            raise self._damaged("it is cut short; fetch it again")
        raise self._damaged(f"more than {MAX_STEPS:,} steps; a checkpoint needs fewer")

    def _damaged(self, why: str) -> DamagedFile:
        return DamagedFile(f"{self._what}: its pickle is not sound: {why}")

    # ---- reading

    def _take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self._data):
            raise self._damaged("it is cut short; fetch it again")
        out = self._data[self.at : end]
        self.at = end
        return out

    def _text(self, count: int) -> str:
        return self._take(count).decode(errors="surrogatepass")

    def _old_text(self, count: int) -> str | bytes:
        """What Python 2 called text: bytes, where it is none."""
        raw = self._take(count)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw

    def _integer(self, count: int) -> int:
        if count > MAX_LONG:
            raise self._damaged("an integer that is too long")
        return int.from_bytes(self._take(count), "little", signed=True)

    def _float(self) -> float:
        return struct.unpack(">d", self._take(8))[0]

    def _protocol(self) -> None:
        if self._number(1) > 5:
            raise self._damaged("a protocol of the future")

    def _number(self, count: int) -> int:
        return int.from_bytes(self._take(count), "little")

    def _line(self) -> str:
        end = self._data.find(b"\n", self.at, self.at + 1024)
        if end < 0:
            raise self._damaged("a name that does not end")
        return self._take(end + 1 - self.at)[:-1].decode()

    # ---- the stack

    def _popped_mark(self) -> list[Any]:
        """What lies above the last mark, which goes."""
        items = self._stack
        self._stack = self._marks.pop()
        return items

    def _push_marked(self, make: Callable[[list[Any]], object]) -> None:
        items = self._popped_mark()
        self._stack.append(make(items))

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._popped_mark()

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        self._stack.append(items)

    def _append(self, items: Iterable[object]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Thing):
            raise self._damaged("it appends to what is no list")

    def _set(self, items: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, Thing) or len(items) % 2:
            raise self._damaged("it sets an item of what is no dict")
        target.pairs.extend(zip(items[::2], items[1::2], strict=True))

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise self._damaged("it asks for what it did not keep")
        self._stack.append(self._memo[index])

    # ---- names and calls

    def _name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise self._damaged("a name that is no text")
        if max(len(module), len(name)) > MAX_NAME:
            raise self._damaged("a name that is too long")
        asked = Name(module, name)
        known = self._constants(asked)
        if known is None:
            if asked not in self._functions and not _harmless(asked):
                raise UnsafeFile(
                    f"{self._what}: a pickle that asks for {str(asked)[:120]!r}, which no checkpoint needs, and may "
                    "run code in programs that trust it. Nothing of it was run here; do not open it elsewhere, and "
                    "look for a .safetensors file of the same model"
                )
            known = asked
        self._stack.append(known)

    def _call(self, what: object, arguments: object) -> object:
        if not isinstance(what, Name) or type(arguments) is not tuple:
            raise self._damaged("it calls what is no class or function")
        if what in self._functions:
            if len(arguments) > MAX_ARGUMENTS:
                raise self._damaged(f"{what} with {len(arguments):,} arguments")
            return self._functions[what](*arguments)
        made = Thing(what)
        match arguments:
            case ([*_] as items,) if isinstance(items, list) and what.name in DICTS:
                # As Python 2 writes an OrderedDict. The list may be used again and again: its length counts as steps.
                self._steps += len(items)
                made.pairs = [(pair[0], pair[1]) for pair in items if isinstance(pair, list | tuple) and len(pair) == 2]
            case _:
                pass
        return made

    def _reduce(self) -> None:
        arguments, what = self._stack.pop(), self._stack.pop()
        self._stack.append(self._call(what, arguments))

    def _new_with_keywords(self) -> None:
        self._stack.pop()
        self._reduce()

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if not isinstance(target, Thing):
            raise self._damaged("it gives a state to what takes none")
        target.state = state

    def _instance(self) -> None:
        self._name(self._line(), self._line())
        raise self._damaged("it makes an instance as torch.save does not")

    _OPERATIONS: ClassVar[Mapping[int, Callable[[Machine], None]]] = {
        0x80: lambda self: self._protocol(),
        0x95: lambda self: _nothing(self._take(8)),  # FRAME: how much to read ahead
        ord("N"): lambda self: self._stack.append(None),
        0x88: lambda self: self._stack.append(True),
        0x89: lambda self: self._stack.append(False),
        ord("K"): lambda self: self._stack.append(self._number(1)),
        ord("M"): lambda self: self._stack.append(self._number(2)),
        ord("J"): lambda self: self._stack.append(self._integer(4)),
        0x8A: lambda self: self._stack.append(self._integer(self._number(1))),
        0x8B: lambda self: self._stack.append(self._integer(self._number(4))),
        ord("G"): lambda self: self._stack.append(self._float()),
        0x8C: lambda self: self._stack.append(self._text(self._number(1))),
        ord("X"): lambda self: self._stack.append(self._text(self._number(4))),
        0x8D: lambda self: self._stack.append(self._text(self._number(8))),
        ord("U"): lambda self: self._stack.append(self._old_text(self._number(1))),
        ord("T"): lambda self: self._stack.append(self._old_text(self._number(4))),
        ord("C"): lambda self: self._stack.append(self._take(self._number(1))),
        ord("B"): lambda self: self._stack.append(self._take(self._number(4))),
        0x8E: lambda self: self._stack.append(self._take(self._number(8))),
        0x96: lambda self: self._stack.append(self._take(self._number(8))),
        ord("}"): lambda self: self._stack.append(Thing(DICT)),
        ord("]"): lambda self: self._stack.append([]),
        ord(")"): lambda self: self._stack.append(()),
        0x8F: lambda self: self._stack.append(Thing(SET)),
        ord("("): lambda self: self._mark(),
        ord("t"): lambda self: self._push_marked(tuple),
        0x91: lambda self: self._push_marked(lambda _: Thing(SET)),
        0x85: lambda self: self._tuple(1),
        0x86: lambda self: self._tuple(2),
        0x87: lambda self: self._tuple(3),
        ord("a"): lambda self: self._append([self._stack.pop()]),
        ord("e"): lambda self: self._append(self._popped_mark()),
        0x90: lambda self: self._append(self._popped_mark()),
        ord("s"): lambda self: self._set([self._stack.pop(-2), self._stack.pop()]),
        ord("u"): lambda self: self._set(self._popped_mark()),
        ord("0"): lambda self: self._pop(),
        ord("1"): lambda self: _nothing(self._popped_mark()),
        ord("2"): lambda self: self._stack.append(self._stack[-1]),
        ord("q"): lambda self: self._put(self._number(1)),
        ord("r"): lambda self: self._put(self._number(4)),
        0x94: lambda self: self._put(len(self._memo)),
        ord("h"): lambda self: self._get(self._number(1)),
        ord("j"): lambda self: self._get(self._number(4)),
        ord("c"): lambda self: self._name(self._line(), self._line()),
        0x93: lambda self: self._name(self._stack.pop(-2), self._stack.pop()),
        ord("Q"): lambda self: self._stack.append(self._stored(self._stack.pop())),
        ord("R"): lambda self: self._reduce(),
        0x81: lambda self: self._reduce(),  # NEWOBJ
        0x92: lambda self: self._new_with_keywords(),
        ord("b"): lambda self: self._build(),
        ord("i"): lambda self: self._instance(),
    }


def _nothing(_: object) -> None:
    """Lets go of a value."""


def _harmless(asked: Name) -> bool:
    """Whether a checkpoint may name this: plain data of Python, or a class of somebody's, told by its capital."""
    if not MODULE.fullmatch(asked.module):
        return False
    if asked.name in PLAIN.get(asked.module, ()):
        return True
    return asked.module.partition(".")[0] not in PYTHON and CLASS.fullmatch(asked.name) is not None
