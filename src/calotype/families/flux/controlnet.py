"""ControlNets of FLUX.1 (InstantX, Shakker Labs, jasperai, alimama): some of its blocks, which see a picture too."""

# b batch · n tokens · d width

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from calotype.checkpoint.keys import Rule, Same, Table
from calotype.checkpoint.layouts import Evidence, Layout, Part, Signature
from calotype.families.flux.config import FluxConfig
from calotype.families.flux.keys import diffusers_rules, read_config
from calotype.families.flux.network import Added, FluxTrunk, Prepared
from calotype.nn.leader import Leader
from calotype.nn.linear import Linear

GUIDANCE = 3.5  # for one that is told, beside a model that is not: what FLUX.1 dev is told by default

# The union ControlNets' modes (InstantX, Shakker Labs), by annotators' names and their own.
UNION_KINDS: dict[str, int] = {
    "canny": 0,
    "tile": 1,
    "depth": 2,
    "blur": 3,
    "pose": 4,
    "openpose": 4,
    "gray": 5,
    "low_quality": 6,
    "lq": 6,
}


@dataclass(frozen=True, kw_only=True)
class FluxControlConfig:
    """`flux` are the numbers of its share of a FLUX.1; `hint_width` is that of a token of what it sees.

    Of `kinds` it must be told which it sees; 0 where it knows one only.
    """

    flux: FluxConfig
    hint_width: int
    kinds: int


class FluxControlNet(FluxTrunk, Leader):
    """Noisy image tokens and a picture's -> what is added to a FLUX.1's image tokens after its blocks."""

    names = UNION_KINDS

    def __init__(self, config: FluxControlConfig) -> None:
        flux = config.flux
        super().__init__(flux, ends=False)
        self.sees = "latents" if config.hint_width == flux.image_width else "masked"
        self.count = config.kinds
        self.hint_in = Linear(config.hint_width, flux.width)
        self.kinds_in = nn.Embedding(config.kinds, flux.width) if config.kinds else None
        self.joint_taps = nn.ModuleList(Linear(flux.width, flux.width) for _ in range(flux.joint_blocks))
        self.single_taps = nn.ModuleList(Linear(flux.width, flux.width) for _ in range(flux.single_blocks))

    def only_for_preparing(self) -> tuple[nn.Module, ...]:
        told = () if self.kinds_in is None else (self.kinds_in,)
        return (*super().only_for_preparing(), self.hint_in, *told)

    def prepare_hinted(
        self,
        text: Tensor,
        pooled: Tensor,
        guidance: float | None,
        times: Tensor,
        rows: int,
        columns: int,
        kind: int | None,
    ) -> Prepared:
        """As `prepare`, for a picture of this kind."""
        before = None
        if self.kinds_in is not None:
            assert kind is not None
            before = self.kinds_in.weight[kind : kind + 1]
        told = (GUIDANCE if guidance is None else guidance) if self.config.guidance_input else None
        return self.prepare(text, pooled, told, times, rows, columns, before=before)

    def embed(self, tokens: Tensor) -> Tensor:
        """What it sees (b n hint_width) -> what that adds to the noisy tokens, b n d."""
        return self.hint_in(tokens.to(self.hint_in.dtype))

    def forward(self, image: Tensor, prepared: Prepared, level: int, hint: Tensor, scale: float) -> Added:
        """image (b n image_width) at the prepared level number `level`, `hint` of `embed` -> additions."""
        image = self.image_in(image.to(self.image_in.dtype)) + hint
        taps = [*self.joint_taps, *self.single_taps]
        made = [scale * tap(tokens) for tap, tokens in zip(taps, self.through(image, prepared, level), strict=True)]
        joint = len(self.joint_taps)
        return Added(tuple(made[:joint]), tuple(made[joint:]))


def control_misfit(control: FluxControlConfig, config: FluxConfig) -> str | None:
    """Why a ControlNet does not go with a transformer; None where it does."""
    own = control.flux
    for what, has, wants in (
        ("tokens of width", own.width, config.width),
        ("attention heads:", own.heads, config.heads),
        ("image tokens of", own.image_width, config.image_width_out),
        ("text of width", own.text_width, config.text_width),
        ("pooled text of width", own.pooled_width, config.pooled_width),
    ):
        if has != wants:
            return f"{what} {has}, where the transformer has {wants}"
    return None


def _table(config: FluxControlConfig) -> Table:
    rules: list[Rule] = [
        *diffusers_rules(config.flux),
        Same("controlnet_x_embedder.*", "hint_in.*"),
        Same("controlnet_blocks.{i}.*", "joint_taps.{i}.*"),
        Same("controlnet_single_blocks.{i}.*", "single_taps.{i}.*"),
        Same("controlnet_mode_embedder.weight", "kinds_in.weight"),
    ]
    return Table("flux-controlnet/diffusers", tuple(rules))


def _config(evidence: Evidence) -> FluxControlConfig:
    kinds = "controlnet_mode_embedder.weight"
    return FluxControlConfig(
        flux=read_config(evidence, out="x_embedder.weight", out_axis=1),
        hint_width=evidence.size("controlnet_x_embedder.weight", 1),
        kinds=evidence.size(kinds) if kinds in evidence.weights else 0,
    )


CONTROL = Part(
    name="controlnet",
    network=FluxControlNet,
    layouts=(
        Layout(
            name="diffusers",
            style="diffusers",
            signature=Signature(
                has=(
                    "controlnet_x_embedder.weight",
                    "controlnet_blocks.0.weight",
                    "transformer_blocks.0.attn.add_q_proj.weight",
                    "time_text_embed.text_embedder.linear_1.weight",
                ),
            ),
            config=_config,
            table=_table,
        ),
    ),
)
