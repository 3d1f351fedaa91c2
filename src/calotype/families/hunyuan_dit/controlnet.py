"""Hunyuan-DiT's ControlNets (Tencent, 2024): the first half of its blocks, which sees a picture too."""

# b batch · n image tokens · d width · c channels of a latent

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from calotype.checkpoint.keys import Rule, Same, Table
from calotype.checkpoint.layouts import Layout, Part, Signature
from calotype.families.hunyuan_dit.config import HunyuanConfig
from calotype.families.hunyuan_dit.keys import diffusers_config, diffusers_rules, original_config, original_rules
from calotype.families.hunyuan_dit.network import HunyuanTrunk, Prepared
from calotype.nn.leader import Leader
from calotype.nn.linear import Linear


class HunyuanControlNet(HunyuanTrunk, Leader):
    """Noisy latents and a picture's -> what is added to what a Hunyuan-DiT's first half leaves for its second."""

    def __init__(self, config: HunyuanConfig) -> None:
        """The configuration's `blocks` are those of the ControlNet alone."""
        super().__init__(config, ends=False)
        self.sees = "latents"
        self.hint_in = Linear(config.width, config.width)
        self.taps = nn.ModuleList(Linear(config.width, config.width) for _ in range(config.blocks))

    def only_for_preparing(self) -> tuple[nn.Module, ...]:
        return (*super().only_for_preparing(), self.hint_in)

    def embed(self, latents: Tensor) -> Tensor:
        """What it sees (b c h w) -> what that adds to the noisy tokens, b n d."""
        return self.hint_in(self.enter(latents))

    def forward(self, x: Tensor, prepared: Prepared, level: int, hint: Tensor, scale: float) -> list[Tensor]:
        """x (b channels_in h w) at the prepared level number `level`, `hint` of `embed` -> additions."""
        tokens = (self.enter(x) + hint).expand(len(prepared.text[0][0]), -1, -1)
        made: list[Tensor] = []
        for block, tap, shift, (k, v) in zip(self.blocks, self.taps, prepared.shifts, prepared.text, strict=True):
            tokens = block(tokens, None, shift[level], k, v, prepared.rope)
            made.append(scale * tap(tokens))
        return made


def control_misfit(control: HunyuanConfig, config: HunyuanConfig) -> str | None:
    """Why a ControlNet does not go with a transformer; None where it does."""
    for what, has, wants in (
        ("tokens of width", control.width, config.width),
        ("blocks:", control.blocks, config.blocks // 2 - 1),
        ("latent channels:", control.channels_in, config.channels_in),
        ("latents a side of a token:", control.patch, config.patch),
        ("text of width", control.text_width, config.text_width),
        ("T5's states of width", control.t5_width, config.t5_width),
        ("tokens of text:", control.text_tokens + control.t5_tokens, config.text_tokens + config.t5_tokens),
    ):
        if has != wants:
            return f"{what} {has}, where the transformer has {wants}"
    if control.styled != config.styled:
        version = {True: "1.0 or 1.1", False: "1.2"}
        return f"made for version {version[control.styled]}, where the transformer is of {version[config.styled]}"
    return None


def _original_table(config: HunyuanConfig) -> Table:
    rules: list[Rule] = [*original_rules(config), Same("before_proj.*", "hint_in.*")]
    return Table("controlnet/original", (*rules, Same("after_proj_list.{i}.*", "taps.{i}.*")))


def _diffusers_table(config: HunyuanConfig) -> Table:
    rules: list[Rule] = [*diffusers_rules(config), Same("input_block.*", "hint_in.*")]
    return Table("controlnet/diffusers", (*rules, Same("controlnet_blocks.{i}.*", "taps.{i}.*")))


CONTROL = Part(
    name="controlnet",
    network=HunyuanControlNet,
    layouts=(
        Layout(
            name="original",
            style="original",
            signature=Signature(has=("before_proj.weight", "after_proj_list.0.weight", "text_embedding_padding")),
            config=partial(original_config, out=None),
            table=_original_table,
        ),
        Layout(
            name="diffusers",
            style="diffusers",
            signature=Signature(has=("input_block.weight", "controlnet_blocks.0.weight", "text_embedding_padding")),
            config=partial(diffusers_config, out=None),
            table=_diffusers_table,
        ),
    ),
)
