"""Adapters of a model: attached by name, changed in strength, and detached so that nothing of them is left.

A layer's weight is either replaced by one in which all changes are merged (`fused`), or left alone, and what the
changes make of the layer's input is added to its answer (`apart`). Merged weights cost nothing a step; they need the
memory of what they replace. Layers whose weights are kept in fewer bits or come and go by themselves are left alone,
and so are text encoders: two models may have one encoder, and only this one's prompts may meet its adapters.

What comes, changes or goes between jobs takes effect when the next one begins (`apply`): weights are merged once,
however many adapters changed. Whatever the order, a weight is made anew from the one that was loaded, with the changes
in the order of their names: the same set gives the same numbers, and none gives those of before, bit for bit.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from calotype.checkpoint.files import Weights
from calotype.checkpoint.keys import Bound, Source
from calotype.checkpoint.known import unread
from calotype.errors import DamagedFile, LoadError, RequestError, UnexpectedKeys, WrongShape
from calotype.lora.files import Group, Reader
from calotype.lora.layers import Change, Decomposed, Placed, merged
from calotype.lora.targets import Adaptable, Resolver, elsewhere
from calotype.memory.ladder import Memory
from calotype.nn.conv import Conv2d
from calotype.nn.linear import Linear
from calotype.nn.stored import Stored, StoredConv2d

LARGEST = 100.0  # strengths beyond it only make noise
WORN = "\0"  # begins the names of what requests ask for: no user's name does, and they come first

_encoding: ContextVar[Adapters | None] = ContextVar("_encoding", default=None)


class Site(NamedTuple):
    """A weight of one network, by its module's path in it."""

    network: nn.Module
    path: str

    @property
    def module(self) -> nn.Module:
        return self.network.get_submodule(self.path)


@dataclass(frozen=True)
class Adapter:
    """A file as it applies to one model. `left_out` are layers of text encoders that the model does without."""

    name: str
    source: str
    scale: float
    changes: Mapping[Site, tuple[Placed, ...]]
    left_out: tuple[str, ...] = ()
    text: Hashable = None  # tells what it does to text encoders; None where it does nothing


