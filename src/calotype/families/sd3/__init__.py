"""Stable Diffusion 3 and 3.5: a flow transformer led by two CLIPs and T5."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from calotype.control.hints import Hint
from calotype.errors import RequestError
from calotype.families.flow import FlowSettings
from calotype.families.model import FamilyModel, Prepared
from calotype.families.sd3.conditioning import ClipReader, Sd3Conditioning, T5Reader, condition, joined
from calotype.families.sd3.controlnet import PictureControlNet, Sd3ControlNet
from calotype.families.sd3.network import Prepared as Ready
from calotype.families.sd3.network import Sd3Network
from calotype.nn.attention import in_rows
from calotype.nn.autoencoder import Autoencoder, preview_projection
from calotype.nn.leader import Leader
from calotype.nn.tiny_autoencoder import TinyAutoencoder
from calotype.request import Defaults, Job
from calotype.sampling.levels import FLOW_SCHEDULES, Flow, Level, Levels, shifted
from calotype.sampling.samplers import SAMPLERS, Denoise, Noise


class Sd3Model(FamilyModel[Sd3Conditioning]):
    """Stable Diffusion 3 medium, 3.5 medium, large and large-turbo, and their fine-tunes.

    At least one of `clip_l`, `clip_g` and `t5` is there.
    """

    family = "sd3"
    prediction = "flow"

    def __init__(
        self,
        *,
        transformer: Sd3Network,
        clip_l: ClipReader | None,
        clip_g: ClipReader | None,
        t5: T5Reader | None,
        vae: Autoencoder | TinyAutoencoder,
        sampling: FlowSettings,
        defaults: Defaults,
        variant: str,
        source: str,
        device: torch.device,
    ) -> None:
        self.transformer = transformer
        self.clip_l = clip_l
        self.clip_g = clip_g
        self.t5 = t5
        # Narrower than the base class says, and never replaced.
        self.vae: Autoencoder | TinyAutoencoder = vae  # pyright: ignore[reportIncompatibleVariableOverride]
        self.sampling = sampling
        self.grain = vae.config.factor * transformer.config.patch
        self.defaults = replace(
            defaults,
            grain=self.grain,
            largest=transformer.config.positions * self.grain,
            shift=None if sampling.dynamic else sampling.shift,
        )
        self.variant = variant
        self.source = source
        self.device = device
        self.encoders = tuple(reader.encoder for reader in (clip_l, clip_g, t5) if reader is not None)
        self.backbone = transformer

    def condition(self, prompt: str, job: Job, *, negative: bool) -> Sd3Conditioning:
        assert job.clip_skip is not None
        assert job.text_tokens is not None
        clips = [reader.encoder for reader in (self.clip_l, self.clip_g) if reader is not None]
        layers = min((len(clip.layers) for clip in clips), default=job.clip_skip)
        if job.clip_skip > layers:
            raise RequestError("clip_skip", job.clip_skip, f"1 to {layers}, the number of layers of both CLIP encoders")
        config = self.transformer.config
        return condition(
            prompt,
            clip_l=self.clip_l,
            clip_g=self.clip_g,
            t5=self.t5,
            clip_skip=job.clip_skip,
            text_tokens=job.text_tokens,
            text_width=config.text_width,
            pooled_width=config.pooled_width,
        )

    def conditioned_by(self, job: Job) -> Hashable:
        config = self.transformer.config
        return job.clip_skip, job.text_tokens, config.text_width, config.pooled_width

    def levels(self, job: Job) -> Levels:
        start = job.denoising_strength or 1.0
        shift = job.shift or self.sampling.shift_for(job.size.tokens(self.grain))
        if self.sampling.dynamic and job.schedule == "normal":
            return _normal_shifted_once(job.steps, shift, start)
        return FLOW_SCHEDULES[job.schedule](job.steps, shift, start)

    def noise_shape(self, job: Job) -> tuple[int, ...]:
        factor = self.vae.config.factor
        return self.vae.config.latent_channels, job.height // factor, job.width // factor

    def start(self, job: Job, levels: Levels, noise: Noise) -> Tensor:
        return levels.path[0].sigma * noise()

    def prepared(self, conditioning: Sd3Conditioning, levels: Sequence[Level], job: Job) -> Prepared:
        network = self.transformer
        number = {level: i for i, level in enumerate(levels)}
        ready = network.prepare(
            conditioning.text,
            conditioning.pooled,
            torch.tensor([level.time for level in levels], device=self.device),
            job.height // self.grain,
            job.width // self.grain,
        )

        def placed(jobs: Sequence[Job], hints: Sequence[Hint]) -> Denoise:
            additions = self._additions(conditioning, levels, jobs, hints)

            def denoise(x: Tensor, level: Level) -> Tensor:
                step = number[level]
                velocity: Tensor = network(x, ready, step, additions(x, ready, step))
                # x = alpha * clean + sigma * noise and velocity = noise - clean, alpha + sigma = 1
                return x - level.sigma * velocity.float()

            return denoise

        return placed

    def _additions(
        self, conditioning: Sd3Conditioning, levels: Sequence[Level], jobs: Sequence[Job], hints: Sequence[Hint]
    ) -> Callable[[Tensor, Ready, int], list[list[Tensor]]]:
        """What ControlNets add: latents, the transformer's own `Prepared`, the number of the level -> each one's."""
        times = torch.tensor([level.time for level in levels], device=self.device)
        rows, columns = jobs[0].height // self.grain, jobs[0].width // self.grain
        text, pooled = conditioning
        made: list[Callable[[Tensor, Ready, int], list[Tensor]]] = []

        def with_text(hint: Hint, network: Sd3ControlNet) -> Callable[[Tensor, Ready, int], list[Tensor]]:
            own, seen = network.prepare_hinted(text, pooled, times, rows, columns), network.embed(hint.picture)
            return lambda x, _, step: network(x, own, step, _for(seen, x), hint.scale)

        def without(hint: Hint, network: PictureControlNet) -> Callable[[Tensor, Ready, int], list[Tensor]]:
            own = network.prepare_hinted(in_rows(pooled, len(pooled) * len(jobs)), times)
            seen = network.embed(hint.picture)
            return lambda x, prepared, step: network(
                self.transformer.enter(x, prepared), own, step, _for(seen, x), hint.scale
            )

        for hint in hints:
            if isinstance(hint.network, Sd3ControlNet):
                made.append(with_text(hint, hint.network))
            else:
                assert isinstance(hint.network, PictureControlNet)
                made.append(without(hint, hint.network))

        def additions(x: Tensor, prepared: Ready, step: int) -> list[list[Tensor]]:
            leading = (one for hint, one in zip(hints, made, strict=True) if hint.leads(step, len(times)))
            return [one(x, prepared, step) for one in leading]

        return additions

    def seen_by(self, network: Leader, picture: Tensor, mask: Tensor | None, shows: str = "none") -> Tensor:
        if isinstance(network, PictureControlNet) and shows == "canny":
            # As its authors give it to the autoencoder, which others reach as 2 x - 1: 255 x / 2 + 1 / 2.
            picture = (127.5 * picture + 1.5) / 2
        seen = super().seen_by(network, picture, mask)
        assert isinstance(network, (Sd3ControlNet, PictureControlNet))
        if network.settings.pooled or network.sees == "masked":
            return seen
        # InstantX's were trained on latents that are scaled and not shifted.
        return seen + self.vae.config.scale * self.vae.config.shift

    def joined(self, conditionings: Sequence[Sd3Conditioning]) -> Sd3Conditioning | None:
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


def _normal_shifted_once(steps: int, shift: float, start: float) -> Levels:
    """`normal` as diffusers has it where the shift grows with the picture: its least time is not shifted before."""
    process, least = Flow(), 1 / 1000
    times: list[float] = np.linspace(least + (1 - least) * start, least, steps).tolist()
    return Levels(process, (*(process.at_time(shifted(time, shift)) for time in times), process.at_time(0.0)))


def defaults(*, steps: int, cfg_scale: float) -> Defaults:
    """Stable Diffusion 3's defaults, as far as variants share them."""
    return Defaults(
        width=1024,
        height=1024,
        grain=16,
        steps=steps,
        cfg_scale=cfg_scale,
        embedded_guidance=None,
        sampler="euler",
        schedule="normal",
        shift=3.0,
        text_tokens=256,
        samplers=tuple(SAMPLERS),
        schedules=tuple(FLOW_SCHEDULES),
        clip_skip=2,
        shifts=True,
    )


DEFAULTS = {
    "medium": defaults(steps=28, cfg_scale=7.0),
    "3.5-medium": defaults(steps=40, cfg_scale=4.5),
    "3.5-large": defaults(steps=28, cfg_scale=3.5),
    "3.5-large-turbo": defaults(steps=4, cfg_scale=1.0),
}


def _for(seen: Tensor, x: Tensor) -> Tensor:
    """What was seen (b n d), once for each of x's rows."""
    return seen.repeat(len(x) // len(seen), 1, 1)
