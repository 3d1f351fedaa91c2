"""`calotype models`: the families there are, how far each is supported, and the names that options take."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calotype.cli.output import columns

if TYPE_CHECKING:
    from calotype.request import Defaults

LINE = 110  # characters
RUNS, COMING = "runs", "recognised, not run yet"


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One variant of a family. `defaults` is None where it cannot run yet."""

    family: str
    variant: str
    status: str
    defaults: Defaults | None


def models(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List families and variants, whether they run, their defaults, samplers and schedules."""
    listed = list(known())
    if as_json:
        typer.echo(json.dumps([asdict(item) for item in listed], indent=2))
        return
    running = [(item, item.defaults) for item in listed if item.defaults is not None]
    rows = [("RUNS", "SIZE", "STEPS", "CFG", "EMBEDDED", "SAMPLER", "SCHEDULE", "TOKENS")]
    rows += [_row(item, defaults) for item, defaults in running]
    coming: dict[str, list[str]] = {}
    for item in listed:
        if item.defaults is None:
            coming.setdefault(item.family, []).append(item.variant)
    blocks = [
        columns(rows, right=(1, 2, 3, 4, 7)),
        columns([("RECOGNISED, NOT RUN YET", ""), *((family, ", ".join(names)) for family, names in coming.items())]),
        columns([("FAMILY", "SAMPLERS"), *_names(running, "samplers")]),
        columns([("FAMILY", "SCHEDULES"), *_names(running, "schedules")]),
    ]
    typer.echo("\n\n".join("\n".join(block) for block in blocks))


def known() -> Iterator[Listed]:
    """The built-in model, what runs, and what is only recognised so far."""
    from calotype.families import COMING as KNOWN
    from calotype.families import FAMILIES
    from calotype.families.flux import SCHNELL_DEFAULTS

    card = built_in_card()
    if card is not None:
        own = replace(SCHNELL_DEFAULTS, **card.get("defaults", {}))
        variant = f"{card.get('variant', 'builtin')} (built-in)"
        yield Listed(family="flux", variant=variant, status=RUNS, defaults=own)
    for family in FAMILIES:
        for variant, defaults in family.variants.items():
            yield Listed(family=family.name, variant=variant, status=RUNS, defaults=defaults)
    backbones = ((item.family, item.variant) for item in KNOWN if item.family and item.part in ("unet", "transformer"))
    for family, variant in dict.fromkeys(backbones):
        yield Listed(family=family, variant=variant, status=COMING, defaults=None)


def built_in_card() -> dict[str, Any] | None:
    """The built-in model's own variant and defaults; None where the package lacks the model."""
    from calotype.checkpoint.sources import CARD, read_json

    path = Path(__file__).parents[1] / "builtin" / CARD
    return read_json(path) if path.is_file() else None


def _names(running: list[tuple[Listed, Defaults]], field: str) -> Iterator[tuple[str, str]]:
    """What this field of the defaults allows, families that allow the same together, lines of a terminal's width."""
    families: dict[str, list[str]] = {}
    for item, defaults in running:
        named = families.setdefault(", ".join(getattr(defaults, field)), [])
        if item.family not in named:
            named.append(item.family)
    room = LINE - 2 - max(len(", ".join(named)) for named in families.values())
    for allowed, named in families.items():
        first, *rest = textwrap.wrap(allowed, room)
        yield ", ".join(named), first
        yield from (("", line) for line in rest)


def _row(item: Listed, defaults: Defaults) -> tuple[str, ...]:
    embedded = defaults.embedded_guidance
    return (
        f"{item.family}/{item.variant}",
        f"{defaults.width}x{defaults.height}",
        str(defaults.steps),
        f"{defaults.cfg_scale:g}",
        "-" if embedded is None else f"{embedded:g}",
        defaults.sampler,
        defaults.schedule,
        "-" if defaults.text_tokens is None else str(defaults.text_tokens),
    )
