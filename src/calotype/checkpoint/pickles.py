"""Files of torch.save: .ckpt, .pt, .pth, .bin. Only tensors come out of them, and no code of theirs ever runs.

    zip        since torch 1.6: data.pkl, an object whose tensors name their storages, and a stored file data/N for each
    legacy     before: pickles of a magic number, a version, the machine, the object and the storages' names; then each
               storage, 8 bytes of length and its data

The pickles are read by `inert.Machine`, for which names are only names. Tensors become places within the file, as those
of safetensors are: nothing is copied before it is asked for. Layouts: torch/serialization.py, `_save` and
`_legacy_save`; the functions that rebuild tensors: torch/_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from calotype.checkpoint.archives import Member, members
from calotype.checkpoint.entries import KEY, MAX_HEADER, MAX_SIDE, MAX_TENSORS, NAMES, Entry, Shape, TensorFile
from calotype.checkpoint.inert import Function, Machine, Name, Thing
from calotype.errors import DamagedFile, SourceNotFound, UnsupportedModel

SUFFIXES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl"})
MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001
MAX_AXES = 16
MAX_DEPTH = 32  # of dicts within dicts
MAX_VISITS = 100_000  # of their items: one dict may lie within others many times
MAX_NAME = 512
MAX_TEXT = 256  # characters of text that is kept
WRAPPERS = ("state_dict", "model_state_dict", "module", "model_state", "model")
TRAINING = frozenset({"optimizer", "optimizer_states", "optimizer_state_dict", "lr_schedulers", "callbacks", "loops"})
PARAMETER_DICT = Name("torch.nn.modules.container", "ParameterDict")
STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "Untyped": torch.uint8,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "QInt8": torch.qint8,
    "QInt32": torch.qint32,
    "QUInt8": torch.quint8,
}
FLOATS_8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
OTHERS = (torch.complex32, torch.uint16, torch.uint32, torch.uint64)
TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*STORAGES.values(), *FLOATS_8, *OTHERS)}
UNSUPPORTED = (  # ways to store a tensor that are not a place in the file
    "device_tensor_from_cpu_tensor",
    "device_tensor_from_numpy",
    "meta_tensor_no_storage",
    "nested_tensor",
    "qtensor",
    "sparse_tensor",
    "wrapper_subclass",
    "xla_tensor",
)
STORAGE_MODULES = frozenset({"torch", "torch.cuda", "torch.storage"})


class Storage(NamedTuple):
    """`size` bytes from byte `skip` on of what is stored under `key`."""

    key: str
    dtype: torch.dtype
    skip: int
    size: int


class View(NamedTuple):
    """A tensor: where in a storage it begins, and how it steps through it, in elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: Shape
    strides: Shape


def looks_saved_by_torch(start: bytes) -> bool:
    """Whether a file with these first bytes is a zip archive or a pickle."""
    return start.startswith(b"PK\x03\x04") or (
        start[:1] == b"\x80" and start[1:2] in {b"\x02", b"\x03", b"\x04", b"\x05"}
    )


