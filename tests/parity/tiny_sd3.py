"""Tiny random Stable Diffusion 3 pipelines, saved by diffusers: what the parity tests load here and run there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tiny_flux import WORDS, framed, randomised, word_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

LENGTH = 16  # tokens of a CLIP
CLIP_L, CLIP_G = 32, 832  # widths; by itself the second is known by being the wider one
TEXT = 880
POSITIONS = 12  # tokens a side that have a position
START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = 32  # as in the published one, the last two are start and end, and "!" is number 0


def transformer(
    *,
    norms: bool = False,
    dual: tuple[int, ...] = (),
    head: int = 16,
    seed: int = 0,
    text: int = TEXT,
    pooled: int = CLIP_L + CLIP_G,
) -> SD3Transformer2DModel:
    made = SD3Transformer2DModel(
        sample_size=12,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=4,
        attention_head_dim=head,
        num_attention_heads=64 // head,
        joint_attention_dim=text,
        caption_projection_dim=64,
        pooled_projection_dim=pooled,
        pos_embed_max_size=POSITIONS,
        dual_attention_layers=dual,
        qk_norm="rms_norm" if norms else None,
    )
    # Text enters through many inputs: wider weights would drown the picture in it.
    randomised(made, seed, spread=0.1)
    return made


def clip(width: int, *, seed: int, act: str = "gelu", projected: bool = True) -> CLIPTextModelWithProjection:
    """Not `projected`: the projection is the identity, which files may leave out."""
    made = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=max(width // 64, 1),
            max_position_embeddings=LENGTH,
            hidden_act=act,
            projection_dim=width,
            bos_token_id=VOCABULARY - 2,
            eos_token_id=VOCABULARY - 1,
            pad_token_id=VOCABULARY - 1,
        )
    )
    randomised(made, seed, spread=2 / width**0.5)
    if not projected:
        torch.nn.init.eye_(made.text_projection.weight)
    return made


def t5(*, seed: int = 4) -> T5EncoderModel:
    made = T5EncoderModel(
        T5Config(
            vocab_size=32,
            d_model=TEXT,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    randomised(made, seed, spread=0.08)
    return made


def vae(*, seed: int = 3) -> AutoencoderKL:
    made = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    randomised(made, seed)
    return made


def clip_tokenizer(padding: str = END) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(("!", *WORDS))}
    vocabulary |= {START: VOCABULARY - 2, END: VOCABULARY - 1}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": padding}
    fast = PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=LENGTH, **marks)
    return framed(fast, f"{START} $A {END}")


def t5_tokenizer() -> PreTrainedTokenizerFast:
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return framed(word_tokenizer(marks, 512), "$A </s>")


def build(
    folder: Path,
    *,
    with_t5: bool = True,
    scheduler: Any | None = None,
    clip_l: CLIPTextModelWithProjection | None = None,
    **more: Any,
) -> StableDiffusion3Pipeline:
    """Save a pipeline under `folder` and return it; `more` goes to the transformer."""
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer(**more),
        text_encoder=clip_l or clip(CLIP_L, seed=1, act="quick_gelu"),
        text_encoder_2=clip(CLIP_G, seed=2),
        text_encoder_3=t5() if with_t5 else None,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer("!"),
        tokenizer_3=t5_tokenizer() if with_t5 else None,
        vae=vae(),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline
