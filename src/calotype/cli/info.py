"""`calotype info`: what a file, a folder or a hub model is, from headers alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calotype.cli.output import columns, size

if TYPE_CHECKING:
    from calotype.loading import Description
    from calotype.loading.planning import Plan


def _plan(metavar: str, text: str) -> Any:
    return typer.Option(metavar=metavar, help=text, rich_help_panel="Plan", show_default=False)


def info(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE",
            help="A file, a folder or a hub id; with --plan as many as make a model.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    manifests: Annotated[
        bool, typer.Option("--manifests", help="Name the checkpoint files known, one a line.")
    ] = False,
    manifest: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="List one of them: key, tab, dimensions separated by commas."),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Predict the memory that a picture takes, on each rung of --memory.")
    ] = False,
    width: Annotated[int | None, _plan("PIXELS", "Width of that picture.")] = None,
    height: Annotated[int | None, _plan("PIXELS", "Height of that picture.")] = None,
    device: Annotated[str | None, _plan("NAME", "Where it would be drawn: cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, _plan("NAME", "float32, bfloat16 or float16.")] = None,
) -> None:
    """Say what a source is: family, variant, layout, parts. No weights are read.

    calotype info flux1-dev.safetensors
    """
    given = sources or []
    if sum((bool(given) or plan, manifests, manifest is not None)) != 1:
        raise typer.BadParameter("give one of SOURCE, --manifests and --manifest NAME")
    if plan:
        from calotype.loading.planning import plan as planned

        predicted = planned(*given, width=width, height=height, device=device, dtype=dtype)
        typer.echo(json.dumps(predicted.to_dict(), indent=2) if as_json else "\n".join(prediction(predicted)))
        return
    if any(value is not None for value in (width, height, device, dtype)):
        raise typer.BadParameter("--width, --height, --device and --dtype go with --plan")
    if len(given) > 1:
        raise typer.BadParameter("give one SOURCE; several make a model for --plan")
    if manifests:
        from calotype.loading import manifests as known

        lines = list(known())
    elif manifest is not None:
        from calotype.loading import manifest as listed

        lines = [f"{key}\t{','.join(map(str, shape))}" for key, shape in listed(manifest)]
    else:
        from calotype.loading import describe

        description = describe(given[0])
        lines = [json.dumps(description.to_dict(), indent=2, ensure_ascii=False)] if as_json else described(description)
    typer.echo("\n".join(lines))


def prediction(plan: Plan) -> list[str]:
    """A plan for people."""
    lines = [f"{plan.model}, {plan.width}x{plan.height} on {plan.device}", ""]
    phases = [f"{phase.name} {size(phase.activations)}" for phase in plan.phases]
    rungs = [
        (
            rung,
            size(plan.device_bytes[rung]),
            *(size(phase.weights[rung]) for phase in plan.phases),
            "" if plan.device == "cpu" else size(plan.host_bytes[rung]),
        )
        for rung in plan.device_bytes
    ]
    heads = ("memory", "peak", *(f"to {phase.name}" for phase in plan.phases), "" if plan.device == "cpu" else "host")
    lines += columns([heads, *rungs], right=(1, 2, 3, 4, 5), indent="  ")
    return [
        *lines,
        "",
        f"  beside weights: {', '.join(phases)}; what kernels take for themselves is not counted",
        f"  {size(plan.free_bytes)} are free on {plan.device}: memory={plan.chosen} is the highest that fits",
    ]


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
