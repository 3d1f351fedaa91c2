"""ControlNets of Stable Diffusion 3 (InstantX, alimama) and 3.5 large (Stability AI): blocks that see a picture too."""

# b batch · n image tokens · d width · c channels of a latent

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from calotype.checkpoint.keys import Rule, Same, Table
from calotype.checkpoint.layouts import Evidence, Layout, Part, Signature
from calotype.families.sd3.config import Sd3Config
from calotype.families.sd3.keys import HEAD, diffusers_rules, read_config
from calotype.families.sd3.network import (
    TIME_SCALE,
    TIME_WIDTH,
    Heads,
    Outcome,
    Prepared,
    Sd3Trunk,
)
from calotype.nn.attention import attention
from calotype.nn.conv import Conv2d
from calotype.nn.embeddings import Embedder, sinusoid
from calotype.nn.leader import Leader
from calotype.nn.linear import Linear
from calotype.nn.norms import modulated


@dataclass(frozen=True, kw_only=True)
class Sd3ControlConfig:
    """`sd3` are the numbers of its share of an SD3; `hint_channels` are those of what it sees.

    `pooled` says whether it is told the pooled text. Without a text of its own (a `text_width` of 0) it takes noisy
    tokens from the model, in their places.
    """

    sd3: Sd3Config
    hint_channels: int
    pooled: bool


class Sd3ControlNet(Sd3Trunk, Leader):
    """Noisy latents, text and a picture's latents -> what is added to an SD3's image tokens after its blocks."""

    def __init__(self, config: Sd3ControlConfig) -> None:
        super().__init__(config.sd3, ends=False)
        self.settings = config
        self.sees = "latents" if config.hint_channels == config.sd3.channels_in else "masked"
        d, patch = config.sd3.width, config.sd3.patch
        self.hint_in = Conv2d(config.hint_channels, d, patch, stride=patch)
        self.taps = nn.ModuleList(Linear(d, d) for _ in range(config.sd3.blocks))

    def only_for_preparing(self) -> tuple[nn.Module, ...]:
        return (*super().only_for_preparing(), self.hint_in)

    def prepare_hinted(self, text: Tensor, pooled: Tensor, times: Tensor, rows: int, columns: int) -> Prepared:
        """As `prepare`; InstantX's are told nothing of the pooled text."""
        return self.prepare(text, pooled if self.settings.pooled else 0 * pooled, times, rows, columns)

    def embed(self, latents: Tensor) -> Tensor:
        """What it sees (b c h w) -> what that adds to the noisy tokens, b n d."""
        return rearrange(self.hint_in(latents.to(self.dtype)), "b d h w -> b (h w) d")

    def forward(self, x: Tensor, prepared: Prepared, level: int, hint: Tensor, scale: float) -> list[Tensor]:
        """x (b channels_in h w) at the prepared level number `level`, `hint` of `embed` -> additions."""
        image = self.enter(x, prepared) + hint
        return [
            scale * tap(tokens) for tap, tokens in zip(self.taps, self.through(image, prepared, level), strict=True)
        ]


class PictureBlock(nn.Module):
    """The picture's stream alone."""

    def __init__(self, config: Sd3Config) -> None:
        super().__init__()
        self.image_heads = Heads(config)
        self.image = Outcome(config)

    def forward(self, image: Tensor, rows: Sequence[Tensor]) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = rows
        mixed = attention(*self.image_heads(modulated(image, shift1, scale1)))
        image = torch.addcmul(image, gate1, self.image.attention_out(mixed))
        return torch.addcmul(image, gate2, self.image.mlp(modulated(image, shift2, scale2)))


class PictureControlNet(Leader):
    """One that reads no text, and takes noisy tokens as the model has them in their places."""

    def __init__(self, config: Sd3ControlConfig) -> None:
        super().__init__()
        self.settings = config
        self.sees = "latents"
        sd3 = config.sd3
        self.time_in = Embedder(TIME_WIDTH, sd3.width)
        self.pooled_in = Embedder(sd3.pooled_width, sd3.width)
        self.modulation = nn.ModuleList(Linear(sd3.width, 6 * sd3.width) for _ in range(sd3.blocks))
        self.blocks = nn.ModuleList(PictureBlock(sd3) for _ in range(sd3.blocks))
        self.hint_in = Conv2d(config.hint_channels, sd3.width, sd3.patch, stride=sd3.patch)
        self.taps = nn.ModuleList(Linear(sd3.width, sd3.width) for _ in range(sd3.blocks))

    def only_for_preparing(self) -> tuple[nn.Module, ...]:
        return self.time_in, self.pooled_in, self.modulation, self.hint_in

    def prepare_hinted(self, pooled: Tensor, times: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """pooled (b pooled_width), times (t) in 0..1 -> six rows (t b 1 d) for each block."""
        dtype = self.hint_in.dtype
        pooled = pooled if self.settings.pooled else 0 * pooled
        time = self.time_in(sinusoid(times[:, None] * TIME_SCALE, TIME_WIDTH).to(dtype))
        vector = F.silu(time + self.pooled_in(pooled.to(dtype)))
        return tuple(layer(vector).unsqueeze(-2).chunk(6, dim=-1) for layer in self.modulation)

    def embed(self, latents: Tensor) -> Tensor:
        """What it sees (b c h w) -> what that adds to the noisy tokens, b n d."""
        return rearrange(self.hint_in(latents.to(self.hint_in.dtype)), "b d h w -> b (h w) d")

    def forward(
        self, tokens: Tensor, prepared: Sequence[Sequence[Tensor]], level: int, hint: Tensor, scale: float
    ) -> list[Tensor]:
        """tokens (b n d) of `Sd3Trunk.enter`, at the prepared level number `level` -> additions."""
        image = (tokens.to(hint.dtype) + hint).expand(len(prepared[0][0][level]), -1, -1)
        made: list[Tensor] = []
        for block, tap, rows in zip(self.blocks, self.taps, prepared, strict=True):
            image = block(image, [row[level] for row in rows])
            made.append(scale * tap(image))
        return made


def control_misfit(control: Sd3ControlConfig, config: Sd3Config) -> str | None:
    """Why a ControlNet does not go with a transformer; None where it does."""
    own = control.sd3
    for what, has, wants in (
        ("tokens of width", own.width, config.width),
        ("latent channels:", own.channels_in, config.channels_in),
        ("latents a side of a token:", own.patch, config.patch),
        ("text of width", own.text_width or config.text_width, config.text_width),
        ("pooled text of width", own.pooled_width, config.pooled_width),
    ):
        if has != wants:
            return f"{what} {has}, where the transformer has {wants}"
    return None


def _table(config: Sd3ControlConfig) -> Table:
    rules: list[Rule] = [
        Same("pos_embed_input.proj.*", "hint_in.*"),
        Same("controlnet_blocks.{i}.*", "taps.{i}.*"),
        *diffusers_rules(config.sd3, modulation="modulation" if not config.sd3.text_width else "modulation.image"),
    ]
    return Table("sd3-controlnet/diffusers", tuple(rules))


def _config(evidence: Evidence) -> Sd3ControlConfig:
    hint = "pos_embed_input.proj.weight"
    extra = evidence.number("extra_conditioning_channels", 0)
    alone = "context_embedder.weight" not in evidence.weights
    if alone:
        width, patch = evidence.size(hint), evidence.size(hint, 2)
        head = evidence.number("attention_head_dim", HEAD)
        evidence.require(use_pos_embed=False, qk_norm=None)
        sd3 = Sd3Config(
            channels_in=evidence.size(hint, 1) - extra,
            channels_out=evidence.size(hint, 1) - extra,
            patch=patch,
            text_width=0,
            pooled_width=evidence.size("time_text_embed.text_embedder.linear_1.weight", 1),
            width=width,
            heads=width // head,
            mlp_width=evidence.size("transformer_blocks.0.ff.net.0.proj.weight"),
            blocks=evidence.count("transformer_blocks.{i}."),
            positions=0,
            dual=(),
            norms=False,
        )
    else:
        evidence.require(use_pos_embed=True)
        sd3 = read_config(evidence, channels_out=evidence.size("pos_embed.proj.weight", 1))
    return Sd3ControlConfig(
        sd3=sd3,
        hint_channels=evidence.size(hint, 1),
        pooled=not (extra or evidence.settings.get("force_zeros_for_pooled_projection", True)),
    )


def _built(config: Sd3ControlConfig) -> Sd3ControlNet | PictureControlNet:
    return Sd3ControlNet(config) if config.sd3.text_width else PictureControlNet(config)


CONTROL = Part(
    name="controlnet",
    network=_built,
    layouts=(
        Layout(
            name="diffusers",
            style="diffusers",
            signature=Signature(has=("pos_embed_input.proj.weight", "controlnet_blocks.0.weight")),
            config=_config,
            table=_table,
        ),
    ),
)
