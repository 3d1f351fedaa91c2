"""`calotype info`: what a file, a folder or a hub model is, from headers alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from calotype.cli.output import columns, size

if TYPE_CHECKING:
    from calotype.loading import Description


def info(
    source: Annotated[
        str | None, typer.Argument(metavar="SOURCE", help="A file, a folder or a hub id.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    manifests: Annotated[
        bool, typer.Option("--manifests", help="Name the checkpoint files known, one a line.")
    ] = False,
    manifest: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="List one of them: key, tab, dimensions separated by commas."),
    ] = None,
) -> None:
    """Say what a source is: family, variant, layout, parts. No weights are read.

    calotype info flux1-dev.safetensors
    """
    if sum((source is not None, manifests, manifest is not None)) != 1:
        raise typer.BadParameter("give one of SOURCE, --manifests and --manifest NAME")
    if manifests:
        from calotype.loading import manifests as known

        lines = list(known())
    elif manifest is not None:
        from calotype.loading import manifest as listed

        lines = [f"{key}\t{','.join(map(str, shape))}" for key, shape in listed(manifest)]
    else:
        from calotype.loading import describe

        assert source is not None
        description = describe(source)
        lines = [json.dumps(description.to_dict(), indent=2, ensure_ascii=False)] if as_json else described(description)
    typer.echo("\n".join(lines))


def described(description: Description) -> list[str]:
    """A description for people."""
    name = "/".join(part for part in (description.family, description.variant) if part)
    what = " ".join(part for part in (name, description.kind) if part)
    lines = [description.source, f"  {what}, {description.layout} layout" if description.layout else f"  {what}"]
    if description.note:
        lines.append(f"  {description.note}")
    rows = [
        (
            part.name,
            part.layout,
            ", ".join(part.dtypes),
            f"{part.tensors:,} tensors",
            f"{part.parameters:,} parameters",
            size(part.bytes),
            f"under {part.prefix}" if part.prefix else "",
        )
        for part in description.parts
    ]
    return [*lines, "", *columns(rows, right=(3, 4, 5), indent="  ")] if rows else lines
