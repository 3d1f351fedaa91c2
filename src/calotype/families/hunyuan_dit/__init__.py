"""Hunyuan-DiT: a diffusion transformer led by BERT and multilingual T5, which read Chinese and English."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor

from calotype.control.hints import Hint
from calotype.families.diffusion import DiffusionSettings
from calotype.families.hunyuan_dit.conditioning import HunyuanConditioning, condition, joined
from calotype.families.hunyuan_dit.config import DIFFUSION, ORIGINAL_SIZE
from calotype.families.hunyuan_dit.controlnet import HunyuanControlNet
from calotype.families.hunyuan_dit.network import HunyuanNetwork, HunyuanTrunk
from calotype.families.hunyuan_dit.network import Prepared as Ready
from calotype.families.model import FamilyModel, Prepared
from calotype.families.unets import ESTIMATES
from calotype.nn.attention import in_rows
from calotype.nn.autoencoder import Autoencoder, preview_projection
from calotype.nn.tiny_autoencoder import TinyAutoencoder
from calotype.request import Defaults, Job
from calotype.sampling.levels import VP_SCHEDULES, Level, Levels
from calotype.sampling.samplers import SAMPLERS, Denoise, Noise
from calotype.text.bert import BertEncoder
from calotype.text.t5 import T5Encoder
from calotype.text.tokenizers import PaddedTokenizer


class HunyuanModel(FamilyModel[HunyuanConditioning]):
    """Hunyuan-DiT 1.0 to 1.2, distilled ones, and their fine-tunes."""

    family = "hunyuan_dit"

    def __init__(
        self,
        *,
        transformer: HunyuanNetwork,
        bert: BertEncoder,
        t5: T5Encoder,
        vae: Autoencoder | TinyAutoencoder,
        bert_tokenizer: PaddedTokenizer,
        t5_tokenizer: PaddedTokenizer,
        diffusion: DiffusionSettings,
        defaults: Defaults,
        variant: str,
        source: str,
        device: torch.device,
    ) -> None:
        self.transformer = transformer
        self.bert = bert
        self.t5 = t5
        # Narrower than the base class says, and never replaced.
        self.vae: Autoencoder | TinyAutoencoder = vae  # pyright: ignore[reportIncompatibleVariableOverride]
        self.bert_tokenizer = bert_tokenizer
        self.t5_tokenizer = t5_tokenizer
        self.diffusion = diffusion
        self.prediction = diffusion.prediction
        self.grain = vae.config.factor * transformer.config.patch
        self.defaults = replace(
            defaults,
            grain=self.grain,
            sampler=diffusion.sampler,
            schedule=diffusion.schedule,
            sizes=transformer.config.styled,
        )
        self.variant = variant
        self.source = source
        self.device = device
        self.encoders = (bert, t5)
        self.backbone = transformer

    def condition(self, prompt: str, job: Job, *, negative: bool) -> HunyuanConditioning:
        config = self.transformer.config
        return condition(
            prompt,
            bert=self.bert,
            bert_tokenizer=self.bert_tokenizer,
            text_tokens=config.text_tokens,
            t5=self.t5,
            t5_tokenizer=self.t5_tokenizer,
            t5_tokens=config.t5_tokens,
        )

    def conditioned_by(self, job: Job) -> Hashable:
        return None

    def levels(self, job: Job) -> Levels:
        return self.diffusion.levels(job.schedule, job.steps, job.denoising_strength or 1.0)

    def noise_shape(self, job: Job) -> tuple[int, ...]:
        factor = self.vae.config.factor
        return self.vae.config.latent_channels, job.height // factor, job.width // factor

    def start(self, job: Job, levels: Levels, noise: Noise) -> Tensor:
        return noise() if self.diffusion.unit_start else levels.path[0].sigma * noise()

    def prepared(self, conditioning: HunyuanConditioning, levels: Sequence[Level], job: Job) -> Prepared:
        network = self.transformer
        number = {level: i for i, level in enumerate(levels)}
        times = torch.tensor([level.time for level in levels], device=self.device)
        rows, columns = job.height // self.grain, job.width // self.grain
        estimate = ESTIMATES[self.diffusion.prediction]
        alike = None if network.config.styled else network.prepare(*conditioning, None, times, rows, columns)

        def placed(jobs: Sequence[Job], hints: Sequence[Hint]) -> Denoise:
            def ready(network: HunyuanTrunk) -> Ready:
                each = HunyuanConditioning(*(in_rows(part, len(part) * len(jobs)) for part in conditioning))
                sizes = [told_sizes(own) for own in jobs] * len(conditioning.text)
                told = torch.tensor(sizes, device=self.device) if network.config.styled else None
                return network.prepare(*each, told, times, rows, columns)

            own = ready(network) if alike is None else alike
            led = [(hint, hint.network) for hint in hints if isinstance(hint.network, HunyuanControlNet)]
            assert len(led) == len(hints)
            beside = [(hint, control, ready(control), control.embed(hint.picture)) for hint, control in led]

            def additions(x: Tensor, step: int) -> list[list[Tensor]]:
                return [
                    control(x, made, step, seen.repeat(len(x) // len(seen), 1, 1), hint.scale)
                    for hint, control, made, seen in beside
                    if hint.leads(step, len(times))
                ]

            def denoise(x: Tensor, level: Level) -> Tensor:
                step = number[level]
                predicted = network(x, own, step, additions(x, step))[:, : network.config.channels_in]
                return estimate(x, predicted.float(), level)

            return denoise

        return placed

    def joined(self, conditionings: Sequence[HunyuanConditioning]) -> HunyuanConditioning | None:
        return joined(conditionings)

    def encode(self, picture: Tensor) -> Tensor:
        return self.vae.encode(picture)

    def decode(self, latent: Tensor) -> Tensor:
        return self.vae.decode(latent)

    def preview(self, latent: Tensor) -> Tensor:
        if isinstance(self.vae, TinyAutoencoder):
            return self.vae.decode(latent)
        projection = self._preview_projection.to(latent.device)
        colour = rearrange(latent, "b z h w -> b h w z") @ projection[:-1] + projection[-1]
        return rearrange(colour, "b h w c -> b c h w")

    @cached_property
    def _preview_projection(self) -> Tensor:
        assert isinstance(self.vae, Autoencoder)
        return preview_projection(self.vae)


def told_sizes(job: Job) -> tuple[int, ...]:
    """What 1.0 and 1.1 are told: width and height before scaling, width and height, left and top of the crop.

    Widths come first, as in training (diffusers hands over heights first, which differs off the square); what a request
    does not say of the original, the authors give as 1024 x 1024, whatever the picture's size.
    """
    told = (job.original_width, job.original_height, job.target_width, job.target_height, job.crop_left, job.crop_top)
    return tuple(size for size in told if size is not None)


DEFAULTS = Defaults(
    width=1024,
    height=1024,
    grain=16,
    steps=50,
    cfg_scale=6.0,
    embedded_guidance=None,
    sampler=DIFFUSION["1.2"].sampler,
    schedule=DIFFUSION["1.2"].schedule,
    shift=None,
    text_tokens=None,
    samplers=tuple(SAMPLERS),
    schedules=tuple(VP_SCHEDULES),
    original_size=ORIGINAL_SIZE,
)
