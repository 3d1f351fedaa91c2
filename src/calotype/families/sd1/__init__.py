"""Stable Diffusion 1.x: a UNet led by CLIP-L."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from calotype.errors import RequestError
from calotype.families.diffusion import DiffusionSettings
from calotype.families.sd1.conditioning import condition
from calotype.families.sd1.config import DIFFUSION
from calotype.families.unets import UNetConditioning, UNetModel, unet_defaults
from calotype.nn.autoencoder import Autoencoder
from calotype.nn.tiny_autoencoder import TinyAutoencoder
from calotype.nn.unet import UNet
from calotype.request import Defaults, Job
from calotype.text.clip import ClipEncoder
from calotype.text.tokenizers import PromptTokenizer


class Sd1Model(UNetModel):
    """Stable Diffusion 1.x and its fine-tunes."""

    family = "sd1"

    def __init__(
        self,
        *,
        unet: UNet,
        clip: ClipEncoder,
        vae: Autoencoder | TinyAutoencoder,
        tokenizer: PromptTokenizer,
        embeddings: Mapping[str, Tensor],
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
        self.clip = clip
        self.tokenizer = tokenizer
        self.embeddings = embeddings
        self.encoders = (clip,)

    def condition(self, prompt: str, job: Job, *, negative: bool) -> UNetConditioning:
        assert job.clip_skip is not None
        layers = len(self.clip.layers)
        if job.clip_skip > layers:
            raise RequestError("clip_skip", job.clip_skip, f"1 to {layers}, the number of layers of this encoder")
        return condition(
            prompt,
            clip=self.clip,
            tokenizer=self.tokenizer,
            clip_skip=job.clip_skip,
            embeddings=self.embeddings,
        )._replace(negative=(negative,))

    def conditioned_by(self, job: Job) -> Hashable:
        return job.clip_skip


DEFAULTS = unet_defaults(size=512, steps=25, cfg_scale=7.0, diffusion=DIFFUSION, clip_skip=1)
