"""One contestant of sd1_cpu.py, in a process of its own: draws one picture and prints its seconds as JSON.

    python benchmarks/sd1_contestants.py NAME SETTINGS

Each contestant is asked for one step more than is counted: the first warms up, and is reported by itself. Runs under
other interpreters too, so that nothing is imported before a contestant's own clock starts.
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from times import Times, clock


@dataclass
class Settings:
    """What every contestant is told."""

    file: str  # the single file
    folder: str  # the same weights in diffusers' layout
    graphs: str  # where OpenVINO's converted networks lie
    picture: str
    dtype: str
    prompt: str
    side: int
    steps: int
    threads: int
    cfg_scale: float = 7.5
    seed: int = 7
    control: str = ""  # a ControlNet in diffusers' layout, where the picture shall be led
    hint: str = ""  # and by what
    more: dict[str, Any] = field(default_factory=dict)


def calotype(settings: Settings, times: Times, backend: str | None = None) -> None:
    import calotype

    chosen = {} if backend is None else {"backend": backend}
    model = calotype.load(settings.folder, device="cpu", dtype=settings.dtype, **chosen)
    import torch

    torch.set_num_threads(settings.threads)
    family = model.family
    family.condition, family.decode = times.reading(family.condition), times.decoding(family.decode)
    times.loaded = clock()
    request = calotype.Request(
        prompt=settings.prompt,
        width=settings.side,
        height=settings.side,
        steps=settings.steps + 1,
        cfg_scale=settings.cfg_scale,
        seed=settings.seed,
        controls=(calotype.Control(kind="none", model=settings.control, image=settings.hint),)
        if settings.control
        else (),
    )
    for event in model.stream(request):
        if isinstance(event, calotype.Picture):
            times.end = clock()
            event.image.save(settings.picture)
        else:
            times.marks.append(clock())


def calotype_openvino(settings: Settings, times: Times) -> None:
    calotype(settings, times, backend="openvino")


def diffusers(settings: Settings, times: Times) -> None:
    import torch
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
    from PIL import Image

    torch.set_num_threads(settings.threads)
    dtype = getattr(torch, settings.dtype)
    chosen: dict[str, Any] = {"torch_dtype": dtype, "safety_checker": None, "feature_extractor": None}
    led: dict[str, Any] = {}
    if settings.control:
        network = ControlNetModel.from_pretrained(settings.control, torch_dtype=dtype)
        pipeline = StableDiffusionControlNetPipeline.from_pretrained(settings.folder, controlnet=network, **chosen)
        led["image"] = Image.open(settings.hint)
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(settings.folder, **chosen)
    pipeline.set_progress_bar_config(disable=True)
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
        guidance_scale=settings.cfg_scale,
        generator=torch.Generator().manual_seed(settings.seed),
        callback_on_step_end=mark,
        **led,
    )
    times.end = clock()
    drawn.images[0].save(settings.picture)


def convert_openvino(settings: Settings, times: Times) -> None:
    """diffusers' networks as OpenVINO graphs of static shapes, both sides of guidance in one batch; once, on disk."""
    import openvino as ov
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = UNet2DConditionModel.from_pretrained(Path(settings.folder) / "unet", torch_dtype=torch.float32)

        def forward(self, x: torch.Tensor, time_: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return self.unet(x, time_, encoder_hidden_states=text, return_dict=False)[0]

    class Decode(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vae = AutoencoderKL.from_pretrained(Path(settings.folder) / "vae", torch_dtype=torch.float32)

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return self.vae.decode(z, return_dict=False)[0]

    side = settings.side // 8
    for name, network, example in (
        ("unet", Step, (torch.randn(2, 4, side, side), torch.tensor(500.0), torch.randn(2, 77, 768))),
        ("decoder", Decode, (torch.randn(1, 4, side, side),)),
    ):
        with torch.inference_mode():
            graph = ov.convert_model(network().eval(), example_input=example, input=[tuple(x.shape) for x in example])
        ov.save_model(graph, Path(settings.graphs) / f"{name}.xml", compress_to_fp16=False)
    times.loaded = times.end = times.text_end = clock()
    times.marks = [times.end, times.end]


def openvino(settings: Settings, times: Times) -> None:
    """What a user of OpenVINO alone would run: its graphs of diffusers' networks; text and solver stay in torch."""
    import numpy as np
    import openvino as ov
    import torch
    from diffusers import StableDiffusionPipeline
    from PIL import Image

    torch.set_num_threads(settings.threads)
    pipeline = StableDiffusionPipeline.from_pretrained(
        settings.folder, unet=None, vae=None, torch_dtype=torch.float32, safety_checker=None, feature_extractor=None
    )
    core = ov.Core()
    hints = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": settings.threads,
    }
    unet, decoder = (core.compile_model(Path(settings.graphs) / f"{name}.xml", "CPU", hints) for name in NETWORKS)
    times.loaded = clock()
    with torch.inference_mode():
        encode = times.reading(pipeline.encode_prompt)
        positive, negative = encode(settings.prompt, "cpu", 1, True)
        text = torch.cat([negative, positive]).numpy()
        scheduler = pipeline.scheduler
        scheduler.set_timesteps(settings.steps + 1)
        side = settings.side // 8
        x = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(settings.seed))
        x = x * scheduler.init_noise_sigma
        for step in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([x, x]), step).numpy()
            answer = unet([both, np.float32(step), text])[0]
            without, with_ = torch.from_numpy(answer).chunk(2)
            x = scheduler.step(without + settings.cfg_scale * (with_ - without), step, x).prev_sample
            times.marks.append(clock())
        decoded = times.decoding(decoder)([(x / 0.18215).numpy()])[0]
    picture = Image.fromarray(((decoded[0].transpose(1, 2, 0) / 2 + 0.5).clip(0, 1) * 255).round().astype(np.uint8))
    times.end = clock()
    picture.save(settings.picture)


