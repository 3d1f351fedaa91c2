"""What the UNet families share: from conditioning to pictures. Each family says itself what it takes from a prompt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from calotype.backends.openvino import OpenVinoAutoencoder, OpenVinoUNet, accelerate
from calotype.control.hints import Hint
from calotype.errors import RequestError
from calotype.families.diffusion import DiffusionSettings
from calotype.families.model import FamilyModel, Prepared, masked
from calotype.nn.attention import in_rows
from calotype.nn.autoencoder import Autoencoder, preview_projection
from calotype.nn.controlnet import ControlNet, ControlNetConfig
from calotype.nn.embeddings import sinusoid
from calotype.nn.image_adapter import ImageAdapterConfig, Places
from calotype.nn.tiny_autoencoder import TinyAutoencoder
from calotype.nn.unet import KeysAndValues, UNet, UNetConfig
from calotype.nn.unet import Prepared as Hoisted
from calotype.request import Defaults, Job
from calotype.sampling.levels import VP_SCHEDULES, Level, Levels
from calotype.sampling.samplers import SAMPLERS, Denoise, Noise

Vae = Autoencoder | TinyAutoencoder | OpenVinoAutoencoder


class UNetConditioning(NamedTuple):
    texts: tuple[
        Tensor, ...
    ]  # b n d, what cross-attention reads, for each group of rows whose prompts are of one length
    vector: Tensor | None  # b d, pooled text; None for a UNet without that input
    pictures: tuple[KeysAndValues, ...] = ()  # of each image prompt, what each cross-attention reads of it
    negative: tuple[bool, ...] = (False,)  # of each row, whether it is to be steered away from


class UNetModel(FamilyModel[UNetConditioning]):
    """A UNet between an autoencoder's latents, with any encoders before it."""

    # Narrower than the base class says, and replaced by `run_with_openvino` alone.
    vae: Vae  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        *,
        unet: UNet,
        vae: Autoencoder | TinyAutoencoder,
        diffusion: DiffusionSettings,
        defaults: Defaults,
        variant: str,
        source: str,
        device: torch.device,
    ) -> None:
        self.unet: UNet | OpenVinoUNet = unet
        self.vae = vae
        self._previewed = vae
        self.diffusion = diffusion
        self.prediction = diffusion.prediction
        self.grain = vae.config.factor
        self.defaults = replace(defaults, grain=self.grain, sampler=diffusion.sampler, schedule=diffusion.schedule)
        self.variant = variant
        self.source = source
        self.device = device
        self.backbone = unet
        self.inpaints = unet.config.channels_in == 2 * unet.config.channels_out + 1

    def run_with_openvino(self, *, eight_bits: bool = False) -> None:
        """Hand the UNet's steps and the decoder to OpenVINO, on the CPU; the steps in int8 if asked to.

        RequestError where it is not installed, or the CPU is not made for int8.
        """
        assert isinstance(self.unet, UNet)
        if isinstance(self.vae, Autoencoder):
            self.unet, vae = accelerate(self.unet, self.vae, eight_bits=eight_bits)
            self.vae = vae  # pyright: ignore[reportIncompatibleVariableOverride]
        else:
            self.unet = OpenVinoUNet(self.unet, eight_bits=eight_bits)
        self.backbone = self.unet

    @abstractmethod
    def condition(self, prompt: str, job: Job, *, negative: bool) -> UNetConditioning: ...

    @abstractmethod
    def conditioned_by(self, job: Job) -> Hashable: ...

    def levels(self, job: Job) -> Levels:
        return self.diffusion.levels(job.schedule, job.steps, job.denoising_strength or 1.0)

    def noise_shape(self, job: Job) -> tuple[int, ...]:
        return self.vae.config.latent_channels, job.height // self.grain, job.width // self.grain

    def start(self, job: Job, levels: Levels, noise: Noise) -> Tensor:
        return noise() if self.diffusion.unit_start else levels.path[0].sigma * noise()

    def prepared(self, conditioning: UNetConditioning, levels: Sequence[Level], job: Job) -> Prepared:
        unet = self.unet
        number = {level: i for i, level in enumerate(levels)}
        times = torch.tensor([level.time for level in levels], device=self.device)
        texts, vector, pictures, _ = conditioning
        read, estimate = unet.read(texts), ESTIMATES[self.diffusion.prediction]
        shown = {"pictures": _by_attention(pictures, read)} if pictures else {}
        alike = unet.shifts(None, times) if vector is None else None

        def placed(jobs: Sequence[Job], hints: Sequence[Hint]) -> Denoise:
            told = None if vector is None else with_sizes(vector, jobs, unet.config.size_width)
            shifts = alike or unet.shifts(told, times)
            additions = self._additions(conditioning._replace(vector=told), times, hints)
            # OpenVINO's graphs have a row of text for each row of x.
            text = read if isinstance(unet, UNet) or len(jobs) == 1 else _in_turn(read, len(jobs))

            def denoise(x: Tensor, level: Level) -> Tensor:
                step = number[level]
                now = tuple(shift[step] for shift in shifts)
                predicted: Tensor = unet(x, now, text, *additions(x, step), **shown)
                return estimate(x[:, : predicted.shape[1]], predicted.float(), level)

            return denoise

        return placed

    def joined(self, conditionings: Sequence[UNetConditioning]) -> UNetConditioning:
        texts: list[Tensor] = []
        for text in (text for each in conditionings for text in each.texts):
            if texts and texts[-1].shape[1] == text.shape[1]:
                texts[-1] = torch.cat([texts[-1], text])
            else:
                texts.append(text)
        vectors = [each.vector for each in conditionings if each.vector is not None]
        pictures = tuple(_rows(each) for each in zip(*(each.pictures for each in conditionings), strict=True))
        negative = tuple(row for each in conditionings for row in each.negative)
        return UNetConditioning(tuple(texts), torch.cat(vectors) if vectors else None, pictures, negative)

    def with_pictures(self, conditioning: UNetConditioning, pictures: Sequence[KeysAndValues]) -> UNetConditioning:
        if not isinstance(self.unet, UNet):
            raise RequestError("image_prompts", f"{len(pictures)} of them", "none with the backend openvino: use torch")
        return conditioning._replace(pictures=tuple(pictures))

    def _additions(
        self, conditioning: UNetConditioning, times: Tensor, hints: Sequence[Hint]
    ) -> Callable[[Tensor, int], tuple[Sequence[Tensor], ...]]:
        """What ControlNets add to the UNet, as the rest of its arguments: x, the number of the level -> () or one.

        The vector is of each row of x, not of each prompt.
        """
        if not hints:
            return lambda x, step: ()
        unet = self.unet
        if not isinstance(unet, UNet):
            raise RequestError("controls", f"{len(hints)} of them", "none with the backend openvino: load with torch")
        dtype = unet.conv_in.dtype
        positive = torch.tensor([not row for row in conditioning.negative], device=self.device).to(dtype)
        passes: dict[tuple[Hint, ...], Pass] = {}
        led: list[list[Pass]] = []
        for step in range(len(times)):
            groups = together([hint for hint in hints if hint.leads(step, len(times))])
            passes |= {each: Pass.of(each, conditioning, times, unet) for each in groups if each not in passes}
            led.append([passes[each] for each in groups])

        def additions(x: Tensor, step: int) -> tuple[Sequence[Tensor], ...]:
            total: list[Tensor] = []
            for network, own, seen, scale in led[step]:
                if network.settings.pooled and all(conditioning.negative):
                    continue
                latents = x[:, : network.config.channels_in]
                if len(seen) < len(x):
                    seen = seen.repeat(len(x) // len(seen), 1, 1, 1)
                made = [scale * each.to(dtype) for each in network(latents, *own.at(step), seen)]
                if network.settings.pooled:
                    made = [
                        in_rows(positive, max(len(positive), len(each)))[:, None, None, None] * each for each in made
                    ]
                total = [a + b for a, b in zip(total, made, strict=True)] if total else made
            return (total,) if total else ()

        return additions

    def beside(self, picture: Tensor, mask: Tensor) -> Tensor:
        mask = (mask >= 0.5).float()
        kept = self.encode(masked(picture, mask))
        # A latent that holds any of the place is drawn: of a thin one, every eighth pixel could miss all.
        return torch.cat([F.adaptive_max_pool2d(mask, kept.shape[2:]), kept], dim=1)

    def encode(self, picture: Tensor) -> Tensor:
        return self.vae.encode(picture)

    def decode(self, latent: Tensor) -> Tensor:
        return self.vae.decode(latent)

    def preview(self, latent: Tensor) -> Tensor:
        if isinstance(self._previewed, TinyAutoencoder):
            return self._previewed.decode(latent)
        projection = self._preview_projection.to(latent.device)
        colour = rearrange(latent, "b z h w -> b h w z") @ projection[:-1] + projection[-1]
        return rearrange(colour, "b h w c -> b c h w")

    @cached_property
    def _preview_projection(self) -> Tensor:
        assert isinstance(self._previewed, Autoencoder)
        return preview_projection(self._previewed)


class Pass(NamedTuple):
    """A ControlNet with what it is led by in some steps, as far as it does not depend on the noisy latents."""

    network: ControlNet
    prepared: Hoisted
    seen: Tensor  # b c h w, what is added to the latents' features
    scale: float

    @classmethod
    def of(cls, hints: Sequence[Hint], conditioning: UNetConditioning, times: Tensor, unet: UNet) -> Pass:
        """Of hints for one network. What a union makes of several is weighed before it, what it adds else after it."""
        network = hints[0].network
        assert isinstance(network, ControlNet)
        kinds = [hint.kind for hint in hints if hint.kind is not None]
        reader = reader_for(network, unet.config, unet)
        prepared = network.prepare_hinted(conditioning.texts, conditioning.vector, times, kinds, reader)
        if len(hints) == 1:
            return cls(network, prepared, network.embed(hints[0].picture, hints[0].kind), hints[0].scale)
        seen = sum(network.embed(hint.picture, hint.kind, hint.scale) for hint in hints)
        assert isinstance(seen, Tensor)
        return cls(network, prepared, seen, 1.0)


def together(hints: Sequence[Hint]) -> list[tuple[Hint, ...]]:
    """Hints in groups that go through a network at once: all that a union is led by, and each other one alone."""
    groups: dict[object, tuple[Hint, ...]] = {}
    for hint in hints:
        key = hint if hint.kind is None else hint.network
        groups[key] = (*groups.get(key, ()), hint)
    return list(groups.values())


def _rows(shown: Sequence[KeysAndValues]) -> KeysAndValues:
    """What each cross-attention reads of one image prompt in several rows."""
    return tuple(
        (torch.cat([k for k, _ in rows]), torch.cat([v for _, v in rows])) for rows in zip(*shown, strict=True)
    )


def with_sizes(vector: Tensor, jobs: Sequence[Job], width: int) -> Tensor:
    """Pooled text (b d) with the sizes that the network is told of each picture: a row for each, for each prompt."""
    sizes = torch.tensor([told_sizes(job) for job in jobs], device=vector.device)
    told = sinusoid(sizes, width).flatten(1).repeat(len(vector), 1)
    return torch.cat([in_rows(vector.float(), len(told)), told], dim=1)


def _in_turn(read: Sequence[KeysAndValues], each: int) -> tuple[KeysAndValues, ...]:
    """What each cross-attention reads, for so many rows of each text."""
    return tuple(tuple((in_rows(k, each * len(k)), in_rows(v, each * len(v))) for k, v in groups) for groups in read)


def _by_attention(pictures: Sequence[KeysAndValues], text: Sequence[KeysAndValues]) -> tuple[KeysAndValues, ...]:
    """For each cross-attention what it reads of all pictures, in the type that it reads text in."""
    dtypes = [groups[0][0].dtype for groups in text]
    reads = zip(dtypes, *pictures, strict=True)
    return tuple(tuple((k.to(dtype), v.to(dtype)) for k, v in pairs) for dtype, *pairs in reads)


# From what the network predicts to the clean latents, x = alpha clean + sigma noise, v = alpha noise - sigma clean.
ESTIMATES: dict[str, Callable[[Tensor, Tensor, Level], Tensor]] = {
    "noise": lambda x, noise, level: (x - level.sigma * noise) / level.alpha,
    "v": lambda x, v, level: level.alpha * x - level.sigma * v,
}


def reader_for(network: ControlNet, config: UNetConfig, unet: UNet | None) -> UNet | None:
    """The UNet, where a ControlNet must borrow its projections of text and vector: SDXL's on Kolors."""
    own = network.config
    return unet if config.text_width_in is not None and own.text_width_in is None else None


def control_misfit(network: ControlNetConfig, config: UNetConfig) -> str | None:
    """Why a ControlNet does not go with a UNet; None where it does."""
    own = network.unet
    borrows = config.text_width_in is not None and own.text_width_in is None
    for what, has, wants in (
        ("levels of widths", own.widths, config.widths),
        ("residual blocks a level:", own.blocks, config.blocks),
        ("latent channels:", own.channels_in, config.channels_out),
        ("text of width", own.text_width, config.text_width),
        (
            "text, before its projection, of width",
            own.text_width_in,
            own.text_width_in if borrows else config.text_width_in,
        ),
        ("pooled text and sizes of width", own.vector_width, own.vector_width if borrows else config.vector_width),
    ):
        if has != wants:
            return f"{what} {has}, where the UNet has {wants}"
    return None


def adapter_misfit(adapter: ImageAdapterConfig, config: UNetConfig) -> str | None:
    """Why an IP-Adapter does not go with a UNet; None where it does."""
    widths = Places.of(config).widths
    for what, has, wants in (
        ("tokens of width", adapter.text_width, config.text_width),
        ("cross-attentions:", len(adapter.widths), len(widths)),
        ("cross-attentions of widths", sorted(set(adapter.widths)), sorted(set(widths))),
    ):
        if has != wants:
            return f"{what} {has}, where the UNet has {wants}"
    return None if adapter.widths == widths else "its cross-attentions follow one another in another order"


def beside_the_noise(title: str, config: UNetConfig) -> str | None:
    """Why a UNet does not run that takes more than the noisy latents; None where it does, as one that inpaints."""
    if config.channels_in in (config.channels_out, 2 * config.channels_out + 1):
        return None
    what = "the picture to edit" if config.channels_in == 2 * config.channels_out else "something"
    return (
        f"{title}: recognised, but its UNet takes {config.channels_in} channels, {what} beside the noise, which is not "
        "supported yet; give a model that draws from a prompt alone, or inpaints"
    )


def unet_defaults(
    *,
    size: int,
    steps: int,
    cfg_scale: float,
    diffusion: DiffusionSettings,
    clip_skip: int | None = None,
    text_tokens: int | None = None,
    sizes: bool = False,
) -> Defaults:
    """A UNet family's defaults, as far as the families share them."""
    return Defaults(
        width=size,
        height=size,
        grain=8,
        steps=steps,
        cfg_scale=cfg_scale,
        embedded_guidance=None,
        sampler=diffusion.sampler,
        schedule=diffusion.schedule,
        shift=None,
        text_tokens=text_tokens,
        samplers=tuple(SAMPLERS),
        schedules=tuple(VP_SCHEDULES),
        clip_skip=clip_skip,
        sizes=sizes,
    )


def told_sizes(job: Job) -> tuple[int, ...]:
    """What SDXL is told: original height and width, top and left of the crop, height and width aimed at."""
    told = (job.original_height, job.original_width, job.crop_top, job.crop_left, job.target_height, job.target_width)
    return tuple(size for size in told if size is not None)
