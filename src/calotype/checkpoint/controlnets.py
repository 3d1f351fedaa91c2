"""Layouts of ControlNets of UNets: the authors' own, and diffusers' (plain, and union)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath

from calotype.checkpoint.keys import Rule, Same, Table
from calotype.checkpoint.layouts import Evidence, Layout, Part, Signature
from calotype.checkpoint.unets import diffusers_config, diffusers_descent, original_config, original_descent
from calotype.errors import DamagedFile
from calotype.nn.controlnet import ControlNet, ControlNetConfig, UnionConfig

HINT_WIDTHS = (16, 32, 96, 256)  # as published
PROMAX = UnionConfig(kinds=8, layers=1)


def _original_table(config: ControlNetConfig) -> Table:
    rules: list[Rule] = [*original_descent(config.unet)]
    rules += (Same(f"input_hint_block.{2 * i}.*", f"hint.{i}.*") for i in range(2 * len(config.hint_widths)))
    rules += _taps(config, "zero_convs.{i}.0", "middle_block_out.0")
    return Table("controlnet/original", tuple(rules))


def _diffusers_table(config: ControlNetConfig) -> Table:
    rules: list[Rule] = [*diffusers_descent(config.unet)]
    last = 2 * len(config.hint_widths) - 1
    names = ["conv_in", *(f"blocks.{i}" for i in range(last - 1)), "conv_out"]
    rules += (Same(f"controlnet_cond_embedding.{name}.*", f"hint.{i}.*") for i, name in enumerate(names))
    rules += _taps(config, "controlnet_down_blocks.{i}", "controlnet_mid_block")
    if config.union is not None:
        rules += _union_rules()
    return Table("controlnet/diffusers", tuple(rules))


def _taps(config: ControlNetConfig, down: str, middle: str) -> Iterator[Rule]:
    count = len(config.unet.widths) * (config.unet.blocks + 1)
    for i in range(count):
        yield Same(f"{down.replace('{i}', str(i))}.*", f"taps.{i}.*")
    yield Same(f"{middle}.*", f"taps.{count}.*")


def _union_rules() -> Iterator[Rule]:
    yield Same("task_embedding", "union.kinds")
    for theirs, ours in (("linear_1", "inner"), ("linear_2", "outer")):
        yield Same(f"control_add_embedding.{theirs}.*", f"union.kinds_in.{ours}.*")
    yield Same("spatial_ch_projs.*", "union.out.*")
    theirs, ours = "transformer_layes.{i}", "union.blocks.{i}"  # as it is spelt there
    for kind in ("weight", "bias"):
        yield Same(f"{theirs}.attn.in_proj_{kind}", f"{ours}.qkv.{kind}")
    for a, b in (
        ("attn.out_proj", "out"),
        ("ln_1", "attention_norm"),
        ("ln_2", "mlp_norm"),
        ("mlp.c_fc", "mlp_in"),
        ("mlp.c_proj", "mlp_out"),
    ):
        yield Same(f"{theirs}.{a}.*", f"{ours}.{b}.*")


def _original_config(evidence: Evidence) -> ControlNetConfig:
    convs = [number for number in range(64) if f"input_hint_block.{2 * number}.weight" in evidence.weights]
    widths = tuple(evidence.size(f"input_hint_block.{2 * number}.weight") for number in convs[:-1:2])
    return ControlNetConfig(
        unet=original_config(evidence, ""), hint_widths=widths, union=None, pooled=_pooled(evidence)
    )


def _pooled(evidence: Evidence) -> bool:
    """Whether additions are pooled: a config.json says so; a file without one by its name, as nothing in it does."""
    named = not evidence.settings and "shuffle" in PurePath(evidence.weights.source).name.lower()
    pooled = evidence.settings.get("global_pool_conditions", named)
    if not isinstance(pooled, bool):
        raise DamagedFile(f"{evidence.weights.source}: config.json: global_pool_conditions = {pooled!r} is no flag")
    return pooled


def _diffusers_config(evidence: Evidence) -> ControlNetConfig:
    evidence.require(
        conditioning_channels=3,
        controlnet_conditioning_channel_order="rgb",
    )
    embedding = "controlnet_cond_embedding"
    blocks = evidence.count(f"{embedding}.blocks.{{i}}.")
    widths = [evidence.size(f"{embedding}.conv_in.weight")]
    widths += [evidence.size(f"{embedding}.blocks.{number}.weight") for number in range(1, blocks, 2)]
    union = None
    if "task_embedding" in evidence.weights:
        union = UnionConfig(
            kinds=evidence.size("task_embedding"),
            layers=evidence.count("transformer_layes.{i}."),
        )
    return ControlNetConfig(
        unet=diffusers_config(evidence, ""), hint_widths=tuple(widths), union=union, pooled=_pooled(evidence)
    )


CONTROLNET = Part(
    name="controlnet",
    network=ControlNet,
    layouts=(
        Layout(
            name="original",
            style="original",
            signature=Signature(
                has=("input_hint_block.0.weight", "zero_convs.0.0.weight", "input_blocks.0.0.weight"),
            ),
            config=_original_config,
            table=_original_table,
        ),
        Layout(
            name="diffusers",
            style="diffusers",
            signature=Signature(
                has=("controlnet_cond_embedding.conv_in.weight", "controlnet_down_blocks.0.weight", "conv_in.weight"),
            ),
            config=_diffusers_config,
            table=_diffusers_table,
        ),
    ),
)