NETWORKS = ("unet", "decoder")


def sdcpp(settings: Settings, times: Times) -> None:
    """stable-diffusion.cpp. Its two passes a step stay two; it reads the single file."""
    import ctypes

    library: Any = importlib.import_module("stable_diffusion_cpp")

    said: list[tuple[float, str]] = []

    def listen(_level: int, text: bytes, _data: ctypes.c_void_p) -> None:
        said.append((clock(), text.decode(errors="replace")))

    model = library.StableDiffusion(
        model_path=settings.file, n_threads=settings.threads, vae_decode_only=True, verbose=True, **settings.more
    )
    callback = library.sd_log_callback(listen)
    library.sd_set_log_callback(callback, ctypes.c_void_p(0))
    times.loaded = clock()
    pictures = model.generate_image(
        prompt=settings.prompt,
        width=settings.side,
        height=settings.side,
        cfg_scale=settings.cfg_scale,
        sample_method="euler",
        sample_steps=settings.steps + 1,
        seed=settings.seed,
        progress_callback=lambda step, steps, _seconds: times.marks.append(clock()) if step else None,
    )
    times.end = clock()

    def when(words: str) -> float:
        return next(moment for moment, text in said if words in text)

    def seconds(words: str) -> float:
        line = next(text for _, text in said if words in text)
        return float(line.rsplit("taking", 1)[1].strip().rstrip("s\n"))

    times.text, times.text_end = seconds("get_learned_condition completed"), when("get_learned_condition completed")
    times.decode = seconds("decode_first_stage completed")
    pictures[0].save(settings.picture)


CONTESTANTS = {
    "calotype": calotype,
    "calotype-openvino": calotype_openvino,
    "diffusers": diffusers,
    "openvino": openvino,
    "openvino-convert": convert_openvino,
    "sd.cpp": sdcpp,
}


if __name__ == "__main__":
    name, told = sys.argv[1:]
    taken = Times()
    CONTESTANTS[name](Settings(**json.loads(told)), taken)
    print("\n" + json.dumps(taken.summary()))
