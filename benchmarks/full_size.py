"""A model at its real size with random bfloat16 weights: does it load, run, and stay within its memory?

    python benchmarks/full_size.py MODEL --folder FOLDER [--steps 2] [--memory stream] [--storage chatglm=int4] [--save]
    python benchmarks/full_size.py flux1-dev --folder FOLDER --steps 28 --side 1024 --device cuda --budget 8 [--save]

MODEL is flux1-dev, sd1, sdxl, sd3-medium, sd3.5-large, kolors or hunyuan_dit. Writes its files from our own manifests
(34, 2, 7, 15, 28, 18 and 8 GB, once; kept in FOLDER, which models may share: T5-XXL and CLIP-L are the same), loads
them by memory mapping in a process of its own, and draws one picture. Tokenizers are the real ones where DiffSynth's
package is installed, which carries them, else small stand-ins. With --budget, torch may take no more than so many GB of
a GPU's memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from measuring import arithmetic, command, commit, keep, machine, run, versions
from random_models import clip_tokenizer, real_tokenizer, t5_tokenizer, write_model

CHILD = Path(__file__).parent / "full_size_child.py"


@dataclass(frozen=True, kw_only=True)
class Model:
    """`files` by name, each with its manifest; `tokenizers` by folder, each with what writes it."""

    title: str
    side: int
    files: Mapping[str, str]
    tokenizers: Mapping[str, Callable[[Path], None]]


def real_folder(name: str) -> Callable[[Path], None]:
    """What copies a tokenizer that has no stand-in."""

    def copy(folder: Path) -> None:
        real = real_tokenizer(name)
        if real is None:
            raise SystemExit(f"{name} has no stand-in: pip install diffsynth==1.1.9 --no-deps")
        shutil.copytree(real, folder, dirs_exist_ok=True)

    return copy


T5 = {"t5xxl.safetensors": "flux-text-encoder-2"}
THREE: Mapping[str, Callable[[Path], None]] = {
    "tokenizer": clip_tokenizer,
    "tokenizer_2": lambda folder: clip_tokenizer(folder, padding="!"),
    "tokenizer_3": t5_tokenizer,
}

MODELS = {
    "flux1-dev": Model(
        title="FLUX.1 dev",
        side=512,
        files={
            "flux1-dev.safetensors": "flux1-dev",
            "clip_l.safetensors": "flux-text-encoder",
            **T5,
            "ae.safetensors": "flux-ae",
        },
        tokenizers={"tokenizer": clip_tokenizer, "tokenizer_2": t5_tokenizer},
    ),
    "sd1": Model(
        title="Stable Diffusion 1.5",
        side=512,
        files={"v1-5-pruned-emaonly.safetensors": "sd1"},
        tokenizers={"tokenizer": clip_tokenizer},
    ),
    "sdxl": Model(
        title="SDXL",
        side=1024,
        files={"sd_xl_base_1.0.safetensors": "sdxl-base"},
        tokenizers={"tokenizer": clip_tokenizer, "tokenizer_2": lambda folder: clip_tokenizer(folder, padding="!")},
    ),
    "sd3-medium": Model(
        title="Stable Diffusion 3 medium",
        side=1024,
        files={"sd3_medium_incl_clips.safetensors": "sd3-medium-incl-clips", **T5},
        tokenizers=THREE,
    ),
    "sd3.5-large": Model(
        title="Stable Diffusion 3.5 large",
        side=1024,
        files={
            "sd3.5_large.safetensors": "sd3.5-large",
            "clip_l.safetensors": "flux-text-encoder",
            "clip_g.safetensors": "sd3-clip-g",
            **T5,
        },
        tokenizers=THREE,
    ),
    "hunyuan_dit": Model(
        title="Hunyuan-DiT 1.2",
        side=1024,
        files={
            "transformer.safetensors": "hunyuan-dit-1.2-diffusers",
            "bert.safetensors": "hunyuan-dit-text-encoder",
            "mt5.safetensors": "hunyuan-dit-text-encoder-2",
            "vae.safetensors": "hunyuan-dit-vae",
        },
        tokenizers={
            "tokenizer": real_folder("hunyuan_dit/tokenizer"),
            "tokenizer_2": real_folder("hunyuan_dit/tokenizer_t5"),
        },
    ),
    "kolors": Model(
        title="Kolors",
        side=1024,
        files={
            "unet.safetensors": "kolors-unet",
            "text_encoder.safetensors": "kolors-text-encoder",
            "vae.safetensors": "kolors-vae",
        },
        tokenizers={"tokenizer": real_folder("kolors/tokenizer")},
    ),
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", choices=tuple(MODELS))
    arguments.add_argument("--folder", type=Path, required=True, help="where the model is kept between runs")
    arguments.add_argument("--steps", type=int, default=2)
    arguments.add_argument("--side", type=int, help="else the model's own")
    arguments.add_argument("--cfg-scale", type=float, help="else the model's own")
    arguments.add_argument("--tile", type=int, metavar="PIXELS", help="diffuse in tiles of this size")
    arguments.add_argument("--stride", type=int, metavar="PIXELS", help="of tiles; else their size less an eighth")
    arguments.add_argument("--memory", default="auto", help="auto, resident, components or stream")
    arguments.add_argument("--storage", nargs="*", default=[], metavar="PART=TYPE", help="as chatglm=int4")
    arguments.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments.add_argument("--budget", type=float, metavar="GB", help="of a GPU's memory; else all of it")
    arguments.add_argument("--patience", type=float, default=180, help="seconds to wait for a quiet machine")
    arguments.add_argument("--save", action="store_true", help="keep the result under benchmarks/results")
    given = arguments.parse_args()
    model = MODELS[given.model]
    side = given.side or model.side
    for number, (name, layout) in enumerate(model.files.items()):
        write_model(given.folder / name, layout, torch.bfloat16, seed=number)
    own = given.folder / given.model  # tokenizers of one name differ between models
    for name, written in model.tokenizers.items():
        written(own / name)
    more = {} if given.cfg_scale is None else {"cfg_scale": given.cfg_scale}
    if given.tile is not None:
        more |= {"tiled": True, "tile_size": given.tile, "tile_stride": given.stride or given.tile * 7 // 8}
    told = {
        "sources": [str(given.folder / name) for name in model.files] + [str(own / name) for name in model.tokenizers],
        "picture": str(given.folder / "picture.png"),
        "side": side,
        "steps": given.steps,
        "device": given.device,
        "budget": given.budget,
        "more": more,
        "memory": given.memory,
        "storage": dict(item.split("=", 1) for item in given.storage),
    }
    one = run(CHILD, json.dumps(told), patience=given.patience)
    result = {
        "command": command("full_size.py", sys.argv[1:]),
        "date": date.today().isoformat(),
        "machine": machine() if given.device == "cpu" else torch.cuda.get_device_name(),
        "arithmetic": arithmetic("bfloat16") if given.device == "cpu" else "bfloat16",
        "versions": versions("torch"),
        "commit": commit(),
        "model": f"{model.title}, {side}x{side}, bfloat16, random weights, {given.steps} steps"
        + (f", tiles of {more['tile_size']} every {more['tile_stride']}" if given.tile else ""),
        "weights GB": sum((given.folder / name).stat().st_size for name in model.files) / 1e9,
        "measured": one.measured,
        "seen": one.seen,
    }
    print(json.dumps(result, indent=1))
    if given.save:
        stored = "".join(f"-{item.replace('=', '-')}" for item in given.storage)
        stored += "-tiled" if given.tile else ""
        stored += "" if given.memory == "auto" else f"-{given.memory}"
        stored += "" if given.budget is None else f"-{given.budget:g}GB"
        print(f"kept in {keep(f'{given.model}-full-size-{side}{stored}-{given.device}.json', result)}")


if __name__ == "__main__":
    main()