class TorchFile(TensorFile):
    """The tensors of one file of torch.save, by name; the values of its top level that are short texts are `metadata`.

    Of a training checkpoint only the model counts, which is the dict called state_dict, module, model_state or model.
    Other dicts within dicts are joined by dots. What is no tensor is left aside.

    Raises SourceNotFound, UnsafeFile (a pickle that names what no checkpoint needs), UnsupportedModel (another known
    form) or DamagedFile.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if not path.is_file():
            raise SourceNotFound(f"{path}: no such file")
        self._size = path.stat().st_size
        self._storages: dict[str, Storage] = {}  # as the pickle declares them
        with path.open("rb") as file:
            start = file.read(512)
        if start[257:262] == b"ustar":
            raise UnsupportedModel(
                f"{path}: the tar format that torch wrote until 2017; load and save it again with a newer torch"
            )
        if start.startswith(b"PK"):
            content, places = self._zipped()
        else:
            content, places = self._legacy()
        self._collect(content, places)

    # ---- the two formats

    def _zipped(self) -> tuple[object, dict[str, Member]]:
        found = members(self.path)
        if any(name.split("/")[1:2] == ["code"] for name in found):
            raise UnsupportedModel(
                f"{self.path}: a TorchScript archive, which holds a program; save its state_dict() instead"
            )
        for name, member in found.items():
            if not member.stored:
                raise DamagedFile(f"{self.path}: {name[:80]!r} is compressed; torch.save stores its files as they are")
        roots = [
            name.removesuffix("/data.pkl") for name in found if name.count("/") == 1 and name.endswith("/data.pkl")
        ]
        if len(roots) != 1:
            raise DamagedFile(f"{self.path}: a zip archive without its one data.pkl; torch.save did not write it")
        root = roots[0]
        if self._member(found, f"{root}/byteorder", b"little").strip() != b"little":
            raise UnsupportedModel(f"{self.path}: written on a big-endian machine; save it again as safetensors")
        machine = self._machine(self._member(found, f"{root}/data.pkl"))
        content = machine.run()
        places: dict[str, Member] = {}
        for key, storage in self._storages.items():
            place = found.get(f"{root}/data/{key}")
            # A storage may end with a part of an element.
            if place is None or not 0 <= place.size - storage.size < storage.dtype.itemsize:
                held = "is not there" if place is None else f"has {place.size:,} bytes, not {storage.size:,}"
                raise DamagedFile(f"{self.path}: the storage data/{key} {held}; fetch the file again")
            places[key] = place
        return content, places

    def _member(self, found: Mapping[str, Member], name: str, default: bytes = b"") -> bytes:
        if name not in found:
            return default
        start, size, _ = found[name]
        if size > MAX_HEADER:
            raise DamagedFile(f"{self.path}: {name} of {size:,} bytes; at most {MAX_HEADER:,} are accepted")
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(size)

    def _legacy(self) -> tuple[object, dict[str, Member]]:
        with self.path.open("rb") as file:
            machine = self._machine(file.read(MAX_HEADER))
        if machine.run() != MAGIC or machine.run() != VERSION:
            raise DamagedFile(f"{self.path}: a pickle, but not one that torch.save wrote")
        written_by = machine.run()
        if not isinstance(written_by, Thing) or written_by.items.get("little_endian") is not True:
            raise UnsupportedModel(f"{self.path}: written on a big-endian machine; save it again as safetensors")
        content, keys = machine.run(), machine.run()
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise DamagedFile(f"{self.path}: its list of storages is broken")
        if len(keys) != len(self._storages) or set(keys) != set(self._storages):
            raise DamagedFile(f"{self.path}: its list of storages is not that of its tensors")
        places: dict[str, Member] = {}
        at = machine.at
        with self.path.open("rb") as file:
            for key in keys:
                storage = self._storages[key]
                file.seek(at)
                counted = int.from_bytes(file.read(8), "little") * storage.dtype.itemsize
                if at + 8 + storage.size > self._size:
                    raise DamagedFile(
                        f"{self.path}: cut short: {self._size:,} bytes are present, {at + 8 + storage.size:,} or more "
                        "were expected; fetch it again"
                    )
                if counted != storage.size:
                    raise DamagedFile(f"{self.path}: a storage of {counted:,} bytes, where {storage.size:,} belong")
                places[key] = Member(at + 8, storage.size, True)
                at += 8 + storage.size
        return content, places

    # ---- what the pickle asks for

    def _machine(self, data: bytes) -> Machine:
        functions: dict[Name, Function] = {
            Name("torch._utils", "_rebuild_tensor"): self._view,
            Name("torch._utils", "_rebuild_tensor_v2"): self._view,
            Name("torch._utils", "_rebuild_tensor_v3"): self._typed_view,
            Name("torch._utils", "_rebuild_parameter"): self._first,
            Name("torch._utils", "_rebuild_parameter_with_state"): self._first,
            Name("torch._tensor", "_rebuild_from_type_v2"): self._subclass,
            Name("torch", "Size"): self._shape,
        }
        functions |= {Name("torch._utils", f"_rebuild_{kind}"): self._unsupported(kind) for kind in UNSUPPORTED}
        return Machine(str(self.path), data, functions, _constant, self._stored)

    def _stored(self, identity: object) -> object:
        """A storage, from what stands for it in the pickle; or the class of a module, whose source may follow it."""
        if type(identity) is not tuple or len(identity) > 8:
            raise DamagedFile(f"{self.path}: its pickle asks for an object that is no storage")
        match identity:
            case ("module", Name() as kind, *_):
                return kind
            case ("storage", torch.dtype() as dtype, str() as key, _, int() as count, *rest):
                pass
            case _:
                raise DamagedFile(f"{self.path}: its pickle asks for an object that is no storage")
        if not 0 <= count < 2**48 or len(key) > 64 or not key.isalnum() or len(self._storages) >= MAX_TENSORS:
            raise DamagedFile(f"{self.path}: its pickle declares an impossible storage")
        item = dtype.itemsize
        whole = Storage(key, dtype, 0, count * item)
        known = self._storages.setdefault(key, whole)
        if known.size != whole.size:
            raise DamagedFile(f"{self.path}: its pickle gives the storage {key} two sizes")
        match rest:
            case [] | [None]:
                return whole
            case [(str(), int() as skip, int() as length)] if 0 <= skip <= skip + length <= count:
                return Storage(key, dtype, skip * item, length * item)
            case _:
                raise DamagedFile(f"{self.path}: its pickle declares an impossible part of the storage {key}")

    def _view(self, *given: object) -> View:
        """`given`: storage, offset, shape, strides, and what training needs; then the marks of a lazy tensor."""
        match given:
            case (Storage() as storage, int() as offset, tuple() as shape, tuple() as strides, *rest):
                return self._checked(storage, storage.dtype, offset, shape, strides, rest[2:])
            case _:
                raise DamagedFile(f"{self.path}: its pickle describes a tensor as torch.save does not")

    def _typed_view(self, *given: object) -> View:
        match given:
            case (
                Storage() as storage,
                int() as offset,
                tuple() as shape,
                tuple() as strides,
                _,
                _,
                torch.dtype() as dtype,
                *rest,
            ):
                return self._checked(storage, dtype, offset, shape, strides, rest)
            case _:
                raise DamagedFile(f"{self.path}: its pickle describes a tensor as torch.save does not")

    def _checked(
        self,
        storage: Storage,
        dtype: torch.dtype,
        offset: int,
        shape: tuple[object, ...],
        strides: tuple[object, ...],
        marks: list[object],
    ) -> View:
        if not len(shape) == len(strides) <= MAX_AXES or type(offset) is not int:
            raise DamagedFile(f"{self.path}: its pickle describes a tensor of an impossible shape")
        sides = [side for side in shape if type(side) is int and 0 <= side <= MAX_SIDE]
        steps = [step for step in strides if type(step) is int and 0 <= step < 2**48]
        if not len(sides) == len(steps) == len(shape):
            raise DamagedFile(f"{self.path}: its pickle describes a tensor of an impossible shape")
        reach = 1 + sum((side - 1) * step for side, step in zip(sides, steps, strict=True)) if 0 not in sides else 0
        if offset < 0 or (reach and (offset + reach) * dtype.itemsize > storage.size):
            raise DamagedFile(
                f"{self.path}: a tensor of shape {tuple(sides)} does not fit into its storage of {storage.size:,} bytes"
            )
        if any(mark.pairs if isinstance(mark, Thing) else mark is not None for mark in marks):
            raise UnsupportedModel(f"{self.path}: tensors that are negated or conjugated when read are not supported")
        return View(storage, dtype, offset, tuple(sides), tuple(steps))

    def _first(self, *given: object) -> object:
        """A parameter is its tensor."""
        if not given or not isinstance(given[0], View):
            raise DamagedFile(f"{self.path}: its pickle describes a parameter as torch.save does not")
        return given[0]

    def _subclass(self, *given: object) -> object:
        """A tensor with attributes of its own, which do not count; its kind must be a plain one."""
        match given:
            case (Name() as function, Name() as kind, tuple() as arguments, _):
                pass
            case _:
                raise DamagedFile(f"{self.path}: its pickle describes a tensor as torch.save does not")
        rebuild = {"_rebuild_tensor_v2": self._view, "_rebuild_tensor_v3": self._typed_view}.get(function.name)
        if rebuild is None or kind not in (Name("torch", "Tensor"), Name("torch.nn.parameter", "Parameter")):
            raise UnsupportedModel(f"{self.path}: tensors of the kind {str(kind)[:120]} are not supported")
        return rebuild(*arguments)

    def _shape(self, *given: object) -> object:
        if len(given) != 1 or not isinstance(given[0], tuple):
            raise DamagedFile(f"{self.path}: its pickle describes a shape as torch.save does not")
        return given[0]

    def _unsupported(self, name: str) -> Function:
        def refuse(*_: object) -> object:
            kind = name.replace("_", " ")
            raise UnsupportedModel(f"{self.path}: it holds a {kind}; save it with plain tensors in main memory")

        return refuse

    # ---- names and places

    def _collect(self, content: object, places: Mapping[str, Member]) -> None:
        if not isinstance(content, Thing):
            kind = "one tensor" if isinstance(content, View) else f"a {type(content).__name__}"
            raise UnsupportedModel(f"{self.path}: it holds {kind} without a name; a dict of tensors is expected")
        for key, value in content.items.items():
            # "config" in a header is our own convention, which others' files do not know.
            if (
                isinstance(value, str)
                and max(len(value), len(key)) <= MAX_TEXT
                and KEY.fullmatch(key)
                and key != "config"
            ):
                self.metadata[key] = value
        for key, view in self._named(_model(content)):
            if key in self.entries:
                raise DamagedFile(f"{self.path}: it has two tensors called {key[:80]!r}")
            self.entries[key] = self._entry(key, view, places[view.storage.key])
        if not self.entries:
            raise UnsupportedModel(f"{self.path}: a pickle without named tensors; a dict of tensors is expected")

    def _named(self, top: Thing) -> Iterator[tuple[str, View]]:
        """Tensors of dicts within dicts, by their names joined with dots."""
        pending = [("", iter(top.items.items()))]
        for _ in range(MAX_VISITS):
            if not pending:
                return
            prefix, items = pending[-1]
            key, value = next(items, (None, None))
            if key is None:
                pending.pop()
            elif not isinstance(value, (View, Thing)) or (not prefix and key in TRAINING):
                continue
            elif len(key) > MAX_NAME:
                raise DamagedFile(f"{self.path}: {key[:80]!r}... is too long for the name of a tensor")
            elif isinstance(value, View):
                yield prefix + key, value
            elif len(pending) >= MAX_DEPTH:
                raise DamagedFile(f"{self.path}: dicts within dicts, more than {MAX_DEPTH} deep")
            else:
                pending.append((f"{prefix}{key}.", iter(_held(value).items())))
        raise DamagedFile(f"{self.path}: its dicts have more than {MAX_VISITS:,} items")

    def _entry(self, key: str, view: View, place: Member) -> Entry:
        # Textual inversion calls its one vector "*".
        if not KEY.fullmatch(f"{key[:-1]}x" if key.endswith(".*") else key):
            raise DamagedFile(f"{self.path}: {key[:80]!r} is not an acceptable name of a tensor")
        if view.dtype not in NAMES:
            raise UnsupportedModel(f"{self.path}: {key!r} has the type {view.dtype}, which is not supported")
        size = math.prod(view.shape) * view.dtype.itemsize
        if size > self._size:
            raise DamagedFile(f"{self.path}: {key!r} repeats its values to {size:,} bytes, more than the file has")
        start = place.start + view.storage.skip + (view.offset * view.dtype.itemsize if size else 0)
        return Entry(self, key, view.dtype, view.shape, start, start + size, None if _packed(view) else view.strides)


def _constant(name: Name) -> torch.dtype | None:
    """The type of a tensor, or of a storage, that a name stands for."""
    if name.module in STORAGE_MODULES and name.name.endswith("Storage"):
        return STORAGES.get(name.name.removesuffix("Storage"))
    return TYPES.get(name.name) if name.module == "torch" else None


def _held(value: Thing) -> dict[str, object]:
    """The items of a dict; of a ParameterDict its parameters, which pickle keeps in its state."""
    if value.kind != PARAMETER_DICT:
        return value.items
    parameters = value.state.items.get("_parameters") if isinstance(value.state, Thing) else None
    return parameters.items if isinstance(parameters, Thing) else {}


def _model(top: Thing) -> Thing:
    """The dict of the model's tensors within a training checkpoint; the whole where there is none."""
    for name in WRAPPERS:
        inner = top.items.get(name)
        if isinstance(inner, Thing) and any(isinstance(value, View) for value in inner.items.values()):
            return inner
    return top


def _packed(view: View) -> bool:
    """Whether the values lie one after the other in the order of their indices."""
    step = 1
    for side, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if side != 1 and stride != step:
            return 0 in view.shape
        step *= side
    return True
