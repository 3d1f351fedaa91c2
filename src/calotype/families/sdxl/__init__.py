"""SDXL and SDXL Turbo: a UNet led by two CLIPs, and told sizes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from calotype.errors import RequestError
from calotype.families.diffusion import DiffusionSettings
from calotype.families.sdxl.conditioning import condition
from calotype.families.sdxl.config import DIFFUSION, TURBO_DIFFUSION
from calotype.families.unets import UNetConditioning, UNetModel, unet_defaults
from calotype.nn.autoencoder import Autoencoder
from calotype.nn.tiny_autoencoder import TinyAutoencoder
from calotype.nn.unet import UNet
from calotype.request import Defaults, Job
from calotype.text.clip import ClipEncoder
from calotype.text.tokenizers import PromptTokenizer


class SdxlModel(UNetModel):
    """SDXL, SDXL Turbo and their fine-tunes."""

    family = "sdxl"

    def __init__(
        self,
        *,
        unet: UNet,
        clip_l: ClipEncoder,
        clip_g: ClipEncoder,
        vae: Autoencoder | TinyAutoencoder,
        tokenizer_l: PromptTokenizer,
        tokenizer_g: PromptTokenizer,
        embeddings_l: Mapping[str, Tensor],
        embeddings_g: Mapping[str, Tensor],
        empty_is_zero: bool,
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
        self.clip_l = clip_l
        self.clip_g = clip_g
        self.encoders = (clip_l, clip_g)
        self.empty_is_zero = empty_is_zero
        self._readers = ((clip_l, tokenizer_l, embeddings_l), (clip_g, tokenizer_g, embeddings_g))

    def condition(self, prompt: str, job: Job, *, negative: bool) -> UNetConditioning:
        assert job.clip_skip is not None
        layers = min(len(self.clip_l.layers), len(self.clip_g.layers))
        if job.clip_skip > layers:
            raise RequestError("clip_skip", job.clip_skip, f"1 to {layers}, the number of layers of both encoders")
        return condition(
            prompt,
            encoders=self._readers,
            clip_skip=job.clip_skip,
            empty_is_zero=self.empty_is_zero and negative,
        )._replace(negative=(negative,))

    def conditioned_by(self, job: Job) -> Hashable:
        return job.clip_skip


DEFAULTS = unet_defaults(size=1024, steps=30, cfg_scale=6.0, diffusion=DIFFUSION, clip_skip=2, sizes=True)
TURBO_DEFAULTS = unet_defaults(size=512, steps=1, cfg_scale=1.0, diffusion=TURBO_DIFFUSION, clip_skip=2, sizes=True)
