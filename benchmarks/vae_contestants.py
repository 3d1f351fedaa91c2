"""One contestant of vae_cpu.py, in a process of its own: one decode or encode, its seconds and memory as JSON.

python benchmarks/vae_contestants.py NAME SETTINGS
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from times import clock


@dataclass
class Settings:
    """What every contestant is told."""

    folder: str  # the weights, and the input
    result: str  # where the answer goes
    way: str  # decode or encode
    side: int  # of the picture
    dtype: str
    threads: int


Way = Callable[[Any], Any]


def calotype(settings: Settings, pixels: int) -> Way:
    import torch
    from safetensors.torch import load_file

    from calotype.families.sd1.config import VAE
    from calotype.nn import strips
    from calotype.nn.autoencoder import Autoencoder

    strips.WHOLE = pixels
    with torch.device("meta"):
        net = Autoencoder(VAE)
    net.load_state_dict(load_file(f"{settings.folder}/calotype.safetensors"), assign=True)
    net = net.to(getattr(torch, settings.dtype)).eval()
    return net.decode if settings.way == "decode" else net.encode


def diffusers(settings: Settings, *, tiling: bool) -> Way:
    import torch
    from diffusers import AutoencoderKL

    dtype = getattr(torch, settings.dtype)
    net: Any = AutoencoderKL.from_pretrained(settings.folder, torch_dtype=dtype).eval()
    if tiling:
        net.enable_tiling()
    scale = net.config.scaling_factor

    def decode(latent: Any) -> Any:
        return net.decode((latent / scale).to(dtype)).sample.float() / 2 + 0.5

    def encode(picture: Any) -> Any:
        return net.encode((picture * 2 - 1).to(dtype)).latent_dist.mode().float() * scale

    return decode if settings.way == "decode" else encode


CONTESTANTS: dict[str, Callable[[Settings], Way]] = {
    "calotype": lambda settings: calotype(settings, 0),
    "calotype whole": lambda settings: calotype(settings, 2**62),
    "diffusers": lambda settings: diffusers(settings, tiling=False),
    "diffusers tiling": lambda settings: diffusers(settings, tiling=True),
}


def peak() -> float:
    """GiB that this process has held at most so far, as the kernel counts them."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) / 2**20


def main(name: str, settings: Settings) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(settings.threads)
    run = CONTESTANTS[name](settings)
    given = load_file(f"{settings.folder}/{settings.way}-{settings.side}.safetensors")["x"]
    with torch.inference_mode():
        corner = 8 if settings.way == "decode" else 64
        run(given[:, :, :corner, :corner].contiguous())  # what is done once only
        before = peak()
        start, worked = clock(), time.process_time()
        made = run(given)
        seconds, worked = clock() - start, time.process_time() - worked
    most = peak()
    save_file({"x": made.contiguous()}, settings.result)
    print("\n" + json.dumps({"seconds": seconds, "CPU seconds": worked, "peak GiB": most, "peak GiB before": before}))


if __name__ == "__main__":
    main(sys.argv[1], Settings(**json.loads(sys.argv[2])))
