"""The built-in model's networks: FLUX.1's architecture with small numbers, at two scales of one recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer
from torch import nn

from calotype.families.flux import FluxModel
from calotype.families.flux import defaults as flux_defaults
from calotype.families.flux.config import SCHNELL_SAMPLING, FluxConfig
from calotype.families.flux.network import FluxNetwork, Modulation, SingleBlock, Stream
from calotype.nn.norms import RMSNorm
from calotype.nn.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from calotype.text.clip import ClipConfig, ClipEncoder
from calotype.text.clip import Layer as ClipLayer
from calotype.text.t5 import Layer as T5Layer
from calotype.text.t5 import T5Config, T5Encoder
from calotype.text.tokenizers import PromptTokenizer

PAD, END, UNKNOWN, START = 0, 1, 2, 3  # ids of the special pieces, as the tokenizer is trained


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One size of the recipe."""

    pixels: int  # side of the pictures
    large: bool  # every object of the table, or the common ones
    text_tokens: int
    batch: int
    transformer: FluxConfig
    t5: T5Config
    clip: ClipConfig
    vae: TinyAutoencoderConfig
    decoder_seconds: float
    encoder_seconds: float


CPU = Scale(
    pixels=128,
    large=False,
    text_tokens=20,
    batch=96,
    transformer=FluxConfig(
        image_width=192,
        image_width_out=192,
        text_width=256,
        pooled_width=256,
        width=320,
        heads=5,
        mlp_ratio=4,
        joint_blocks=2,
        single_blocks=3,
        axes=(8, 28, 28),
        theta=10_000,
        guidance_input=False,
        patch=4,  # 16 image tokens a picture: twice as many samples a second as with FLUX.1's 2
    ),
    t5=T5Config(vocabulary=2048, width=256, layers=2, heads=4, head_width=64, mlp_width=512, buckets=32, distance=128),
    clip=ClipConfig(
        vocabulary=2048,
        width=256,
        layers=2,
        heads=4,
        mlp_width=768,
        positions=20,
        quick_gelu=True,
        projection=None,
        end=END,
    ),
    vae=TinyAutoencoderConfig(
        latent_channels=12,
        width=48,
        encoder_blocks=(1, 1, 1, 1),
        decoder_blocks=(3, 3, 2, 1),
        scale=1.0,
        shift=0.0,
    ),
    decoder_seconds=600,
    encoder_seconds=150,
)
GPU = Scale(
    pixels=256,
    large=True,
    text_tokens=32,
    batch=512,
    transformer=replace(CPU.transformer, image_width=64, image_width_out=64, patch=2, single_blocks=6),
    t5=replace(CPU.t5, vocabulary=4096, layers=3),
    clip=replace(CPU.clip, vocabulary=4096, layers=3, positions=32),
    vae=replace(CPU.vae, latent_channels=16, width=64, encoder_blocks=(1, 2, 2, 2), decoder_blocks=(3, 3, 3, 1)),
    decoder_seconds=240,
    encoder_seconds=60,
)
SCALES = {"cpu": CPU, "gpu": GPU}


class Networks(nn.Module):
    """What captions and pictures train together: both text encoders and the transformer."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.t5 = T5Encoder(scale.t5)
        self.clip = ClipEncoder(scale.clip)
        self.transformer = FluxNetwork(scale.transformer)
        initialise(self)


@torch.no_grad()
def initialise(networks: Networks) -> None:
    """Normal weights of deviation 1/sqrt(width in), half-open gates, and an output that starts at zero.

    Queries and keys begin with biases as large as their weights' part. Rotated by position, these make attention
    depend on where a token is from the first step on; at pure noise a token has no other way to know its place.
    """
    for module in networks.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            for name, bias in module.named_parameters():
                if name == "bias":
                    nn.init.zeros_(bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
    nn.init.normal_(networks.t5.position_bias.weight, std=0.1)
    nn.init.normal_(networks.clip.positions.weight, std=0.3)
    width = networks.transformer.config.width
    for module in networks.modules():
        if isinstance(module, (T5Layer, ClipLayer)):
            module.attention_out.weight.mul_(0.5)
            module.mlp_out.weight.mul_(0.5)
        if isinstance(module, T5Layer):  # T5 does not divide its logits by sqrt(head width)
            module.q.weight.mul_(networks.t5.config.head_width**-0.5)
        elif isinstance(module, Stream):
            nn.init.normal_(module.qkv.bias[: 2 * width])
        elif isinstance(module, SingleBlock):
            nn.init.normal_(module.inward.bias[: 2 * width])
        elif isinstance(module, Modulation):
            for parameter in module.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(0.2)
                elif parameter.shape[0] != 2 * width:  # all but the last: shift, scale, gate, over again
                    parameter.view(-1, width)[2::3] = 0.5
    nn.init.zeros_(networks.transformer.out.weight)


def tokenizers(file: str) -> tuple[PromptTokenizer, PromptTokenizer]:
    """The one vocabulary in its two roles: T5's (no start piece) and CLIP's."""
    tokenizer = Tokenizer.from_file(file)
    return (
        PromptTokenizer(tokenizer, start=None, end=END, padding=PAD),
        PromptTokenizer(tokenizer, start=START, end=END, padding=PAD),
    )


def assemble(
    scale: Scale, networks: Networks, vae: TinyAutoencoder, tokenizer_file: str, device: torch.device
) -> FluxModel:
    """The networks as the ordinary family model, to look at pictures between chunks of training."""
    t5_tokenizer, clip_tokenizer = tokenizers(tokenizer_file)
    return FluxModel(
        transformer=networks.transformer,
        clip=networks.clip,
        t5=networks.t5,
        vae=vae,
        clip_tokenizer=clip_tokenizer,
        t5_tokenizer=t5_tokenizer,
        sampling=SCHNELL_SAMPLING,
        defaults=replace(
            flux_defaults(steps=12, embedded_guidance=None, text_tokens=scale.text_tokens, size=scale.pixels),
            cfg_scale=2.0,
        ),
        variant="builtin",
        source="builtin",
        device=device,
    )
