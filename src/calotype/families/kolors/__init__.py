"""Kolors: SDXL's UNet led by ChatGLM3, which reads Chinese and English."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from calotype.families.diffusion import DiffusionSettings
from calotype.families.kolors.conditioning import condition
from calotype.families.kolors.config import DIFFUSION, TEXT_TOKENS
from calotype.families.unets import UNetConditioning, UNetModel, unet_defaults
from calotype.nn.autoencoder import Autoencoder
from calotype.nn.tiny_autoencoder import TinyAutoencoder
from calotype.nn.unet import UNet
from calotype.request import Defaults, Job
from calotype.text.chatglm import ChatGlmEncoder
from calotype.text.glm_tokenizer import GlmTokenizer


class KolorsModel(UNetModel):
    """Kolors and its fine-tunes."""

    family = "kolors"

    def __init__(
        self,
        *,
        unet: UNet,
        chatglm: ChatGlmEncoder,
        vae: Autoencoder | TinyAutoencoder,
        tokenizer: GlmTokenizer,
        diffusion: DiffusionSettings,
        defaults: Defaults,
        variant: str,
        source: str,
        device: torch.device,
    ) -> None:
        super().__init__(
            unet=unet,
            vae=vae,
            diffusion=diffusion,
            defaults=defaults,
            variant=variant,
            source=source,
            device=device,
        )
        self.chatglm = chatglm
        self.tokenizer = tokenizer
        self.encoders = (chatglm,)

    def condition(self, prompt: str, job: Job, *, negative: bool) -> UNetConditioning:
        assert job.text_tokens is not None
        return condition(
            prompt,
            encoder=self.chatglm,
            tokenizer=self.tokenizer,
            text_tokens=job.text_tokens,
        )._replace(negative=(negative,))

    def conditioned_by(self, job: Job) -> Hashable:
        return job.text_tokens


DEFAULTS = unet_defaults(size=1024, steps=25, cfg_scale=5.0, diffusion=DIFFUSION, text_tokens=TEXT_TOKENS, sizes=True)