@dataclass
class _Fused:
    """A merged weight, and the one that it stands for."""

    original: nn.Parameter
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Adapters:
    """The adapters of one model."""

    def __init__(
        self,
        networks: Sequence[Adaptable],
        memory: Callable[[], Memory],
        *,
        family: str = "",
        advice: Callable[[Weights], str] = lambda _: "",
    ) -> None:
        """`memory` gives the model's memory when asked; `family` is for messages, `advice` for those of files that do
        not fit: what else to do with one, "" for nothing of use.
        """
        self._networks = tuple(networks)
        self._memory = memory
        self._family = family
        self._advice = advice
        self._held: dict[str, Adapter] = {}
        self._fused: dict[Site, _Fused] = {}
        self._hooks: dict[Site, Any] = {}
        self._acting: dict[Site, _Action] = {}
        self._stale: set[Site] = set()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self._held if not name.startswith(WORN))

    @property
    def told(self) -> list[dict[str, object]]:
        """What a picture's metadata says of the adapters with names that count."""
        held = ((name, self._held[name]) for name in self.names)
        return [{"name": name, "file": one.source, "scale": one.scale} for name, one in held if one.scale]

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._held:
            raise RequestError("name", name, _listed("attached: ", self.names))
        return self._held[name]

    @property
    def left_out(self) -> dict[str, int]:
        """Files with layers in text encoders that the model does without, and how many of them were left out."""
        return {one.source: len(one.left_out) for one in self._held.values() if one.left_out}

    @property
    def text(self) -> Hashable:
        """What tells the text encoders' answers from those without adapters: part of what prompts are known by."""
        held = (self._held[name] for name in sorted(self._held))
        found = tuple((one.text, one.scale) for one in held if one.text is not None and one.scale)
        return found or None

    def applies_to(self, network: nn.Module) -> bool:
        """Whether a network is one whose answers adapters can change."""
        return any(one.network is network for one in self._networks)

    def attach(self, weights: Weights, *, name: str, scale: float = 1.0) -> Adapter:
        """Attach a file's adapter under a name.

        Raises UnexpectedKeys for tensors that belong to no layer of the model, another LoadError for a file that is not
        sound or not for a model of these sizes, RequestError for a name that is taken or a scale out of range. Nothing
        is changed then.
        """
        _checked(scale)
        if name in self._held:
            raise RequestError("name", name, f"a name other than {', '.join(self.names)}; or detach that one first")
        try:
            adapter = read(weights, self._networks, name=name, scale=scale, family=self._family)
        except UnexpectedKeys as error:
            advice = error.advice or self._advice(weights)
            raise UnexpectedKeys(error.source, error.layout, error.keys, advice) from error
        except WrongShape as error:
            advice = self._advice(weights)
            raise (WrongShape(f"{error}; {advice}") if advice else error) from None
        self._held[name] = adapter
        self._touch(adapter.changes)
        return adapter

    @property
    def worn(self) -> bool:
        """Whether `wear` attached anything that is still there."""
        return any(name.startswith(WORN) for name in self._held)

    def wear(self, wanted: Mapping[str, float], opened: Callable[[str], Weights]) -> None:
        """Attach these files, each with its scale, and detach what an earlier call attached and this one does not name.

        They go by their paths, beside adapters with names, and by what tells that a file was written anew. Where one
        does not load, none of the earlier is lost.
        """
        names = {_worn(path): path for path in wanted}
        for name, path in names.items():
            _checked(wanted[path])
            if name in self._held:
                self.scale(name, wanted[path])
            else:
                self.attach(opened(path), name=name, scale=wanted[path])
        for name in [name for name in self._held if name.startswith(WORN) and name not in names]:
            self.detach(name)

    def scale(self, name: str, value: float) -> None:
        """Change an adapter's strength; 0 is without it, and the file stays at hand."""
        _checked(value)
        before = self[name]
        if before.scale != value:
            self._held[name] = replace(before, scale=float(value))
            self._touch(before.changes)

    def detach(self, name: str) -> None:
        """Take an adapter away: the model is as it was before, bit for bit."""
        adapter = self[name]
        del self._held[name]
        self._touch(adapter.changes)

    def apply(self) -> None:
        """Bring all weights to what is attached: before a job, once for all that came and went since the last.

        Weights that were merged are themselves again on the rungs of memory where weights come and go.
        """
        if self._memory().rung != "resident":
            self._stale.update(self._fused)
        renewed = False
        try:
            for site in tuple(self._stale):
                renewed = self._settle(site) or renewed
                self._stale.discard(site)
        finally:
            if renewed:
                self._memory().renew()

    def _touch(self, sites: Iterable[Site]) -> None:
        """Note what is to be done before the next job; what no adapter changes any more is itself at once."""
        self._stale.update(sites)
        done = [site for site in sites if not self._parts(site)]
        if any([self._settle(site) for site in done]):
            self._memory().renew()
        self._stale.difference_update(done)

    @contextmanager
    def encoding(self) -> Generator[None, None, None]:
        """Text encoders answer with this model's adapters inside the block, in this thread, and nowhere else."""
        sites = [site for site in self._acting if not self._in_backbone(site)]
        with ExitStack() as stack:
            token = _encoding.set(self)
            stack.callback(_encoding.reset, token)
            for site in sites:
                stack.callback(self._hooked(site, self._acting[site]).remove)
            yield

    def _in_backbone(self, site: Site) -> bool:
        return any(one.backbone and one.network is site.network for one in self._networks)

    def _parts(self, site: Site) -> tuple[tuple[Placed, float], ...]:
        """What changes a weight, and how strongly, in the order of the adapters' names."""
        return tuple(
            (placed, one.scale)
            for _, one in sorted(self._held.items())
            for placed in one.changes.get(site, ())
            if one.scale
        )

    def _settle(self, site: Site) -> bool:
        """Bring a weight to what is attached now; whether another tensor stands for it then."""
        parts = self._parts(site)
        hook = self._hooks.pop(site, None)
        if hook is not None:
            hook.remove()
        self._acting.pop(site, None)
        if parts and self._fusible(site):
            self._fuse(site, parts)
            return True
        restored = self._restore(site)
        if parts:
            action = self._acting[site] = _Action(parts)
            if self._in_backbone(site):
                self._hooks[site] = self._hooked(site, action, gated=False)
        return restored

    def _fusible(self, site: Site) -> bool:
        """Whether a weight is there to be replaced: on the lower rungs it comes and goes."""
        module = site.module
        there = type(module) in (Linear, Conv2d, nn.Linear, nn.Conv2d) and self._in_backbone(site)
        return there and self._memory().rung == "resident" and not module.weight.is_meta  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]

    def _fuse(self, site: Site, parts: Sequence[tuple[Placed, float]]) -> None:
        module = site.module
        now: nn.Parameter = module.weight  # pyright: ignore[reportAssignmentType]
        held = self._fused.get(site) or _Fused(now)
        original = held.original.detach().to(now.device)
        moved = [(replace(placed, change=placed.change.to(now.device)), scale) for placed, scale in parts]
        weight = nn.Parameter(merged(original, moved), requires_grad=False)
        if now.device.type != "cpu" and site not in self._fused:
            # The device's memory is dear: what was loaded waits on the host.
            held.original = nn.Parameter(original.to("cpu"), requires_grad=False)
        module.weight = weight
        self._fused[site] = held

    def _restore(self, site: Site) -> bool:
        held = self._fused.pop(site, None)
        if held is None:
            return False
        module = site.module
        now: nn.Parameter = module.weight  # pyright: ignore[reportAssignmentType]
        original = held.original
        if original.device != now.device:
            original = nn.Parameter(original.to(now.device), requires_grad=False)
        module.weight = original
        return True

    def _hooked(self, site: Site, action: _Action, *, gated: bool = True) -> Any:
        """Have a module's answers changed; `gated`: only while this model encodes."""

        def after(module: nn.Module, given: tuple[Tensor, ...], answer: Tensor) -> Tensor | None:
            if gated and _encoding.get() is not self:
                return None
            return action(module, given[0], answer)

        # Before the layer's weights leave again, which a change may need.
        return site.module.register_forward_hook(after, prepend=True)


