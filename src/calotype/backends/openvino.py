"""OpenVINO on the CPU for the networks that take the time: the UNet's step and the autoencoder's decoder.

`accelerate` wraps the torch modules. What a job's steps share is still computed once by torch (`UNet.prepare`); each
step then runs a graph of static shapes, which OpenVINO compiles when the shapes are first met.

The UNet's products may also be taken in int8, which is twice as fast and not the same: `OpenVinoUNet.error` measures
how far its answers are from torch's. Such graphs are kept on disk; others are not, as compiling them again is as fast
as reading them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from calotype.backends import openvino_cache
from calotype.backends.openvino_cache import Bytes, Cache
from calotype.errors import RequestError
from calotype.nn import unet as networks
from calotype.nn.autoencoder import Autoencoder, AutoencoderConfig, Decoder
from calotype.nn.linear import native
from calotype.nn.unet import KeysAndValues, Prepared, UNet, UNetConfig

if TYPE_CHECKING:
    import openvino as ov

T = TypeVar("T")
OLDEST = (2025, 2)  # before, a graph that was kept could not be read again
SAMPLE = 1024  # values


def available() -> bool:
    """Whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


def require() -> None:
    """Raises RequestError where OpenVINO is missing or too old, with what to do."""
    wanted = ".".join(map(str, OLDEST))
    remedy = f'`pip install "calotype[openvino]"` brings it (openvino {wanted} or newer); or leave backend at "torch"'
    if not available():
        raise RequestError("backend", "openvino", f"torch, as openvino is not installed; {remedy}")
    import openvino

    if tuple(int(part) for part in openvino.__version__.split(".")[:2]) < OLDEST:
        raise RequestError("backend", "openvino", f"torch, as openvino {openvino.__version__} is too old; {remedy}")


def require_eight_bits() -> None:
    """Raises RequestError where products in int8 would be neither exact nor fast."""
    capable = getattr(torch.cpu, "_is_vnni_supported", lambda: False)()
    if not capable:
        raise RequestError(
            "storage",
            "unet=int8",
            "nothing for the UNet with the backend openvino: this CPU lacks the instructions for it (VNNI); the "
            "backend torch takes int8 everywhere",
        )


def accelerate(unet: UNet, vae: Autoencoder, *, eight_bits: bool = False) -> tuple[OpenVinoUNet, OpenVinoAutoencoder]:
    """The two modules to put where these stood, on the CPU. They hold the originals and give the same results.

    With `eight_bits` the UNet's are near the same: see `OpenVinoUNet.error`. Raises RequestError where OpenVINO is not
    installed, or the CPU is not made for int8.
    """
    return OpenVinoUNet(unet, eight_bits=eight_bits), OpenVinoAutoencoder(vae)


