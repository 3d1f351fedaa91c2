"""What a model would take: predicted by running it without its numbers.

The networks run on tensors that have a shape, a type and a device, but no values (torch's fake tensors). What is alive
at a time is counted; nothing is read, and a model of any size is planned in seconds. Room that kernels take for
themselves (a convolution's workspace) is not seen.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from calotype.families.model import FamilyModel
from calotype.loading import load
from calotype.memory.ladder import RUNGS, Rung
from calotype.memory.plan import USABLE, free_memory, held_bytes
from calotype.nn import strips
from calotype.request import Job, Request
from calotype.sampling.samplers import SAMPLERS, evaluated

T = TypeVar("T")

LARGEST_STRIP = 2**25  # higher strips than are computed, which take time to plan: some hundred megabytes too many


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One part of a job: bytes that its weights take on each rung, and what it makes beside them at most."""

    name: str  # encode, denoise, decode
    weights: dict[Rung, int]
    activations: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job would take. `device_bytes` is the peak there for each rung, `host_bytes` that of the host's memory.

    `chosen` is the highest rung that fits into four fifths of the `free_bytes` that the device has now.
    """

    model: str
    width: int
    height: int
    device: str
    phases: tuple[Phase, ...]
    device_bytes: dict[Rung, int]
    host_bytes: dict[Rung, int]
    free_bytes: int
    chosen: Rung

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def plan(
    *sources: str | os.PathLike[str],
    width: int | None = None,
    height: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Plan:
    """Predict what one picture takes on each rung of the memory ladder; sources, device and dtype as for `load`.

    Raises LoadError for sources that make no model, RequestError for a size that the model cannot draw.
    """
    model = load(*sources, device=device, dtype=dtype, memory="stream").family
    job = Request(prompt="", seed=0, width=width, height=height).complete(model.defaults, seed=0)
    phases = _phases(model, job)
    everything = sum(held_bytes(network, "resident") for network in (*model.encoders, model.backbone, model.vae))
    peaks: dict[Rung, int] = {
        rung: max((everything if rung == "resident" else phase.weights[rung]) + phase.activations for phase in phases)
        for rung in RUNGS
    }
    on_cpu = model.device.type == "cpu"
    free = free_memory(model.device)
    return Plan(
        model=f"{model.family}/{model.variant}",
        width=job.width,
        height=job.height,
        device=str(model.device),
        phases=phases,
        device_bytes=peaks,
        # Beside a GPU, weights wait for their turn in the host's memory: what is mapped there may be taken back.
        host_bytes=peaks if on_cpu else {"resident": 0, "components": everything, "stream": everything},
        free_bytes=free,
        chosen=_highest(peaks, USABLE * free),
    )


def _highest(peaks: Mapping[Rung, int], room: float) -> Rung:
    for rung in RUNGS:
        if peaks[rung] <= room:
            return rung
    return RUNGS[-1]


def _phases(model: FamilyModel[Any], job: Job) -> tuple[Phase, ...]:
    device = model.device
    levels = evaluated(SAMPLERS[job.sampler], model.levels(job))
    with _without_values(model) as counted:
        conditioning, encoding = counted(lambda: model.condition("", job, negative=False))

        def step() -> Tensor:
            if job.cfg_scale == 1:
                denoise = model.denoiser(conditioning, levels, [job])
            else:
                joined = model.joined([conditioning, conditioning])
                assert joined is not None
                denoise = model.denoiser(joined, levels, [job])
            return denoise(torch.empty(1, *model.noise_shape(job), device=device), levels[0])

        _, denoising = counted(step)
        with _high_strips(job.width * job.height):
            _, decoding = counted(lambda: model.decode(torch.empty(1, *model.noise_shape(job), device=device)))

        def phase(name: str, networks: Sequence[nn.Module], activations: int) -> Phase:
            held: dict[Rung, int] = {rung: sum(held_bytes(net, rung) for net in networks) for rung in RUNGS}
            return Phase(name=name, weights=held, activations=activations)

        return (
            phase("encode", model.encoders, encoding),
            phase("denoise", [model.backbone], denoising),
            phase("decode", [model.vae], decoding),
        )


@contextmanager
def _high_strips(pixels: int) -> Generator[None, None, None]:
    """Strips that grow with the picture, so that planning a large one takes no longer."""
    usual = strips.STRIP
    strips.STRIP = min(max(usual, 2 * pixels), LARGEST_STRIP)
    try:
        yield
    finally:
        strips.STRIP = usual


Counted = Callable[[Callable[[], T]], tuple[T, int]]


@contextmanager
def _without_values(model: FamilyModel[Any]) -> Generator[Counted[Any], None, None]:
    """Inside the block the model's weights have no values; it gives what calls a function and counts its peak.

    Then they have theirs again: an encoder may be another model's too.
    """
    networks = (*model.encoders, model.backbone, model.vae)
    with ExitStack() as restored, torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        weights: list[Tensor] = []
        for network in networks:
            for module in network.modules():
                for name, tensor in [*module.named_parameters(recurse=False)]:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=model.device)
                    setattr(module, name, nn.Parameter(empty, requires_grad=False))
                    restored.callback(setattr, module, name, tensor)
                    weights.append(empty)
                for name, tensor in [*module.named_buffers(recurse=False)]:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=model.device)
                    setattr(module, name, empty)
                    restored.callback(setattr, module, name, tensor)
                    weights.append(empty)
        known = {_key(tensor): 0 for tensor in weights}

        def counted(function: Callable[[], T]) -> tuple[T, int]:
            with _Count(known) as count:
                return function(), count.most

        yield counted


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]  its identity, under all its views


class _Count(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive; `most` is the largest number so far."""

    def __init__(self, known: Mapping[int, int]) -> None:
        super().__init__()
        self.most = 0
        self._now = 0
        self._alive = dict(known)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and _key(value) not in self._alive:
                storage = value.untyped_storage()
                self._alive[_key(value)] = size = storage.nbytes()
                self._now += size
                self.most = max(self.most, self._now)
                weakref.finalize(storage, self._gone, _key(value))
        return out

    def _gone(self, key: int) -> None:
        self._now -= self._alive.pop(key, 0)