class _Action:
    """What changes add to a layer's answers."""

    def __init__(self, parts: Sequence[tuple[Placed, float]]) -> None:
        self._given = parts
        self._parts: list[tuple[Placed, float]] = []
        self._device: torch.device | None = None
        self._lengths: dict[int, Tensor] = {}

    def __call__(self, module: nn.Module, x: Tensor, answer: Tensor) -> Tensor:
        if self._device != x.device:
            self._device = x.device
            self._parts = [(replace(placed, change=placed.change.to(x.device)), scale) for placed, scale in self._given]
            self._lengths.clear()
        how = _settings(module)
        axis = -1 if how is None else 1
        out = answer.clone()
        for number, (placed, scale) in enumerate(self._parts):
            rows = out.narrow(axis, placed.ours, placed.height)
            if isinstance(placed.change, Decomposed):
                made = self._decomposed(number, module, x, answer, how, placed)
            else:
                made = placed.change.act(x, placed.theirs, placed.theirs + placed.height, how)
            rows.add_(made.to(out.dtype), alpha=scale)
        return out

    def _decomposed(
        self, number: int, module: nn.Module, x: Tensor, answer: Tensor, how: dict[str, Any] | None, placed: Placed
    ) -> Tensor:
        """What lengths make of an answer, less the answer."""
        change = placed.change
        assert isinstance(change, Decomposed)
        axis = -1 if how is None else 1
        if number not in self._lengths:
            base = torch.zeros(change.shape[0], change.columns, device=x.device)
            base[placed.theirs : placed.theirs + placed.height] = _weight(module, placed.ours, placed.height)
            lengths = change.lengths(base)
            self._lengths[number] = (
                lengths[placed.theirs : placed.theirs + placed.height, 0] if change.by_row else lengths[0]
            )
        by = self._lengths[number].to(answer.dtype)
        if axis == 1:
            by = by[:, None, None]
        plain = answer.narrow(axis, placed.ours, placed.height)
        last = placed.theirs + placed.height
        if change.by_row:
            bias: Tensor | None = getattr(module, "bias", None)
            if bias is not None:
                bias = bias[placed.ours : placed.ours + placed.height].to(answer.dtype)
                plain = plain - (bias if how is None else bias[:, None, None])
            return (by - 1) * plain + by * change.inner.act(x, placed.theirs, last, how).to(answer.dtype)
        scaled = (x * by).to(x.dtype)
        again: Tensor = module.forward(scaled)
        changed = change.inner.act(scaled, placed.theirs, last, how)
        return again.narrow(axis, placed.ours, placed.height) - plain + changed.to(answer.dtype)


def _settings(module: nn.Module) -> dict[str, Any] | None:
    """A convolution's settings; None for a linear layer."""
    if isinstance(module, StoredConv2d):
        return module.how
    return StoredConv2d.settings(module) if isinstance(module, nn.Conv2d) else None


def _weight(module: nn.Module, start: int, height: int) -> Tensor:
    """Some rows of a layer's weight, float32, as its products take them."""
    if isinstance(module, Stored):
        return module.rows(start, start + height, torch.float32)
    weight: Tensor = module.weight  # pyright: ignore[reportAssignmentType]
    return weight[start : start + height].flatten(1).float()


