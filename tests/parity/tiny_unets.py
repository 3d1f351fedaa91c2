"""Tiny random Stable Diffusion and SDXL pipelines, built and saved by diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny_flux import framed, randomised, word_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

CLIP_MARKS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "</s>"}
LENGTH = 16
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def vae(seed: int = 3) -> AutoencoderKL:
    made = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        scaling_factor=0.5,
    )
    randomised(made, seed)
    return made


def unet(*, sdxl: bool, seed: int = 0, **more: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 2,
        "sample_size": 8,
        "norm_num_groups": 32,
    }
    if sdxl:
        settings |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (2, 4, 4),
            "transformer_layers_per_block": (1, 1, 2),
            "cross_attention_dim": 32 + 48,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 40,
        }
    else:
        settings |= {
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 4,
            "cross_attention_dim": 32,
        }
    made = UNet2DConditionModel(**{**settings, **more})
    randomised(made, seed, spread=0.12)
    return made


def clip(width: int, *, seed: int, projection: int | None = None, act: str = "quick_gelu") -> Any:  # noqa: ANN401
    config = CLIPTextConfig(
        vocab_size=32,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_act=act,
        projection_dim=projection or width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    made = CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)
    randomised(made, seed, spread=0.3)
    return made


def tokenizer(padding: str = "</s>") -> PreTrainedTokenizerFast:
    return framed(word_tokenizer({**CLIP_MARKS, "pad_token": padding}, LENGTH), "<s> $A </s>")


def sd1(folder: Path, scheduler: Any | None = None, **more: Any) -> StableDiffusionPipeline:
    """Save a tiny Stable Diffusion 1.x in the folder, and return it; `more` goes to the UNet."""
    pipeline = StableDiffusionPipeline(
        unet=unet(sdxl=False, **more),
        vae=vae(),
        text_encoder=clip(32, seed=1),
        tokenizer=tokenizer(),
        scheduler=scheduler or DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sdxl(folder: Path, scheduler: Any | None = None, **more: Any) -> StableDiffusionXLPipeline:
    """Save a tiny SDXL in the folder, and return it; `more` goes to the UNet."""
    pipeline = StableDiffusionXLPipeline(
        unet=unet(sdxl=True, **more),
        vae=vae(),
        text_encoder=clip(32, seed=1),
        text_encoder_2=clip(48, seed=2, projection=40, act="gelu"),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer("!"),
        scheduler=scheduler or DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    )
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def kolors(folder: Path, tokenizer_folder: Path, scheduler: Any | None = None) -> Any:  # noqa: ANN401
    """Save a tiny Kolors in the folder, and return it. The tokenizer is the real one, whose vocabulary is its own."""
    from diffusers import EulerDiscreteScheduler, KolorsPipeline
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
    from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

    encoder = ChatGLMModel(
        ChatGLMConfig(
            num_layers=3,
            padded_vocab_size=65024,
            hidden_size=32,
            ffn_hidden_size=48,
            kv_channels=16,
            num_attention_heads=2,
            multi_query_attention=True,
            multi_query_group_num=1,
            seq_length=256,
            add_qkv_bias=True,
            rmsnorm=True,
            apply_residual_connection_post_layernorm=False,
            original_rope=True,
            bias_dropout_fusion=False,
        )
    )
    randomised(encoder, 1, spread=0.3)
    pipeline = KolorsPipeline(
        unet=unet(
            sdxl=True,
            encoder_hid_dim=32,
            encoder_hid_dim_type="text_proj",
            cross_attention_dim=40,
            projection_class_embeddings_input_dim=6 * 8 + 32,
        ),
        vae=vae(),
        text_encoder=encoder,
        tokenizer=ChatGLMTokenizer(str(tokenizer_folder / "tokenizer.model")),
        scheduler=scheduler
        or EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.014,
            beta_schedule="scaled_linear",
            num_train_timesteps=1100,
            timestep_spacing="leading",
            steps_offset=1,
        ),
    )
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
