"""Networks that enlarge pictures (ESRGAN, Wang et al. 2018, and its many kin), run through the library spandrel.

Their files are read by our own readers: no code of a pickle ever runs.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from calotype.checkpoint.files import Weights
from calotype.errors import LoadError, NonFiniteImage, RequestError, UnknownModel
from calotype.image import to_pil, to_tensor
from calotype.request import Size, resized

TILE = 384  # pixels a side of what the network sees at a time, of the picture before
MARGIN = 32  # pixels around a tile's own that it sees beside them, and that are not taken from it
PREFIXES = ("params_ema.", "params-ema.", "params.", "model_state_dict.", "state_dict.", "net.", "module.", "netG.")
REMEDY = '`pip install "calotype[upscale]"` brings it'


class Upscaler(NamedTuple):
    """A network for pictures, 1 3 h w in 0..1 -> 1 3 (scale h) (scale w) in 0..1, in float32.

    `network` runs `module`, whose weights are on `device` only while it enlarges.
    """

    source: str
    module: nn.Module
    network: Callable[[Tensor], Tensor]
    scale: int
    whole: bool  # a network that has to see all of a picture at once
    device: torch.device

    def enlarge(self, picture: Image.Image, size: Size) -> Image.Image:
        """The picture at a size: through the network as often as it takes, then by lanczos to the pixel.

        Raises NonFiniteImage where the network returns NaN or infinity.
        """
        picture = picture.convert("RGB")
        try:
            self.module.to(self.device)
            while picture.width < size.width or picture.height < size.height:
                picture = to_pil(self._once(to_tensor(picture)[None])[0])
        finally:
            self.module.to("cpu")
        return resized(picture, size)

    def _once(self, picture: Tensor) -> Tensor:
        """One pass: tiles are cut out of the picture with a margin, which is cut off again."""
        height, width = picture.shape[2:]
        larger = torch.empty(1, 3, height * self.scale, width * self.scale)
        for top, bottom in _spans(height, self.whole):
            for left, right in _spans(width, self.whole):
                above, before = min(top, MARGIN), min(left, MARGIN)
                seen = picture[:, :, top - above : bottom + MARGIN, left - before : right + MARGIN]
                with torch.inference_mode():
                    drawn = self.network(seen.to(self.device)).float().cpu()
                if drawn.shape != (1, 3, seen.shape[2] * self.scale, seen.shape[3] * self.scale):
                    raise LoadError(f"{self.source}: it drew {tuple(drawn.shape)} of {tuple(seen.shape)}; take another")
                if not drawn.isfinite().all():
                    raise NonFiniteImage(
                        f"{self.source}: the enlarged picture holds NaN or infinity; take another file"
                    )
                y, x = above * self.scale, before * self.scale
                rows, columns = (bottom - top) * self.scale, (right - left) * self.scale
                place = larger[:, :, top * self.scale :, left * self.scale :]
                place[:, :, :rows, :columns] = drawn[:, :, y : y + rows, x : x + columns]
        return larger


def _spans(length: int, whole: bool) -> Iterator[tuple[int, int]]:
    """Where a picture's tiles begin and end along a side: as equal as can be, none above TILE."""
    count = 1 if whole else -(-length // TILE)
    edges = [length * k // count for k in range(count + 1)]
    return zip(edges[:-1], edges[1:], strict=True)


def check_upscaler(path: str | Path) -> Weights:
    """What an upscaler's file has, before anything is computed.

    Raises RequestError where spandrel is missing; SourceNotFound, DamagedFile, UnsafeFile for a file that is not
    sound, which is told first.
    """
    weights = Weights.of(str(path), [Path(path).expanduser()])
    if importlib.util.find_spec("spandrel") is None:
        raise RequestError("upscaler", str(path), f"lanczos or latent, as spandrel is not installed; {REMEDY}")
    return weights


def load_upscaler(path: str | Path, device: torch.device | str = "cpu") -> Upscaler:
    """The upscaler in a file, .safetensors or what torch.save wrote, to compute on a device.

    Raises what `check_upscaler` does; UnknownModel for a file that holds no network that enlarges RGB pictures.
    """
    source = str(path)
    weights = check_upscaler(path)
    spandrel = _spandrel(source)
    tensors = _bare({key: weights.mapped(key).clone() for key in weights})
    try:
        found = spandrel.ModelLoader(device="cpu").load_from_state_dict(tensors)
    except Exception as error:
        # spandrel tells an architecture by some of its keys, and torch says what the others lack.
        if isinstance(error, MemoryError):
            raise
        why = (str(error) or "its tensors are of no network that spandrel knows").split("\n")[0]
        raise UnknownModel(
            f"{source}: no upscaler ({why}); give an ESRGAN or the like, or `lanczos` or `latent`; `calotype info "
            f"{source}` says what the file is"
        ) from error
    purpose, scale = getattr(found, "purpose", "none"), int(getattr(found, "scale", 1))
    channels = (getattr(found, "input_channels", 0), getattr(found, "output_channels", 0))
    if purpose not in {"SR", "FaceSR"} or scale < 2 or channels != (3, 3):
        raise UnknownModel(
            f"{source}: a network for {purpose}, {channels[0]} to {channels[1]} channels, {scale} times as large; "
            "wanted is one that makes RGB pictures 2 times as large or more"
        )
    found.to(torch.float32).eval()
    whole = getattr(getattr(found, "tiling", None), "name", "SUPPORTED") != "SUPPORTED"
    return Upscaler(source, found.model, found, scale, whole, torch.device(device))


def _spandrel(source: str) -> Any:
    try:
        return importlib.import_module("spandrel")
    except (ImportError, RuntimeError) as error:  # torchvision for another torch raises the second
        allowed = (
            f"lanczos or latent, as spandrel does not start ({error}); {REMEDY}, with the torchvision for your torch"
        )
        raise RequestError("upscaler", source, allowed) from error


def _bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the names of the dicts that trainers put a network's tensors in; of several, the averaged ones."""
    for prefix in PREFIXES:
        within = {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        if within and (len(within) == len(tensors) or prefix.startswith("params")):
            tensors = within
    return tensors
