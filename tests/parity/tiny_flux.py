"""Tiny random FLUX pipelines, built and saved by diffusers: what the parity tests load here and run there."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers import FluxTransformer2DModel as Transformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

WORDS = ("a", "red", "apple", "on", "the", "blue", "table", "two", "cats", "and", "dog", "in", "snow", "fox", ",", ".")


def randomised(module: nn.Module, seed: int, spread: float = 0.08) -> nn.Module:
    """Weights that make every path count: gains near 1, all else normal."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") and parameter.ndim == 1 else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=rng))
    return module.eval()


def word_tokenizer(specials: dict[str, str], length: int) -> PreTrainedTokenizerFast:
    """A word-level tokenizer whose ids are the same here and in transformers."""
    vocabulary = [*dict.fromkeys(specials.values()), *WORDS]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=specials["unk_token"])
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **specials)


def framed(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """Add start and end marks as the real tokenizers do."""
    from tokenizers import processors

    marks = [(word, tokenizer.convert_tokens_to_ids(word)) for word in template.split() if word != "$A"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=marks)
    return tokenizer


def build(
    folder: Path, *, guidance: bool, dynamic: bool = True, tiny_vae: bool = False, beside: int = 0
) -> FluxPipeline:
    """Save a pipeline under `folder` and return it: dev's form with `guidance`, schnell's without.

    `beside` is the width of what tokens carry beside the latents.
    """
    transformer = Transformer(
        patch_size=1,
        in_channels=16 + beside,
        out_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=48,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(8, 12, 12),
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=16,
            hidden_act="quick_gelu",
            bos_token_id=1,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=32,
            d_model=48,
            d_kv=16,
            d_ff=96,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    vae: AutoencoderKL | AutoencoderTiny
    if tiny_vae:
        vae = AutoencoderTiny(
            latent_channels=4,
            encoder_block_out_channels=(16, 16, 16, 16),
            decoder_block_out_channels=(16, 16, 16, 16),
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
        )
    else:
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 32, 64, 64),
            layers_per_block=1,
            latent_channels=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        )
    for seed, module in enumerate((transformer, clip, t5, vae)):
        randomised(module, seed, spread=0.13 if module is vae and tiny_vae else 0.08)
    if tiny_vae:  # without norms its pictures hug black: lift them to mid grey
        with torch.no_grad():
            list(vae.decoder.parameters())[-1].fill_(0.4)
    pipeline = FluxPipeline(
        transformer=transformer,
        text_encoder=clip,
        text_encoder_2=t5,
        tokenizer=framed(
            word_tokenizer(
                {"eos_token": "<end>", "pad_token": "<end>", "bos_token": "<start>", "unk_token": "<end>"}, 16
            ),
            "<start> $A <end>",
        ),
        tokenizer_2=framed(
            word_tokenizer({"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}, 512), "$A </s>"
        ),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if dynamic else 1.0, use_dynamic_shifting=dynamic, base_shift=0.5, max_shift=1.15
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline
