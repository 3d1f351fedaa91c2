"""The memory ladder: how much of a model is on the computing device at a time.

    resident     all of it, from one job to the next
    components   one part at a time: encoders, then the network that denoises, then the autoencoder; and of the second,
                 what only `prepare` needs comes and goes by itself
    stream       one layer at a time, the next one on its way while it computes; on a GPU, as many stay as fit

Every rung computes the same numbers: weights are moved, never changed. On the CPU a part that is not needed leaves no
more behind than its place in the file.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from calotype.memory.free import free_memory
from calotype.memory.layers import Layer, Maker, layers_of
from calotype.memory.pages import Mapping as MappedFile

Rung = Literal["resident", "components", "stream"]
RUNGS: tuple[Rung, ...] = ("resident", "components", "stream")
SMALL = 2**18  # bytes: a layer up to here stays while its part computes
RESERVE = 0.25  # of a device's free memory, kept for activations by `stream`
PINNED = 0.5  # of the host's free memory, at most, for layers that wait where a GPU copies from by itself


@runtime_checkable
class Prepares(Protocol):
    """A network that knows which of its modules only `prepare` uses: their weights may leave before the first step."""

    def only_for_preparing(self) -> Sequence[nn.Module]: ...


class Memory:
    """Where a model's networks are, and how they get to the device.

    `makers` read weights that no file holds as they are wanted, for each network by their names; `files` are those
    that the others are views of.
    """

    def __init__(
        self,
        device: torch.device,
        rung: Rung = "resident",
        *,
        makers: Mapping[nn.Module, Mapping[str, Maker]] | None = None,
        files: Sequence[MappedFile] = (),
    ) -> None:
        self.device = device
        self._rung: Rung = rung
        self._makers = dict(makers or {})
        self._files = tuple(files)
        self._parts: dict[nn.Module, Part] = {}

    @property
    def rung(self) -> Rung:
        return self._rung

    @property
    def mapped(self) -> bool:
        """Whether weights may be views of files. Those of a model that was to be read at once are not."""
        return bool(self._files)

    def add(self, network: nn.Module, makers: Mapping[str, Maker], files: Sequence[MappedFile]) -> None:
        """Take charge of another network, with its own makers and the files that its weights are views of."""
        self._makers[network] = makers
        self._files = (*self._files, *files)

    @contextmanager
    def holding(self, *modules: nn.Module) -> Generator[None, None, None]:
        """The modules can compute on the device inside the block. Blocks may be nested, also of the same module."""
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(self._part(module).held())
            yield

    def _part(self, module: nn.Module) -> Part:
        if module not in self._parts:
            layers = list(layers_of(module, self._makers.get(module), self._files))
            self._parts[module] = Part(module, layers, self.device, self._rung)
        return self._parts[module]

    def lower(self) -> bool:
        """Go down one rung, after running out of memory; False on the last.

        Only between jobs: nothing may be held.
        """
        if self._rung == RUNGS[-1]:
            return False
        self._rung = RUNGS[RUNGS.index(self._rung) + 1]
        if self.device.type != "cpu":
            for module in self._parts:
                module.to("cpu")
        self._parts.clear()
        self.release()
        return True

    @property
    def busy(self) -> bool:
        """Whether a job holds any of the networks."""
        return any(part.in_use for part in self._parts.values())

    def renew(self) -> None:
        """Look at the networks anew, as some of their weights were replaced. Only between jobs."""
        assert not self.busy
        self._parts.clear()

    def release(self) -> None:
        """Give what nobody holds back to the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Part:
    """A network on its way to the device and back."""

    def __init__(self, module: nn.Module, layers: Sequence[Layer], device: torch.device, rung: Rung) -> None:
        self._module = module
        self._layers = layers
        self._device = device
        self._rung: Rung = rung
        self._depth = 0
        self._met = False
        self._belt = Belt(device)

    @property
    def in_use(self) -> bool:
        return self._depth > 0

    @contextmanager
    def held(self) -> Generator[None, None, None]:
        if self._depth == 0:
            self._enter()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._exit()

    def _enter(self) -> None:
        if self._rung == "resident":
            self._module.to(self._device)
            return
        passing = self._passing()
        if not self._met:
            self._met = True
            self._pin(passing)
        try:
            for layer in self._layers:
                if layer in passing:
                    self._belt.add(layer)
                else:
                    layer.put(layer.fetch(self._device))
        except BaseException:
            self._exit()
            raise

    def _exit(self) -> None:
        if self._rung == "resident":
            return
        self._belt.clear()
        for layer in self._layers:
            layer.leave()

    def _pin(self, passing: Collection[Layer]) -> None:
        """Keep layers that go to a GPU at each step in pinned memory, if the host has room for all of them.

        Copies from there run beside the computation, at the bus's full speed; those from a mapped file do not.
        """
        if self._rung != "stream" or self._device.type != "cuda":
            return
        if sum(layer.bytes for layer in passing) <= PINNED * free_memory(torch.device("cpu")):
            for layer in passing:
                layer.pin()

    def _passing(self) -> set[Layer]:
        """The layers that come and go by themselves."""
        # Only layers that nobody reads but their own forward.
        large = [layer for layer in self._layers if layer.bytes > SMALL and not any(layer.module.children())]
        if self._rung == "stream":
            return set(large) - self._staying(large)
        if not isinstance(self._module, Prepares):
            return set()
        once = {inner for module in self._module.only_for_preparing() for inner in module.modules()}
        return {layer for layer in large if layer.module in once}

    def _staying(self, large: Sequence[Layer]) -> set[Layer]:
        """As many as fit on a GPU; on the CPU their place is the file."""
        if self._device.type != "cuda":
            return set()
        free = free_memory(self._device) * (1 - RESERVE)
        room = free - 3 * max((layer.bytes for layer in large), default=0)  # for those on the belt
        staying: set[Layer] = set()
        for layer in large:
            room -= layer.bytes
            if room < 0:
                break
            staying.add(layer)
        return staying


