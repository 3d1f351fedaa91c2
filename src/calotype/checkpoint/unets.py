"""Layouts of the UNet, which families share; what tells the families apart is evidence that each gives itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from calotype.checkpoint.keys import Pointwise, Rule, Same, Table
from calotype.checkpoint.layouts import Evidence, Layout, Part, Signature
from calotype.errors import DamagedFile
from calotype.nn.unet import UNet, UNetConfig

SIZES = 6  # height, width, top, left, height, width: numbers that SDXL is told


def _attention_rules(theirs: str, ours: str, config: UNetConfig) -> Iterator[Rule]:
    """A spatial transformer, whose inner names both layouts share."""
    projection = Pointwise if config.convolved else Same
    yield Same(f"{theirs}.norm.*", f"{ours}.norm.*")
    yield projection(f"{theirs}.proj_in.*", f"{ours}.inward.*")
    yield projection(f"{theirs}.proj_out.*", f"{ours}.outward.*")
    theirs, ours = f"{theirs}.transformer_blocks.{{k}}", f"{ours}.blocks.{{k}}"
    for number, name in ((1, "self_attention"), (2, "cross_attention")):
        for x in "qkv":
            yield Same(f"{theirs}.attn{number}.to_{x}.*", f"{ours}.{name}.{x}.*")
        yield Same(f"{theirs}.attn{number}.to_out.0.*", f"{ours}.{name}.out.*")
    for number, name in ((1, "self_norm"), (2, "cross_norm"), (3, "mlp_norm")):
        yield Same(f"{theirs}.norm{number}.*", f"{ours}.{name}.*")
    yield Same(f"{theirs}.ff.net.0.proj.*", f"{ours}.mlp_in.*")
    yield Same(f"{theirs}.ff.net.2.*", f"{ours}.mlp_out.*")


OURS = ("norm1", "conv1", "time", "norm2", "conv2", "shortcut")
ORIGINAL_RESIDUAL = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
DIFFUSERS_RESIDUAL = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
SDXL_TEXT = 2048  # width of what SDXL's cross-attention reads


def _residual_rules(theirs: str, ours: str, names: tuple[str, ...]) -> Iterator[Rule]:
    for a, b in zip(names, OURS, strict=True):
        yield Same(f"{theirs}.{a}.*", f"{ours}.{b}.*")


def _ends(names: dict[str, str]) -> Iterator[Rule]:
    for ours, theirs in names.items():
        yield Same(f"{theirs}.*", f"{ours}.*")


def original_descent(config: UNetConfig) -> list[Rule]:
    """The way down and the middle in the latent diffusion repository's names."""
    rules = list(
        _ends(
            {
                "time_in.inner": "time_embed.0",
                "time_in.outer": "time_embed.2",
                "vector_in.inner": "label_emb.0.0",
                "vector_in.outer": "label_emb.0.2",
                "text_in": "encoder_hid_proj",
                "conv_in": "input_blocks.0.0",
            }
        )
    )
    row, levels = config.blocks + 1, len(config.widths)
    for level in range(levels):
        first, ours = 1 + level * row, f"down.{level}"
        rules += _residual_rules(f"input_blocks.{{j+{first}}}.0", f"{ours}.blocks.{{j}}", ORIGINAL_RESIDUAL)
        rules += _attention_rules(f"input_blocks.{{j+{first}}}.1", f"{ours}.transformers.{{j}}", config)
        rules.append(Same(f"input_blocks.{first + config.blocks}.0.op.*", f"{ours}.sample.*"))
    rules += _residual_rules("middle_block.0", "middle.first", ORIGINAL_RESIDUAL)
    rules += _attention_rules("middle_block.1", "middle.transformer", config)
    return [*rules, *_residual_rules("middle_block.2", "middle.second", ORIGINAL_RESIDUAL)]


def original_table(config: UNetConfig) -> Table:
    """The latent diffusion repository's names, which number all blocks of the way down, and up, in one row."""
    rules = [*original_descent(config), *_ends({"norm_out": "out.0", "conv_out": "out.2"})]
    row, levels = config.blocks + 1, len(config.widths)
    for level in range(levels):
        first, ours = level * row, f"up.{level}"
        rules += _residual_rules(f"output_blocks.{{j+{first}}}.0", f"{ours}.blocks.{{j}}", ORIGINAL_RESIDUAL)
        rules += _attention_rules(f"output_blocks.{{j+{first}}}.1", f"{ours}.transformers.{{j}}", config)
        after = 2 if config.depths[levels - 1 - level] else 1
        rules.append(Same(f"output_blocks.{first + config.blocks}.{after}.conv.*", f"{ours}.sample.*"))
    return Table("unet/original", tuple(rules))