def read(
    weights: Weights, networks: Sequence[Adaptable], *, name: str, scale: float = 1.0, family: str = ""
) -> Adapter:
    """What a file changes of these networks, checked whole."""
    layout = f"LoRA for {family}" if family else "LoRA"
    kind = unread(weights)
    if kind is not None:
        raise UnexpectedKeys(weights.source, layout, kind[1], f"they are of {kind[0]}")
    reader = Reader(weights)
    if not reader.groups:
        raise LoadError(
            f"{weights.source}: no LoRA: none of its {len(weights)} tensors is of an adapter"
            f"{f', the first is {next(iter(weights))!r}' if weights else ''}; run `calotype info {weights.source}` to "
            "see what it is"
        )
    resolver = Resolver(networks, reader.groups)
    found = {layer: resolver.target(layer) for layer in reader.groups}
    spare = [layer for layer, target in found.items() if target is None]
    # A file for a family with more encoders, or a model that was loaded without one of its own.
    matched = any(target is not None and target.owner.backbone for target in found.values())
    without = elsewhere(networks, spare) if matched else frozenset[str]()
    left_out = tuple(layer for layer in spare if layer in without)
    unmatched = [key for layer in spare if layer not in without for key in reader.groups[layer].keys.values()]
    if unmatched or reader.rest:
        raise UnexpectedKeys(weights.source, layout, [*unmatched, *reader.rest])
    changes: dict[Site, list[Placed]] = {}
    owners: dict[Site, list[str]] = {}
    digest = hashlib.blake2b(digest_size=16)
    text = False
    for layer, target in found.items():
        if target is None:
            continue
        group = reader.groups[layer]
        rows = 3 * target.shape[1] if group.leading else target.shape[0]  # q, k and v, each as wide as what comes in
        change = reader.change(group, (rows, *target.shape[1:]))
        if not target.owner.backbone:
            text = True
            _digest(digest, layer, change)
        for bound, source in target.parts:
            site = Site(target.owner.network, bound.ours.removesuffix(".weight"))
            placed = _placed(change, bound, source, weights, group)
            others, before = owners.setdefault(site, []), changes.setdefault(site, [])
            for other, old in zip(others, before, strict=True):
                if any(old.ours < new.ours + new.height and new.ours < old.ours + old.height for new in placed):
                    raise DamagedFile(
                        f"{weights.source}: {other!r} and {layer!r} are one layer in two spellings, which would count "
                        "twice; take one of them out of the file"
                    )
            before.extend(placed)
            others.extend([layer] * len(placed))
    return Adapter(
        name=name,
        source=weights.source,
        scale=float(scale),
        changes={site: tuple(placed) for site, placed in changes.items()},
        left_out=left_out,
        text=digest.hexdigest() if text else None,
    )


def _placed(change: Change, bound: Bound, source: Source, weights: Weights, group: Group) -> list[Placed]:
    """Where a change's rows go in one of our weights."""
    if source.transposed:
        change = change.transposed()
    found: list[Placed] = []
    for span in source.spans:
        height = min(span.height, change.shape[0] - span.theirs)
        if height <= 0:
            continue
        if isinstance(change, Decomposed) and not change.by_row and height != change.shape[0]:
            raise LoadError(
                f"{weights.source}: {group.name!r} has lengths (DoRA) of columns that are not of one layer here "
                f"({bound.ours}), which is not supported"
            )
        found.append(Placed(change, span.theirs, span.ours, height))
    return found


def _digest(digest: hashlib.blake2b, layer: str, change: Change) -> None:
    """Take a change's content into what tells it."""
    digest.update(f"{layer} {type(change).__name__} {change.factor}".encode())
    for value in vars(change).values():
        if isinstance(value, Change):
            _digest(digest, layer, value)
        for tensor in value if isinstance(value, tuple) else (value,):  # pyright: ignore[reportUnknownVariableType]
            if isinstance(tensor, Tensor):
                digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def _worn(path: str) -> str:
    """The name of a request's file as it is now: another where it was written since."""
    try:
        now = os.stat(path)
    except OSError:  # which opening it will tell
        return WORN + path
    return f"{WORN}{path}{WORN}{now.st_mtime_ns} {now.st_size}"


def _checked(scale: object) -> None:
    real = not isinstance(scale, bool) and isinstance(scale, Real) and math.isfinite(scale)  # numpy's too
    if not real or abs(float(scale)) > LARGEST:  # pyright: ignore[reportArgumentType]
        raise RequestError("scale", scale, f"a finite number from -{LARGEST:g} to {LARGEST:g}")


def _listed(what: str, names: Iterable[str]) -> str:
    held = list(names)
    return what + ", ".join(held) if held else "nothing is attached"