class Belt:
    """Brings layers to the device one after another, in the order in which they were used last.

    On a GPU the next layer is copied on a stream of its own while this one computes; on the CPU the system is asked to
    read the next one's pages ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._hooks: list[RemovableHandle] = []
        self._after: dict[Layer, Layer] = {}
        self._last: Layer | None = None
        self._coming: dict[Layer, tuple[torch.Tensor, ...]] = {}

    def add(self, layer: Layer) -> None:
        def before(*_: object) -> None:
            self._before(layer)

        def after(*_: object) -> None:
            self._done(layer)

        self._hooks.append(layer.module.register_forward_pre_hook(before))
        self._hooks.append(layer.module.register_forward_hook(after))

    def clear(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._coming.clear()
        self._last = None

    def _before(self, layer: Layer) -> None:
        if self._last is not None:
            self._after[self._last] = layer
        self._last = layer
        values = self._coming.pop(layer, None) or self._fetched(layer)
        self._coming.clear()  # another order than last time: what was brought in vain gives its room back
        if self._copies is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_stream(self._copies)
            for value in values:
                value.record_stream(here)
        layer.put(values)
        if self._copies is None and (following := self._after.get(layer)) is not None:
            following.expect()

    def _done(self, layer: Layer) -> None:
        layer.leave()
        following = self._after.get(layer)
        if self._copies is not None and following is not None:
            self._coming[following] = self._fetched(following)

    def _fetched(self, layer: Layer) -> tuple[torch.Tensor, ...]:
        if self._copies is None:
            return layer.fetch(self._device)
        with torch.cuda.stream(self._copies):
            return layer.fetch(self._device)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, the device's or the host's, was used up."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in EXHAUSTED)


EXHAUSTED = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
