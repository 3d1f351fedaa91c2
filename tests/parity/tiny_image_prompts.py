"""Tiny random IP-Adapters under their authors' key names, with image encoders that transformers made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_flux import randomised
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

SIDE, PATCH = 28, 7
WIDTH, PROJECTION = 48, 40


def encoder(folder: Path, *, seed: int = 11, width: int = WIDTH, projection: int = PROJECTION, **more: Any) -> Any:  # noqa: ANN401
    settings = {"hidden_act": "gelu", "num_attention_heads": 4, **more}
    made = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=projection,
            **settings,
        )
    )
    randomised(made, seed, spread=0.15)
    made.save_pretrained(folder)
    return made.eval()


def attentions(unet: Any, seed: int) -> dict[str, Tensor]:  # noqa: ANN401
    """Keys and values for each cross-attention of a diffusers UNet, numbered as the adapters' authors do."""
    drawn = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for number, name in enumerate(unet.attn_processors):
        if ".attn2." in name:
            module = unet.get_submodule(name.removesuffix(".processor"))
            for x, layer in (("k", module.to_k), ("v", module.to_v)):
                found[f"{number}.to_{x}_ip.weight"] = 0.3 * torch.randn(layer.weight.shape, generator=drawn)
    return found


def projection(seed: int, text: int, *, kind: str, tokens: int = 4, seen: int | None = None) -> dict[str, Tensor]:
    """What leads from the encoder to tokens: of a base adapter, of "plus", of "full"."""
    drawn = torch.Generator().manual_seed(seed)

    def some(*shape: int, gain: float = 0.2, around: float = 0.0) -> Tensor:
        return around + gain * torch.randn(shape, generator=drawn)

    def norm(name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": some(width, around=1.0), f"{name}.bias": some(width)}

    if kind == "base":
        seen = seen or PROJECTION
        return {"proj.weight": some(tokens * text, seen), "proj.bias": some(tokens * text), **norm("norm", text)}
    seen = seen or WIDTH
    if kind == "full":
        return {
            "proj.0.weight": some(seen, seen),
            "proj.0.bias": some(seen),
            "proj.2.weight": some(text, seen),
            "proj.2.bias": some(text),
            **norm("proj.3", text),
        }
    width, inner = 32, 2 * 64
    made = {
        "latents": some(1, tokens, width, gain=1.0),
        "proj_in.weight": some(width, seen),
        "proj_in.bias": some(width),
        "proj_out.weight": some(text, width),
        "proj_out.bias": some(text),
        **norm("norm_out", text),
    }
    for i in range(4):  # as many as diffusers expects
        made |= norm(f"layers.{i}.0.norm1", width) | norm(f"layers.{i}.0.norm2", width)
        made |= norm(f"layers.{i}.1.0", width)
        made[f"layers.{i}.0.to_q.weight"] = some(inner, width)
        made[f"layers.{i}.0.to_kv.weight"] = some(2 * inner, width)
        made[f"layers.{i}.0.to_out.weight"] = some(width, inner)
        made[f"layers.{i}.1.1.weight"] = some(4 * width, width)
        made[f"layers.{i}.1.3.weight"] = some(width, 4 * width)
    return made


def adapter(file: Path, unet: Any, *, kind: str, seed: int = 21, **more: Any) -> Path:  # noqa: ANN401
    """An IP-Adapter for a diffusers UNet: nested dicts in a .bin, flat names in a .safetensors."""
    text = unet.config.cross_attention_dim
    parts = {"image_proj": projection(seed, text, kind=kind, **more), "ip_adapter": attentions(unet, seed + 1)}
    if file.suffix == ".bin":
        torch.save(parts, file)
    else:
        save_file({f"{part}.{name}": value for part, held in parts.items() for name, value in held.items()}, file)
    return file
