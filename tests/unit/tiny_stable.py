"""Tiny random models of the UNet families, in the layouts they are published in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tiny_checkpoints as tiny
import torch
from tiny_glm import CHATGLM as CHATGLM_CONFIG
from tiny_glm import tokenizer_model
from torch import Tensor

from calotype.checkpoint.autoencoders import AUTOENCODER
from calotype.checkpoint.chatglm import CHATGLM
from calotype.checkpoint.text_encoders import CLIP
from calotype.families.kolors.keys import UNET as KOLORS_UNET
from calotype.families.sd1.keys import UNET as SD1_UNET
from calotype.families.sdxl.keys import UNET as SDXL_UNET
from calotype.nn.autoencoder import AutoencoderConfig
from calotype.nn.unet import UNetConfig
from calotype.text.clip import ClipConfig

# Single files say nothing of heads: the families' own rules must hold of these sizes.
CLIP_L = replace(tiny.CLIP_TEXT, quick_gelu=False)  # 64 wide
CLIP_G = replace(tiny.CLIP_TEXT, width=832, heads=13, layers=2, mlp_width=32, projection=832)
SD1 = UNetConfig(
    channels_in=4,
    channels_out=4,
    widths=(32, 64),
    blocks=2,
    depths=(1, 0),
    middle_depth=1,
    heads=(8, 8),
    text_width=CLIP_L.width,
    text_width_in=None,
    vector_width=None,
    size_width=256,
    convolved=True,
)
SDXL = replace(
    SD1,
    widths=(64, 128),
    depths=(0, 2),
    middle_depth=2,
    heads=(1, 2),
    text_width=CLIP_L.width + CLIP_G.width,
    vector_width=CLIP_G.width + 6 * 256,
    convolved=False,
)
KOLORS = replace(
    SDXL,
    text_width=40,
    text_width_in=CHATGLM_CONFIG.width,
    vector_width=CHATGLM_CONFIG.width + 6 * 256,
)
VAE = AutoencoderConfig(latent_channels=4, widths=(32, 32), blocks=1, quant_convs=True, scale=0.18215, shift=0.0)
IDS = "text_model.embeddings.position_ids"


def sd1(dtype: torch.dtype = torch.float32, unet: UNetConfig = SD1, clip: ClipConfig = CLIP_L) -> dict[str, Tensor]:
    """A Stable Diffusion 1.x in one file."""
    unets = tiny.tensors(SD1_UNET, "original", unet, dtype=dtype)
    clips = tiny.tensors(CLIP, "transformers", clip, seed=1, dtype=dtype, extras=(IDS,))
    vaes = tiny.tensors(AUTOENCODER, "original", VAE, seed=2, dtype=dtype)
    return {
        **tiny.under("model.diffusion_model.", unets),
        **tiny.under("cond_stage_model.transformer.", clips),
        **tiny.under("first_stage_model.", vaes),
    }


def sdxl(
    dtype: torch.dtype = torch.float32, clip_l: ClipConfig = CLIP_L, clip_g: ClipConfig = CLIP_G
) -> dict[str, Tensor]:
    """An SDXL in one file, its second encoder in OpenCLIP's layout."""
    unet = replace(SDXL, text_width=clip_l.width + clip_g.width, vector_width=clip_g.width + 6 * 256)
    unets = tiny.tensors(SDXL_UNET, "original", unet, dtype=dtype)
    first = tiny.tensors(CLIP, "transformers", clip_l, seed=1, dtype=dtype, extras=(IDS,))
    second = tiny.tensors(CLIP, "openclip", clip_g, seed=3, dtype=dtype, extras=("logit_scale",))
    vaes = tiny.tensors(AUTOENCODER, "original", VAE, seed=2, dtype=dtype)
    return {
        **tiny.under("model.diffusion_model.", unets),
        **tiny.under("conditioner.embedders.0.transformer.", first),
        **tiny.under("conditioner.embedders.1.model.", second),
        **tiny.under("first_stage_model.", vaes),
    }


def kolors(folder: Path, dtype: torch.dtype = torch.float32) -> list[Path]:
    """Kolors' parts in original layouts, each in a file of its own, and the folder of its tokenizer."""
    # What the width of a head shows by, where no config.json says it.
    frequencies = ("transformer.rotary_pos_emb.inv_freq",)
    chatglm = tiny.tensors(CHATGLM, "transformers", CHATGLM_CONFIG, seed=1, dtype=dtype, extras=frequencies)
    return [
        tiny.save(folder / "unet.safetensors", tiny.tensors(KOLORS_UNET, "original", KOLORS, dtype=dtype)),
        tiny.save(folder / "chatglm.safetensors", chatglm),
        tiny.save(folder / "vae.safetensors", tiny.tensors(AUTOENCODER, "original", VAE, seed=2, dtype=dtype)),
        glm_tokenizer(folder / "tokenizer"),
    ]


def glm_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(tokenizer_model())
    return folder


def tokenizers(folder: Path) -> list[Path]:
    """CLIP's, for both encoders."""
    return [tiny.clip_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")]
