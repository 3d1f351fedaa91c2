"""`calotype convert`: the same weights in the other layout."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Layout(str, Enum):
    """How a model lies on disk: one file as its authors published it, or a folder a part each."""

    ORIGINAL = "original"
    DIFFUSERS = "diffusers"


def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A file, a folder or a hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file or folder to write.")],
    to: Annotated[Layout, typer.Option("--to", help="The layout wanted.")],
) -> None:
    """Write a model in another layout, bit for bit, and print the paths of its files.

    calotype convert flux1-dev.safetensors flux1-dev/ --to diffusers
    """
    from calotype.loading import convert

    for path in convert(source, out, to.value):
        typer.echo(path)