def diffusers_descent(config: UNetConfig) -> list[Rule]:
    """The way down and the middle in diffusers' names."""
    return [
        *_ends(
            {
                "time_in.inner": "time_embedding.linear_1",
                "time_in.outer": "time_embedding.linear_2",
                "vector_in.inner": "add_embedding.linear_1",
                "vector_in.outer": "add_embedding.linear_2",
                "text_in": "encoder_hid_proj",
                "conv_in": "conv_in",
            }
        ),
        *_diffusers_levels("down_blocks", "down", "downsamplers", config),
        *_residual_rules("mid_block.resnets.0", "middle.first", DIFFUSERS_RESIDUAL),
        *_attention_rules("mid_block.attentions.0", "middle.transformer", config),
        *_residual_rules("mid_block.resnets.1", "middle.second", DIFFUSERS_RESIDUAL),
    ]


def _diffusers_levels(theirs: str, ours: str, sample: str, config: UNetConfig) -> Iterator[Rule]:
    yield from _residual_rules(f"{theirs}.{{i}}.resnets.{{j}}", f"{ours}.{{i}}.blocks.{{j}}", DIFFUSERS_RESIDUAL)
    yield from _attention_rules(f"{theirs}.{{i}}.attentions.{{j}}", f"{ours}.{{i}}.transformers.{{j}}", config)
    yield Same(f"{theirs}.{{i}}.{sample}.0.conv.*", f"{ours}.{{i}}.sample.*")


def diffusers_table(config: UNetConfig) -> Table:
    rules = [
        *diffusers_descent(config),
        *_diffusers_levels("up_blocks", "up", "upsamplers", config),
        *_ends({"norm_out": "conv_norm_out", "conv_out": "conv_out"}),
    ]
    return Table("unet/diffusers", tuple(rules))


def original_config(evidence: Evidence, conv_out: str = "out.2") -> UNetConfig:
    """Rows of blocks end where something samples; what follows a residual block is its transformer.

    `conv_out` is the last convolution; "" where there is none, and as many channels are meant as come in.
    """
    widths: list[int] = []
    depths: list[int] = []
    counts: list[int] = []
    number, count, rows = 1, 0, evidence.count("input_blocks.{i}.")
    while number < rows:
        block = f"input_blocks.{number}"
        if f"{block}.0.op.weight" in evidence.weights:
            counts.append(count)
            count = 0
        else:
            if count == 0:
                widths.append(evidence.size(f"{block}.0.in_layers.2.weight"))
                depths.append(evidence.count(f"{block}.1.transformer_blocks.{{i}}."))
            count += 1
        number += 1
    counts.append(count)
    if len(set(counts)) > 1:
        raise DamagedFile(f"{evidence.weights.source}: levels of {counts} residual blocks; they should be alike")
    return _config(
        evidence,
        widths=widths,
        depths=depths,
        blocks=counts[0],
        attention=(f"input_blocks.{1 + next((i for i, d in enumerate(depths) if d), 0) * (counts[0] + 1)}.1"),
        middle="middle_block.1",
        conv_in="input_blocks.0.0",
        conv_out=conv_out,
        vector="label_emb.0.0",
    )


def diffusers_config(evidence: Evidence, conv_out: str = "conv_out") -> UNetConfig:
    # SDXL's small ControlNets attend to nothing; they are told the text only in its pooled form.
    small = not any(".attentions." in key or key.startswith("mid_block.resnets.1.") for key in evidence.weights)
    evidence.require(
        act_fn="silu",
        norm_num_groups=32,
        norm_eps=1e-5,
        center_input_sample=False,
        flip_sin_to_cos=True,
        freq_shift=0,
        dual_cross_attention=False,
        only_cross_attention=False,
        class_embed_type=None,
        num_class_embeds=None,
        time_embedding_type="positional",
        time_cond_proj_dim=None,
        resnet_time_scale_shift="default",
        mid_block_scale_factor=1,
        downsample_padding=1,
        conv_in_kernel=3,
        conv_out_kernel=3,
        mid_block_type="UNetMidBlock2D" if small else "UNetMidBlock2DCrossAttn",
    )
    levels = range(evidence.count("down_blocks.{i}."))
    depths = [evidence.count(f"down_blocks.{i}.attentions.0.transformer_blocks.{{i}}.") for i in levels]
    return _config(
        evidence,
        widths=[evidence.size(f"down_blocks.{i}.resnets.0.conv1.weight") for i in levels],
        depths=depths,
        blocks=evidence.count("down_blocks.0.resnets.{i}."),
        attention=f"down_blocks.{next((i for i, depth in enumerate(depths) if depth), 0)}.attentions.0",
        middle="mid_block.attentions.0",
        conv_in="conv_in",
        conv_out=conv_out,
        vector="add_embedding.linear_1",
        unread=evidence.number("cross_attention_dim", SDXL_TEXT) if small else None,
    )


def _config(
    evidence: Evidence,
    *,
    widths: list[int],
    depths: list[int],
    blocks: int,
    attention: str,
    middle: str,
    conv_in: str,
    conv_out: str,
    vector: str,
    unread: int | None = None,
) -> UNetConfig:
    """`unread` is the width of a text that no layer attends to."""
    text_width = unread or evidence.size(f"{attention}.transformer_blocks.0.attn2.to_k.weight", 1)
    text_in = "encoder_hid_proj.weight"
    return UNetConfig(
        channels_in=evidence.size(f"{conv_in}.weight", 1),
        channels_out=evidence.size(f"{conv_out}.weight") if conv_out else evidence.size(f"{conv_in}.weight", 1),
        widths=tuple(widths),
        blocks=blocks,
        depths=tuple(depths),
        middle_depth=evidence.count(f"{middle}.transformer_blocks.{{i}}."),
        heads=_heads(evidence, widths, f"{vector}.weight" in evidence.weights),
        text_width=text_width,
        text_width_in=evidence.size(text_in, 1) if text_in in evidence.weights else None,
        vector_width=evidence.size(f"{vector}.weight", 1) if f"{vector}.weight" in evidence.weights else None,
        size_width=evidence.number("addition_time_embed_dim", 256),
        convolved=unread is None and len(evidence.weights[f"{attention}.proj_in.weight"].shape) == 4,
    )


def _heads(evidence: Evidence, widths: list[int], told_sizes: bool) -> tuple[int, ...]:
    """From the settings, where diffusers calls the number of heads their width; else as published: 8 heads in
    Stable Diffusion 1.x, heads of 64 channels in what is told sizes."""
    given = evidence.settings.get("num_attention_heads") or evidence.settings.get("attention_head_dim")
    if given is None:
        return tuple(width // 64 if told_sizes else 8 for width in widths)
    heads = [given] * len(widths) if isinstance(given, int) else list(given)
    if len(heads) != len(widths) or any(
        type(n) is not int or n < 1 or width % n for n, width in zip(heads, widths, strict=False)
    ):
        raise DamagedFile(f"{evidence.weights.source}: config.json: heads {given!r} do not divide the widths {widths}")
    return tuple(heads)


def settings(config: UNetConfig) -> dict[str, Any]:
    """config.json of a UNet, as diffusers writes it."""
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depths]
    up = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(config.depths)]
    told = config.vector_width is not None
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "addition_embed_type": "text_time" if told else None,
        "addition_time_embed_dim": config.size_width if told else None,
        "attention_head_dim": list(config.heads),
        "block_out_channels": list(config.widths),
        "cross_attention_dim": config.text_width,
        "down_block_types": down,
        "encoder_hid_dim": config.text_width_in,
        "encoder_hid_dim_type": None if config.text_width_in is None else "text_proj",
        "in_channels": config.channels_in,
        "layers_per_block": config.blocks,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_num_groups": 32,
        "out_channels": config.channels_out,
        "projection_class_embeddings_input_dim": config.vector_width,
        # A level without transformers counts one, as in the published files.
        "transformer_layers_per_block": [depth or 1 for depth in config.depths],
        "up_block_types": up,
        "use_linear_projection": not config.convolved,
    }


def unet_part(original: Signature, diffusers: Signature) -> Part[UNetConfig]:
    """A family's UNet: the shared layouts under the family's own evidence."""
    return Part(
        name="unet",
        network=UNet,
        layouts=(
            Layout(
                name="original",
                style="original",
                signature=original,
                config=original_config,
                table=original_table,
            ),
            Layout(
                name="diffusers",
                style="diffusers",
                signature=diffusers,
                config=diffusers_config,
                table=diffusers_table,
                settings=settings,
            ),
        ),
    )
