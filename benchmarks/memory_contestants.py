"""One contestant of memory_cpu.py, in a process of its own: draws one picture and prints its seconds as JSON.

python benchmarks/memory_contestants.py NAME SETTINGS
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from times import Times, clock


@dataclass
class Settings:
    """What every contestant is told."""

    folder: str  # in diffusers' layout
    offloaded: str  # where diffusers keeps the files of its groups
    picture: str
    side: int
    steps: int  # that count, after the first
    prompt: str = "a red fox in the snow"
    seed: int = 7


def calotype(settings: Settings, times: Times, **chosen: Any) -> None:
    import calotype

    model = calotype.load(settings.folder, device="cpu", dtype="bfloat16", **chosen)
    family = model.family
    family.condition, family.decode = times.reading(family.condition), times.decoding(family.decode)
    times.loaded = clock()
    request = calotype.Request(
        prompt=settings.prompt,
        width=settings.side,
        height=settings.side,
        steps=settings.steps + 1,
        cfg_scale=1,
        seed=settings.seed,
    )
    for event in model.stream(request):
        if isinstance(event, calotype.Picture):
            times.end = clock()
            event.image.save(settings.picture)
        else:
            times.marks.append(clock())


def pipeline_of(settings: Settings) -> Any:
    import torch
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(
        settings.folder, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.bfloat16
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def grouped(settings: Settings) -> Any:
    """diffusers' group offload, one layer at a time, to files: what corresponds to `stream` on a CPU.

    The files are kept, and written where they are not there yet.
    """
    from diffusers.hooks import apply_group_offloading

    pipeline = pipeline_of(settings)
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        apply_group_offloading(
            getattr(pipeline, name),
            onload_device="cpu",
            offload_device="cpu",
            offload_type="leaf_level",
            offload_to_disk_path=str(Path(settings.offloaded) / name),
        )
    return pipeline


def layerwise(settings: Settings) -> Any:
    """diffusers' layerwise casting of the transformer: float8 without scales, widened layer by layer."""
    import torch

    pipeline = pipeline_of(settings)
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    return pipeline


def diffusers(settings: Settings, times: Times, build: Any = pipeline_of) -> None:
    import torch

    pipeline = build(settings)
    pipeline.encode_prompt = times.reading(pipeline.encode_prompt)
    pipeline.vae.decode = times.decoding(pipeline.vae.decode)
    times.loaded = clock()

    def mark(_pipeline: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        times.marks.append(clock())
        return tensors

    drawn: Any = pipeline(
        settings.prompt,
        height=settings.side,
        width=settings.side,
        num_inference_steps=settings.steps + 1,
        guidance_scale=1,
        generator=torch.Generator().manual_seed(settings.seed),
        callback_on_step_end=mark,
    )
    times.end = clock()
    drawn.images[0].save(settings.picture)


def group_files(settings: Settings, times: Times) -> None:
    """Nothing but the files of diffusers' groups."""
    grouped(settings)
    times.loaded = times.text_end = times.end = clock()
    times.marks = [times.end, times.end]


FLOAT8 = {"transformer": "fp8_e4m3"}
CONTESTANTS = {
    "calotype": partial(calotype, memory="components"),
    "calotype stream": partial(calotype, memory="stream"),
    "calotype float8": partial(calotype, memory="components", storage=FLOAT8),
    "calotype float8 stream": partial(calotype, memory="stream", storage=FLOAT8),
    "diffusers": diffusers,
    "diffusers group offload": partial(diffusers, build=grouped),
    "diffusers layerwise float8": partial(diffusers, build=layerwise),
    "group-files": group_files,
}


if __name__ == "__main__":
    name, told = sys.argv[1:]
    taken = Times()
    CONTESTANTS[name](Settings(**json.loads(told)), taken)
    print("\n" + json.dumps(taken.summary()))
