"""A tiny random ChatGLM3 as diffusers builds it."""

from __future__ import annotations

import torch
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from tiny_flux import randomised


def encoder(seed: int = 7, **settings: int) -> ChatGLMModel:
    """Three layers, four query heads in two groups; the weights of its matrices large enough to count."""
    config = ChatGLMConfig(
        **{
            "num_layers": 3,
            "padded_vocab_size": 320,
            "hidden_size": 48,
            "ffn_hidden_size": 56,
            "kv_channels": 16,
            "num_attention_heads": 4,
            "multi_query_group_num": 2,
            "seq_length": 300,
            "multi_query_attention": True,
            "add_qkv_bias": True,
            "original_rope": True,
            **settings,
        }
    )
    model = ChatGLMModel(config, empty_init=False)
    randomised(model, seed, spread=0.2)
    return model.to(torch.float32)