class OpenVinoUNet(nn.Module):
    """A UNet whose steps OpenVINO computes; `prepare` is torch's.

    Keeps the `room` compiled graphs used last, each with its own packed copy of the weights. `eight_bits` takes the
    products in int8; `cache` is where such graphs are kept on disk, by default where the environment says.
    """

    def __init__(self, unet: UNet, *, room: int = 2, eight_bits: bool = False, cache: Cache | None = None) -> None:
        require()
        super().__init__()
        self.unet = unet
        self.eight_bits = eight_bits
        if eight_bits:
            require_eight_bits()
        self._cache = (cache or openvino_cache.usual()) if eight_bits else None
        self._compiled = Recent[_Compiled](room)
        self._errors: list[float] | None = None
        self._loaded = state(unet)

    @property
    def config(self) -> UNetConfig:
        return self.unet.config

    def prepare(self, texts: Sequence[Tensor], vector: Tensor | None, times: Tensor) -> Prepared:
        """As `UNet.prepare`."""
        return self.unet.prepare(texts, vector, times)

    def shifts(self, vector: Tensor | None, times: Tensor) -> tuple[Tensor, ...]:
        """As `UNet.shifts`."""
        return self.unet.shifts(vector, times)

    def read(self, texts: Sequence[Tensor]) -> tuple[KeysAndValues, ...]:
        """As `UNet.read`."""
        return self.unet.read(texts)

    def forward(self, x: Tensor, shifts: Sequence[Tensor], text: Sequence[KeysAndValues]) -> Tensor:
        """As `UNet.forward`; float32."""
        shapes = (
            tuple(x.shape),
            tuple(tuple(shift.shape) for shift in shifts),
            tuple(tuple((tuple(k.shape), tuple(v.shape)) for k, v in groups) for groups in text),
        )

        def build() -> _Compiled:
            from calotype.backends.openvino_graph import unet_graph

            def graph() -> ov.Model:
                return unet_graph(self.unet, *shapes, eight_bits=self.eight_bits)

            settings = _settings(self.unet.conv_in.weight.dtype)
            if self._lasting is None:
                return _Compiled(_core().compile_model(graph(), "CPU", settings))
            return _kept(self._lasting, self._key(settings, shapes), graph, settings)

        compiled = self._compiled.get((shapes, state(self.unet)), build)
        answer = compiled.run((x, *shifts), text)
        if self._errors is None:
            return answer
        wanted = self.unet(x, shifts, text).float()
        self._errors.append(float((answer - wanted).norm() / wanted.norm()))
        return wanted

    def error(self, job: Callable[[], object]) -> float:
        """How far the answers in one job are from torch's: |int8 - torch| / |torch|, the largest of its steps.

        `job` runs it, and is given torch's answers meanwhile. It is not run where the cache knows the result.
        """
        cache, key = self._lasting, self._key("error")
        known = None if cache is None else cache.get(key)
        if known is not None:
            return float(known.tobytes())
        self._errors = errors = []
        try:
            job()
        finally:
            self._errors = None
            self.forget()
        if cache is not None:
            cache.put(key, str(max(errors)).encode())
        return max(errors)

    def forget(self) -> None:
        """Drop the compiled graphs: they hold the weights as they were when they were compiled."""
        self._compiled.clear()

    @property
    def _lasting(self) -> Cache | None:
        """The cache, for what is worth its room there: not what is only tried out, nor weights that were changed."""
        if self._errors is None and state(self.unet) == self._loaded:
            return self._cache
        return None

    def _key(self, *more: object) -> str:
        """What tells a graph from any other, as far as samples of its weights can tell."""
        digest = hashlib.blake2b(digest_size=20)
        core = _core()
        machine = [core.get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
        digest.update(repr((_version(), machine, self.config, *more)).encode())
        for sample in _built_by():
            digest.update(sample)
        for name, weight in self.unet.named_parameters():
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            for sample in _samples(weight):
                digest.update(sample)
        return digest.hexdigest()


class OpenVinoAutoencoder(nn.Module):
    """An autoencoder whose decoder OpenVINO computes; `encode` is torch's."""

    def __init__(self, autoencoder: Autoencoder, *, room: int = 4) -> None:
        require()
        super().__init__()
        self.autoencoder = autoencoder
        self._compiled = Recent[_Compiled](room)

    @property
    def config(self) -> AutoencoderConfig:
        return self.autoencoder.config

    @property
    def decoder(self) -> Decoder:
        return self.autoencoder.decoder

    def encode(self, picture: Tensor) -> Tensor:
        """As `Autoencoder.encode`."""
        return self.autoencoder.encode(picture)

    def decode(self, latent: Tensor) -> Tensor:
        """As `Autoencoder.decode`."""
        net = self.autoencoder

        def build() -> _Compiled:
            from calotype.backends.openvino_graph import decoder_graph

            settings = _settings(net.decoder.conv_in.weight.dtype)
            return _Compiled(_core().compile_model(decoder_graph(net, latent.shape), "CPU", settings))

        return self._compiled.get((tuple(latent.shape), state(net)), build).run((latent,))

    def forget(self) -> None:
        """Drop the compiled graphs: they hold the weights as they were when they were compiled."""
        self._compiled.clear()


class Recent(Generic[T]):
    """The `room` values used last, by key."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._held: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, build: Callable[[], T]) -> T:
        """The value held, or a new one; what gives way leaves before that is built, so that both never stand."""
        if key not in self._held:
            while len(self._held) >= self.room:
                self._held.popitem(last=False)
            self._held[key] = build()
        self._held.move_to_end(key)
        return self._held[key]

    def clear(self) -> None:
        self._held.clear()


class _Compiled:
    """A graph ready to run. Inputs are read where torch holds them; `text` is handed over once a job."""

    def __init__(self, model: ov.CompiledModel) -> None:
        self.model = model
        self._request = model.create_infer_request()
        self._lent: dict[int, np.ndarray[Any, Any]] = {}  # OpenVINO keeps addresses only
        self._text: Sequence[KeysAndValues] | None = None

    def run(self, changing: Sequence[Tensor], text: Sequence[KeysAndValues] = ()) -> Tensor:
        for number, tensor in enumerate(changing):
            self._lend(number, tensor)
        if text is not self._text:
            given = [tensor for groups in text for pair in groups for tensor in pair]
            for number, tensor in enumerate(given, start=len(changing)):
                self._lend(number, tensor)
            self._text = text
        self._request.infer()
        return torch.from_numpy(self._request.get_output_tensor(0).data.copy())

    def _lend(self, number: int, tensor: Tensor) -> None:
        import openvino as ov

        array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        self._request.set_input_tensor(number, ov.Tensor(array, shared_memory=True))
        self._lent[number] = array


def _settings(dtype: torch.dtype) -> dict[str, str | int]:
    bfloat16 = dtype == torch.bfloat16 and native(dtype)
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 64,  # of linear layers with weights in 8 bits
    }


def _kept(held: Cache, key: str, graph: Callable[[], ov.Model], settings: dict[str, str | int]) -> _Compiled:
    """The compiled graph that the cache has, or a new one, which it then has too."""
    blob = held.get(key)
    if blob is not None:
        try:
            return _Restored(blob, settings)
        except RuntimeError as error:
            held.drop(key, str(error))
    compiled = _Compiled(_core().compile_model(graph(), "CPU", settings))
    stream = io.BytesIO()
    compiled.model.export_model(stream)
    held.put(key, stream.getbuffer())
    return compiled


class _Restored(_Compiled):
    """A graph from the cache. It reads its weights from there: the file stays mapped."""

    def __init__(self, blob: Bytes, settings: dict[str, str | int]) -> None:
        import openvino as ov

        self._blob = blob
        try:
            model = _core().import_model(ov.Tensor(blob, shared_memory=True), "CPU", settings)
        except TypeError:  # older ones take bytes alone
            model = _core().import_model(blob.tobytes(), "CPU", settings)
        super().__init__(model)


def _samples(weight: Tensor) -> Iterator[bytes]:
    """Values at the beginning, in the middle and at the end: training changes all of a tensor, or nothing."""
    values = weight.detach().reshape(-1)
    size = len(values)
    for start in sorted({0, max(size // 2 - SAMPLE // 2, 0), max(size - SAMPLE, 0)}):
        yield values[start : start + SAMPLE].contiguous().view(torch.uint8).numpy().tobytes()


@cache
def _built_by() -> tuple[bytes, ...]:
    """The source of all that decides how a graph is built."""
    from calotype.backends import openvino_graph, openvino_layers

    return tuple(Path(module.__file__ or "").read_bytes() for module in (openvino_graph, openvino_layers, networks))


def _version() -> str:
    import openvino

    return openvino.__version__


@cache
def _core() -> ov.Core:
    import openvino as ov

    return ov.Core()


def state(module: nn.Module) -> Hashable:
    """What changes when weights are put in others' place, or changed in place where torch counts such changes.

    It does not in inference mode: after such a change, call `forget`.
    """
    return tuple((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in module.parameters())
