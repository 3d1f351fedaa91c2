"""Tiny random Hunyuan-DiT pipelines, built and saved by diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline
from tiny_flux import framed, randomised, word_tokenizer
from tiny_unets import vae
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.018,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
}
BERT_MARKS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
T5_MARKS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def transformer(*, styled: bool, seed: int = 0, **more: Any) -> HunyuanDiT2DModel:
    """Six blocks, of which the last two take back what the first two left."""
    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "hidden_size": 48,
        "num_layers": 6,
        "mlp_ratio": 4.3637,
        "cross_attention_dim": 32,
        "cross_attention_dim_t5": 48,
        "pooled_projection_dim": 40,
        "use_style_cond_and_image_meta_size": styled,
    }
    made = HunyuanDiT2DModel(**{**settings, **more})
    randomised(made, seed, spread=0.12)
    return made


def bert(vocabulary: int = 32, seed: int = 1) -> BertModel:
    made = BertModel(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=56,
            max_position_embeddings=96,
            pad_token_id=0,
        )
    )
    randomised(made, seed, spread=0.3)
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight += 1
    return made


def t5(vocabulary: int = 32, seed: int = 2) -> T5EncoderModel:
    made = T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=48,
            d_kv=16,
            d_ff=64,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    randomised(made, seed, spread=0.2)
    return made


def bert_tokenizer() -> PreTrainedTokenizerFast:
    return framed(word_tokenizer(BERT_MARKS, 77), "[CLS] $A [SEP]")


def t5_tokenizer() -> PreTrainedTokenizerFast:
    return framed(word_tokenizer(T5_MARKS, 256), "$A </s>")


def hunyuan(
    folder: Path, *, styled: bool, scheduler: Any | None = None, tokenizers: tuple[Any, Any] | None = None
) -> HunyuanDiTPipeline:
    """Save a tiny Hunyuan-DiT in the folder, and return it: 1.1's form with `styled`, 1.2's without.

    `tokenizers` are real ones, whose vocabularies the encoders then have.
    """
    sizes = (32, 32) if tokenizers is None else (47020, 250112)
    tokenizer, tokenizer_2 = tokenizers or (bert_tokenizer(), t5_tokenizer())
    pipeline = HunyuanDiTPipeline(
        transformer=transformer(styled=styled),
        text_encoder=bert(sizes[0]),
        text_encoder_2=t5(sizes[1]),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        vae=vae(),
        scheduler=scheduler or DDPMScheduler(**SCHEDULE, steps_offset=1, clip_sample=False, timestep_spacing="leading"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline
