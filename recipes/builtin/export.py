"""Write the trained model as the folder that Calotype ships: `python -m recipes.builtin.export --scale cpu`.

The averaged weights in float16, in the diffusers layout, through the same tables that read checkpoints; and
`calotype.json`, which says what the model likes to be asked for.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calotype.checkpoint.autoencoders import TINY_AUTOENCODER
from calotype.checkpoint.layouts import Part
from calotype.checkpoint.text_encoders import CLIP, T5
from calotype.families.flux.family import scheduler
from calotype.families.flux.keys import TRANSFORMER
from recipes.builtin.fetch import DATA
from recipes.builtin.model import SCALES, Networks, Scale

SHIPPED = Path(__file__).parents[2] / "src" / "calotype" / "builtin"
MOST_BYTES = 45_000_000
STEPS, CFG_SCALE = 8, 1.5


def export(scale: Scale, networks: Networks, vae: Mapping[str, Tensor], data: Path, out: Path) -> int:
    """Write the model to `out` and return the bytes of its weights."""
    size = 0
    index: dict[str, Any] = {"_class_name": "FluxPipeline"}
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    for folder, part, config, state in _parts(scale, networks, vae):
        layout = next(layout for layout in part.layouts if layout.settings is not None)
        assert layout.settings is not None
        _, binding = part.bind(layout, config)
        weights = {name: tensor.half().contiguous().clone() for name, tensor in binding.save(state)}
        settings = layout.settings(config)
        if part is CLIP:
            settings |= {"bos_token_id": 3, "pad_token_id": 0}
        (out / folder).mkdir(parents=True, exist_ok=True)
        diffusers = "_class_name" in settings
        file = out / folder / ("diffusion_pytorch_model.safetensors" if diffusers else "model.safetensors")
        save_file(weights, file, {"format": "pt"})
        size += file.stat().st_size
        _write_json(out / folder / "config.json", settings)
        name = settings.get("_class_name") or settings["architectures"][0]
        index[folder] = ["diffusers" if diffusers else "transformers", name]
    marks = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    for folder, file, more in (
        ("tokenizer", "tokenizer-clip.json", {"bos_token": "<s>", "model_max_length": scale.clip.positions}),
        ("tokenizer_2", "tokenizer.json", {"model_max_length": scale.text_tokens}),
    ):
        (out / folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data / file, out / folder / "tokenizer.json")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **marks, **more}
        _write_json(out / folder / "tokenizer_config.json", settings)
        index[folder] = ["transformers", "PreTrainedTokenizerFast"]
    (out / "scheduler").mkdir(parents=True, exist_ok=True)
    _write_json(out / "scheduler" / "scheduler_config.json", scheduler("schnell"))
    defaults = {
        "width": scale.pixels,
        "height": scale.pixels,
        "steps": STEPS,
        "cfg_scale": CFG_SCALE,
        "text_tokens": scale.text_tokens,
    }
    _write_json(out / "calotype.json", {"variant": "builtin", "dtype": "float32", "defaults": defaults})
    _write_json(out / "model_index.json", index)
    return size


Trained = tuple[str, Part[Any], Any, Mapping[str, Tensor]]  # folder, part, configuration, weights


def _parts(scale: Scale, networks: Networks, vae: Mapping[str, Tensor]) -> tuple[Trained, ...]:
    return (
        ("transformer", TRANSFORMER, scale.transformer, networks.transformer.state_dict()),
        ("text_encoder", CLIP, scale.clip, networks.clip.state_dict()),
        ("text_encoder_2", T5, scale.t5, networks.t5.state_dict()),
        ("vae", TINY_AUTOENCODER, scale.vae, vae),
    )


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--scale", choices=sorted(SCALES), default="cpu")
    arguments.add_argument("--data", type=Path, default=DATA)
    arguments.add_argument("--out", type=Path, default=SHIPPED)
    given = arguments.parse_args()
    scale, folder = SCALES[given.scale], given.data / given.scale
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    networks = Networks(scale)
    networks.load_state_dict(state["averaged"])
    size = export(scale, networks, load_file(folder / "vae.safetensors"), given.data, given.out)
    print(f"step {state['step']}: {size / 1e6:.1f} MB of weights in {given.out}")
    if size > MOST_BYTES:
        raise SystemExit(f"{size:,} bytes of weights; at most {MOST_BYTES:,} are shipped")


if __name__ == "__main__":
    main()
