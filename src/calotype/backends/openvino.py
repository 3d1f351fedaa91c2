"""OpenVINO on the CPU for the networks that take the time: the UNet's step and the autoencoder's decoder.

`accelerate` wraps the torch modules. What a job's steps share is still computed once by torch (`UNet.prepare`); each
step then runs a graph of static shapes, which OpenVINO compiles when the shapes are first met.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from calotype.errors import RequestError
from calotype.nn.autoencoder import Autoencoder, AutoencoderConfig, Decoder
from calotype.nn.linear import native
from calotype.nn.unet import KeysAndValues, Prepared, UNet, UNetConfig

if TYPE_CHECKING:
    import openvino as ov

T = TypeVar("T")
OLDEST = (2025, 0)


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


def accelerate(unet: UNet, vae: Autoencoder) -> tuple[OpenVinoUNet, OpenVinoAutoencoder]:
    """The two modules to put where these stood, on the CPU. They hold the originals and give the same results.

    Raises RequestError where OpenVINO is not installed.
    """
    return OpenVinoUNet(unet), OpenVinoAutoencoder(vae)


class OpenVinoUNet(nn.Module):
    """A UNet whose steps OpenVINO computes; `prepare` is torch's.

    Keeps the `room` compiled graphs used last, each with its own packed copy of the weights.
    """

    def __init__(self, unet: UNet, *, room: int = 2) -> None:
        require()
        super().__init__()
        self.unet = unet
        self._compiled = Recent[_Compiled](room)

    @property
    def config(self) -> UNetConfig:
        return self.unet.config

    def prepare(self, texts: Sequence[Tensor], vector: Tensor | None, times: Tensor) -> Prepared:
        """As `UNet.prepare`."""
        return self.unet.prepare(texts, vector, times)

    def forward(self, x: Tensor, shifts: Sequence[Tensor], text: Sequence[KeysAndValues]) -> Tensor:
        """As `UNet.forward`; float32."""
        shapes = (
            tuple(x.shape),
            tuple(tuple(shift.shape) for shift in shifts),
            tuple(tuple((tuple(k.shape), tuple(v.shape)) for k, v in groups) for groups in text),
        )

        def build() -> _Compiled:
            from calotype.backends.openvino_graph import unet_graph

            return _Compiled(unet_graph(self.unet, *shapes), self.unet.conv_in.weight.dtype)

        compiled = self._compiled.get((shapes, state(self.unet)), build)
        return compiled.run((x, *shifts), text)

    def forget(self) -> None:
        """Drop the compiled graphs: they hold the weights as they were when they were compiled."""
        self._compiled.clear()


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

            return _Compiled(decoder_graph(net, latent.shape), net.decoder.conv_in.weight.dtype)

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

    def __init__(self, graph: ov.Model, dtype: torch.dtype) -> None:
        bfloat16 = dtype == torch.bfloat16 and native(dtype)
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self._request = _core().compile_model(graph, "CPU", settings).create_infer_request()
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


@cache
def _core() -> ov.Core:
    import openvino as ov

    return ov.Core()


def state(module: nn.Module) -> Hashable:
    """What changes when weights are put in others' place, or changed in place where torch counts such changes.

    It does not in inference mode: after such a change, call `forget`.
    """
    return tuple((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in module.parameters())
