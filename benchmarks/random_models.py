"""Models of real size with random weights, written from our own manifests; and tokenizers to go with them."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from calotype.checkpoint.writing import Planned, write
from calotype.loading import convert, manifest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "parity"))

REPEATED = 2**22  # a larger tensor repeats these: drawing billions would take longer than what is measured


def write_model(path: Path, layout: str, dtype: torch.dtype, seed: int = 0) -> None:
    """A file of random weights that keep signals at their size through the network, so that pictures are not flat.

    Normal with spread 1 / sqrt(inputs); biases and embeddings with 0.02; gains of norms near 1.
    """
    if path.exists():
        return
    rng = torch.Generator().manual_seed(seed)
    shapes = dict(manifest(layout))

    def tensor(key: str) -> Tensor:
        shape = shapes[key]
        if key.endswith("position_ids"):
            return torch.arange(shape[-1]).view(shape)
        count = math.prod(shape)
        inputs = math.prod(shape[1:]) if len(shape) > 1 and "embedding" not in key else 2500
        drawn = torch.randn(min(count, REPEATED), generator=rng) / math.sqrt(inputs)
        if len(shape) == 1 and key.endswith(("weight", ".scale")):
            drawn += 1
        return drawn.to(dtype).repeat(-(-count // max(len(drawn), 1)))[:count].view(shape)

    plan = [Planned(key, torch.int64 if key.endswith("position_ids") else dtype, shapes[key]) for key in shapes]
    write(path, plan, tensor)
    print(f"{path.name}: {path.stat().st_size / 1e9:.1f} GB", flush=True)


def real_tokenizer(name: str) -> Path | None:
    """A tokenizer's folder in DiffSynth's package, which carries the real ones of all families."""
    found = importlib.util.find_spec("diffsynth")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0]) / "tokenizer_configs" / name
    return folder if folder.is_dir() else None


def clip_tokenizer(folder: Path, padding: str | None = None) -> None:
    """CLIP's tokenizer where DiffSynth is installed, else a small stand-in. `padding` is SDXL's second encoder's.

    DiffSynth's own copy of that one is damaged; SD3's is the same tokenizer, whole.
    """
    if folder.is_dir():
        return
    real = real_tokenizer("stable_diffusion_3/tokenizer_2" if padding else "stable_diffusion/tokenizer")
    if real is not None:
        shutil.copytree(real, folder)
        return
    from tiny_flux import framed, word_tokenizer

    marks = {"eos_token": "<end>", "pad_token": padding or "<end>", "bos_token": "<start>", "unk_token": "<end>"}
    framed(word_tokenizer(marks, 77), "<start> $A <end>").save_pretrained(folder)


def t5_tokenizer(folder: Path) -> None:
    """A small stand-in for T5's."""
    from tiny_flux import framed, word_tokenizer

    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    framed(word_tokenizer(marks, 512), "$A </s>").save_pretrained(folder)


def sd1(folder: Path, dtype: torch.dtype) -> Path:
    """Stable Diffusion 1.5 as one file with its tokenizer beside it; the file."""
    file = folder / "sd1.safetensors"
    write_model(file, "sd1", dtype)
    clip_tokenizer(folder / "tokenizer")
    return file


def sd1_control(folder: Path, dtype: torch.dtype) -> Path:
    """A ControlNet for Stable Diffusion 1.5 in diffusers' layout, by diffusers; its folder.

    Its weights are as diffusers begins with; the layers that training starts at zero are small, so that it is seen.
    """
    if not (folder / "config.json").exists():
        from diffusers import ControlNetModel

        torch.manual_seed(2)
        network = ControlNetModel(cross_attention_dim=768)
        for name, weight in network.named_parameters():
            if not weight.any() and weight.ndim > 1 or name.startswith("controlnet_"):
                torch.nn.init.normal_(weight, std=0.02 / math.sqrt(weight[0].numel()))
        network.to(dtype).save_pretrained(folder)
    return folder


def as_diffusers(folder: Path, out: Path) -> Path:
    """The model in a folder, in diffusers' layout, by our own conversion: the same numbers, bit for bit."""
    if not (out / "model_index.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        convert(folder, out, "diffusers")
        index = json.loads((out / "model_index.json").read_text())
        for tokenizer in sorted(folder.glob("tokenizer*")):
            shutil.copytree(tokenizer, out / tokenizer.name, dirs_exist_ok=True)
            settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
            index[tokenizer.name] = ["transformers", settings["tokenizer_class"]]
        (out / "model_index.json").write_text(json.dumps(index, indent=2))
    return out
