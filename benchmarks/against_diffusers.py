"""Calotype and diffusers in turns, on the same weights: load time, seconds a step, peak memory, and their ratios.

    python benchmarks/against_diffusers.py [--dtype bfloat16] [--rounds 3] [--steps 3] [--save]

Both sides draw the same 512x512 picture with a FLUX of full width that has four blocks (two joint, two single),
CLIP at its real size, a T5 of full width with two layers, and the real autoencoder: random weights, saved by diffusers
as a folder. Each run is a process of its own, so that loading starts cold and peak memory is its own; the sides
alternate. The first step is left out of the seconds a step, as both warm up in it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

import calotype

PROMPT = "a red fox in the snow"
SIDE = 512

CHILD = {
    "calotype": """
import time; t0 = time.perf_counter()
import calotype
t1 = time.perf_counter()
from calotype import Progress, Request, Picture
model = calotype.load(FOLDER, device="cpu", dtype=DTYPE)
t2 = time.perf_counter()
marks = []
for event in model.stream(Request(prompt=PROMPT, width=SIDE, height=SIDE, steps=STEPS, seed=7, embedded_guidance=3.5)):
    if isinstance(event, Progress): marks.append(time.perf_counter())
    else: picture = event.image
""",
    "diffusers": """
import time; t0 = time.perf_counter()
import torch
from diffusers import FluxPipeline
t1 = time.perf_counter()
model = FluxPipeline.from_pretrained(FOLDER, torch_dtype=getattr(torch, DTYPE))
t2 = time.perf_counter()
marks = []
def mark(pipeline, step, time_, tensors):
    marks.append(time.perf_counter())
    return tensors
picture = model(PROMPT, height=SIDE, width=SIDE, num_inference_steps=STEPS, guidance_scale=3.5,
    generator=torch.Generator().manual_seed(7), callback_on_step_end=mark).images[0]
""",
}
TAIL = """
t3 = time.perf_counter()
import json, re, hashlib
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) / 2**20
picture.save(OUT)
gaps = [b - a for a, b in zip(marks, marks[1:])]
print(json.dumps({"import": t1 - t0, "load": t2 - t1, "step": min(gaps), "whole": t3 - t2, "peak GiB": peak}))
"""
MEASURES = ("import", "load", "step", "whole", "peak GiB")


def build(folder: Path, dtype: str) -> None:
    """Save the random pipeline with diffusers."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "parity"))
    from tiny_flux import framed, word_tokenizer

    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    pipeline = FluxPipeline(
        transformer=FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12, max_position_embeddings=77, bos_token_id=1, eos_token_id=0, pad_token_id=0,
            )
        ),
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=2, num_heads=64,
                feed_forward_proj="gated-gelu", is_encoder_decoder=False,
            )
        ),
        tokenizer=framed(
            word_tokenizer(
                {"eos_token": "<end>", "pad_token": "<end>", "bos_token": "<start>", "unk_token": "<end>"}, 77
            ),
            "<start> $A <end>",
        ),
        tokenizer_2=framed(
            word_tokenizer({"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}, 512), "$A </s>"
        ),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
            use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
    )  # fmt: skip
    pipeline.save_pretrained(folder)


def run(side: str, folder: Path, dtype: str, steps: int, picture: Path) -> dict[str, float]:
    """One process; its measures."""
    settings = f"FOLDER={str(folder)!r}; DTYPE={dtype!r}; STEPS={steps + 1}; PROMPT={PROMPT!r}; SIDE={SIDE}\n"
    settings += f"OUT={str(picture)!r}\n"
    quiet = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", settings + CHILD[side] + TAIL],
        capture_output=True,
        text=True,
        env=quiet,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--steps", type=int, default=3)
    arguments.add_argument("--save", action="store_true", help="keep the result under benchmarks/results")
    arguments.add_argument("--folder", type=Path, help="where the random pipeline is kept between runs")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base: Path = given.folder or Path(temporary)
        folder = base / f"flux-4-blocks-{given.dtype}"
        if not (folder / "model_index.json").exists():
            build(folder, given.dtype)
        rounds = {side: list[dict[str, float]]() for side in CHILD}
        for number in range(given.rounds):
            for side in CHILD if number % 2 == 0 else reversed(CHILD):
                rounds[side].append(run(side, folder, given.dtype, given.steps, base / f"{side}.png"))
                print(side, {name: round(value, 3) for name, value in rounds[side][-1].items()}, flush=True)
        difference = picture_difference(base / "calotype.png", base / "diffusers.png")
    middle = {
        side: {name: statistics.median(one[name] for one in runs) for name in MEASURES} for side, runs in rounds.items()
    }
    ratio = {name: middle["calotype"][name] / middle["diffusers"][name] for name in MEASURES}
    print(f"\n{'':12}{'calotype':>12}{'diffusers':>12}{'ratio':>8}")
    for name in MEASURES:
        print(f"{name:12}{middle['calotype'][name]:12.3f}{middle['diffusers'][name]:12.3f}{ratio[name]:8.2f}")
    print(f"largest difference of the two pictures: {difference} of 255")
    if given.save:
        file = Path(__file__).parent / "results" / f"flux-4-blocks-{given.dtype}-cpu.json"
        result = {
            "command": " ".join(["python", "benchmarks/against_diffusers.py", "--dtype", given.dtype,
                                 "--rounds", str(given.rounds), "--steps", str(given.steps)]),
            "date": date.today().isoformat(),
            "machine": f"{cpu()}, {os.cpu_count()} cores",
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")}
            | {"python": platform.python_version(), "calotype": calotype.__version__},
            "median": middle,
            "ratio": ratio,
            "largest difference of 255": difference,
            "rounds": rounds,
        }  # fmt: skip
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(f"kept in {file}")


def picture_difference(first: Path, second: Path) -> int:
    """The largest difference of any channel of any pixel."""
    import numpy as np
    from PIL import Image

    a, b = (np.asarray(Image.open(file).convert("RGB"), dtype=int) for file in (first, second))
    return int(abs(a - b).max())


def cpu() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
