"""FLUX.1: a flow transformer led by T5 and CLIP."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor

from calotype.control.hints import Hint
from calotype.families.flow import FlowSettings
from calotype.families.flux.conditioning import FluxConditioning, encode, joined
from calotype.families.flux.config import FluxConfig
from calotype.families.flux.controlnet import FluxControlNet
from calotype.families.flux.network import Added, FluxNetwork, to_latent, to_tokens
from calotype.families.model import FamilyModel, Prepared, masked
from calotype.nn.attention import in_rows
from calotype.nn.autoencoder import Autoencoder, preview_projection
from calotype.nn.tiny_autoencoder import TinyAutoencoder
from calotype.request import Defaults, Job
from calotype.sampling.levels import FLOW_SCHEDULES, Level, Levels
from calotype.sampling.samplers import SAMPLERS, Denoise, Noise
from calotype.text.clip import ClipEncoder
from calotype.text.t5 import T5Encoder
from calotype.text.tokenizers import PromptTokenizer

LATENT_GRAIN = 8  # pixels a side of one latent


class FluxModel(FamilyModel[FluxConditioning]):
    """FLUX.1 dev, schnell, their fine-tunes, and small models of the same architecture."""

    family = "flux"
    prediction = "flow"

    def __init__(
        self,
        *,
        transformer: FluxNetwork,
        clip: ClipEncoder,
        t5: T5Encoder,
        vae: Autoencoder | TinyAutoencoder,
        clip_tokenizer: PromptTokenizer,
        t5_tokenizer: PromptTokenizer,
        sampling: FlowSettings,
        defaults: Defaults,
        variant: str,
        source: str,
        device: torch.device,
    ) -> None:
        self.transformer = transformer
        self.clip = clip
        self.t5 = t5
        # Narrower than the base class says, and never replaced.
        self.vae: Autoencoder | TinyAutoencoder = vae  # pyright: ignore[reportIncompatibleVariableOverride]
        self.clip_tokenizer = clip_tokenizer
        self.t5_tokenizer = t5_tokenizer
        self.sampling = sampling
        self.defaults = replace(defaults, grain=LATENT_GRAIN * transformer.config.patch)
        self.variant = variant
        self.source = source
        self.device = device
        self.encoders = (clip, t5)
        self.backbone = transformer
        self.inpaints = fills(transformer.config)

    def condition(self, prompt: str, job: Job, *, negative: bool) -> FluxConditioning:
        assert job.text_tokens is not None
        return encode(
            prompt,
            t5=self.t5,
            t5_tokenizer=self.t5_tokenizer,
            clip=self.clip,
            clip_tokenizer=self.clip_tokenizer,
            text_tokens=job.text_tokens,
        )

    def conditioned_by(self, job: Job) -> Hashable:
        return job.text_tokens

    def levels(self, job: Job) -> Levels:
        return FLOW_SCHEDULES[job.schedule](job.steps, self.shift(job), job.denoising_strength or 1.0)

    def shift(self, job: Job) -> float:
        """The job's own shift, or the checkpoint's: fixed, or growing with the number of image tokens."""
        return self.sampling.shift_for(job.size.tokens(self.defaults.grain)) if job.shift is None else job.shift

    def noise_shape(self, job: Job) -> tuple[int, ...]:
        channels = self.vae.config.latent_channels
        return channels, job.height // LATENT_GRAIN, job.width // LATENT_GRAIN

    def start(self, job: Job, levels: Levels, noise: Noise) -> Tensor:
        return levels.path[0].sigma * noise()

    def prepared(self, conditioning: FluxConditioning, levels: Sequence[Level], job: Job) -> Prepared:
        network = self.transformer
        number = {level.time: i for i, level in enumerate(levels)}
        grain, patch = self.defaults.grain, network.config.patch
        rows, columns = job.height // grain, job.width // grain
        ready = network.prepare(
            conditioning.text,
            conditioning.pooled,
            job.embedded_guidance if network.config.guidance_input else None,
            torch.tensor(list(number), device=self.device),
            rows,
            columns,
        )

        def placed(jobs: Sequence[Job], hints: Sequence[Hint]) -> Denoise:
            additions = self._additions(conditioning, list(number), job, hints)

            def denoise(x: Tensor, level: Level) -> Tensor:
                x = in_rows(x, max(len(x), len(conditioning.text)))
                step, image = number[level.time], to_tokens(x, patch)
                tokens = network(image, ready, step, additions(image, step))
                velocity = to_latent(tokens.float(), rows, columns, patch)
                # x = alpha * clean + sigma * noise and velocity = noise - clean, alpha + sigma = 1
                return x[:, : velocity.shape[1]] - level.sigma * velocity

            return denoise

        return placed

    def _additions(
        self, conditioning: FluxConditioning, times: Sequence[float], job: Job, hints: Sequence[Hint]
    ) -> Callable[[Tensor, int], list[Added]]:
        """What ControlNets add: tokens, the number of the level -> of each that leads there."""
        led = [(hint, hint.network) for hint in hints if isinstance(hint.network, FluxControlNet)]
        assert len(led) == len(hints)
        rows, columns = job.height // self.defaults.grain, job.width // self.defaults.grain
        levels = torch.tensor(times, device=self.device)
        prepared = [
            network.prepare_hinted(
                conditioning.text, conditioning.pooled, job.embedded_guidance, levels, rows, columns, hint.kind
            )
            for hint, network in led
        ]
        embedded = [network.embed(to_tokens(hint.picture, self.transformer.config.patch)) for hint, network in led]

        def additions(image: Tensor, step: int) -> list[Added]:
            image = image[..., : self.transformer.config.image_width_out]
            made: list[Added] = []
            for (hint, network), own, seen in zip(led, prepared, embedded, strict=True):
                if hint.leads(step, len(times)):
                    seen = seen.repeat(len(image) // len(seen), 1, 1)
                    made.append(network(image, own, step, seen, hint.scale))
            return made

        return additions

    def joined(self, conditionings: Sequence[FluxConditioning]) -> FluxConditioning | None:
        return joined(conditionings)

    def beside(self, picture: Tensor, mask: Tensor) -> Tensor:
        """The masked picture, and the mask's own pixels as channels of the latents that they lie under."""
        mask = (mask >= 0.5).float()
        under = rearrange(mask, "b 1 (h p) (w q) -> b (p q) h w", p=LATENT_GRAIN, q=LATENT_GRAIN)
        return torch.cat([self.encode(masked(picture, mask)), under], dim=1)

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


def fills(config: FluxConfig) -> bool:
    """Whether a transformer takes a masked picture and a mask beside the latents, as FLUX.1 Fill does."""
    beside = config.image_width - config.image_width_out
    return beside == config.image_width_out + (LATENT_GRAIN * config.patch) ** 2


def defaults(*, steps: int, embedded_guidance: float | None, text_tokens: int, size: int = 1024) -> Defaults:
    """FLUX's defaults, as far as variants share them."""
    return Defaults(
        width=size,
        height=size,
        grain=2 * LATENT_GRAIN,
        steps=steps,
        cfg_scale=1.0,
        embedded_guidance=embedded_guidance,
        sampler="euler",
        schedule="linear",
        shift=None,
        text_tokens=text_tokens,
        samplers=tuple(SAMPLERS),
        schedules=tuple(FLOW_SCHEDULES),
        shifts=True,
    )


DEV_DEFAULTS = defaults(steps=28, embedded_guidance=3.5, text_tokens=512)
FILL_DEFAULTS = defaults(steps=50, embedded_guidance=30.0, text_tokens=512)
SCHNELL_DEFAULTS = defaults(steps=4, embedded_guidance=None, text_tokens=256)
