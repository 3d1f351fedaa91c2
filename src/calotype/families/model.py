"""What every family's model can do; `calotype.generate` needs no more than this."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.control.hints import Hint
from calotype.errors import RequestError
from calotype.lora.attach import Adapters
from calotype.memory.ladder import Memory
from calotype.nn.leader import Leader
from calotype.nn.unet import KeysAndValues
from calotype.request import Defaults, Job
from calotype.sampling.guidance import Prediction
from calotype.sampling.levels import Level, Levels
from calotype.sampling.samplers import Denoise, Noise

C = TypeVar("C")

Prepared = Callable[[Sequence[Job], Sequence[Hint]], Denoise]
"""A network made ready for some prompts: pictures to draw with all of them, hints -> the Denoise of these.

`jobs` are those of the pictures (tiles, mostly), of the size that it was made ready for. x has a row for each, with the
first prompt, then one for each with the second, and so on; or one for all prompts, where there is one picture. What a
model takes beside the latents follows them in x. `hints` are what ControlNets are led by, with a row for each picture;
RequestError where the family has none that run.
"""


class FamilyModel(ABC, Generic[C]):
    """A family's networks, ready to run. `C` is the family's conditioning: a typed tuple of tensors."""

    family: str  # as in data: flux, sd1, ...
    prediction: Prediction  # what the backbone predicts
    variant: str  # dev, schnell, ...
    source: str  # where it was loaded from, for metadata
    defaults: Defaults
    device: torch.device  # where the networks compute
    encoders: tuple[nn.Module, ...]
    backbone: nn.Module
    vae: nn.Module
    adapters: Adapters | None = None  # LoRA and its kin, where the model can take them
    inpaints: bool = False  # takes a mask and the masked picture beside the noisy latents, as `beside` makes them
    content: Hashable = None  # equal where encoders, tokenizers and settings are: prompts become the same then

    @cached_property
    def memory(self) -> Memory:
        """How the networks get to the device; all of them stay there unless `load` says otherwise."""
        return Memory(self.device)

    @abstractmethod
    def condition(self, prompt: str, job: Job, *, negative: bool) -> C:
        """What the backbone takes from a prompt, for one picture; `negative` where it is one to steer away from."""

    @abstractmethod
    def conditioned_by(self, job: Job) -> Hashable:
        """All of a job that `condition` depends on beside the prompt: equal values, equal conditioning.

        It is one for all tiles of a stage: what differs between them is told by `Prepared`.
        """

    @abstractmethod
    def levels(self, job: Job) -> Levels:
        """The noise levels that the job's schedule visits, from its denoising strength on."""

    @abstractmethod
    def noise_shape(self, job: Job) -> tuple[int, ...]:
        """The shape of one picture's latents, without the batch."""

    @abstractmethod
    def start(self, job: Job, levels: Levels, noise: Noise) -> Tensor:
        """The latents that sampling begins with where there is no input image, float32."""

    @abstractmethod
    def prepared(self, conditioning: C, levels: Sequence[Level], job: Job) -> Prepared:
        """The network, with all that depends neither on the noisy latents nor on the place in the picture computed.

        `conditioning` has a row for each prompt; `levels` are all those that will be asked for; `job` has the size.
        """

    def denoiser(
        self, conditioning: C, levels: Sequence[Level], jobs: Sequence[Job], *, hints: Sequence[Hint] = ()
    ) -> Denoise:
        """The estimate of clean latents of pictures of one size: `prepared`, for these alone."""
        return self.prepared(conditioning, levels, jobs[0])(jobs, hints)

    @abstractmethod
    def joined(self, conditionings: Sequence[C]) -> C | None:
        """Several conditionings as one, row after row; None where they are too unlike for one pass."""

    def seen_by(self, network: Leader, picture: Tensor, mask: Tensor | None, shows: str = "none") -> Tensor:
        """What a ControlNet sees of a picture (b 3 h w in 0..1): pixels, or latents, with the mask if it wants one.

        mask b 1 h w in 0..1, 1 where something is to be drawn; `shows` is the kind of the picture.
        """
        if network.sees == "picture":
            return picture
        if network.sees == "latents":
            return self.encode(picture)
        assert mask is not None  # without one a job is refused
        mask = (mask > 0.5).float()
        latents = self.encode(picture * (1 - mask))
        return torch.cat([latents, 1 - F.interpolate(mask, size=latents.shape[2:])], dim=1)

    def with_pictures(self, conditioning: C, pictures: Sequence[KeysAndValues]) -> C:
        """Conditioning with image prompts: of each, what each cross-attention reads of it.

        RequestError where the family, or its backend, has none that run.
        """
        raise RequestError("image_prompts", f"{len(pictures)} of them", f"none: they do not run with {self.family} yet")

    def beside(self, picture: Tensor, mask: Tensor) -> Tensor:
        """What a model that inpaints takes beside the noisy latents, on their grid: b c h w.

        picture b 3 h w in 0..1; mask b 1 h w of its pixels, in 0..1, 1 where something is to be drawn. Denoisers take
        it after the latents' channels.
        """
        raise NotImplementedError(f"{self.family}/{self.variant} takes nothing beside the latents")

    @abstractmethod
    def encode(self, picture: Tensor) -> Tensor:
        """Pictures b 3 h w in 0..1 -> clean latents, float32."""

    @abstractmethod
    def decode(self, latent: Tensor) -> Tensor:
        """Latents -> pictures b 3 h w, float32, about 0..1."""

    @abstractmethod
    def preview(self, latent: Tensor) -> Tensor:
        """A cheap, small impression of `decode`, b 3 h w."""


def masked(picture: Tensor, mask: Tensor) -> Tensor:
    """A picture b 3 h w in 0..1 with mid-grey where the mask b 1 h w is 1: zero, to an autoencoder."""
    return picture * (1 - mask) + 0.5 * mask
