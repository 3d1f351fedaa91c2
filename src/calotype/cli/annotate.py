"""`calotype annotate`: a picture that a ControlNet can be led by."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from calotype.request import Size


def _setting(metavar: str, text: str) -> Any:
    return typer.Option(metavar=metavar, help=text, rich_help_panel="Settings", show_default=False)


def _learned(metavar: str, text: str) -> Any:
    return typer.Option(metavar=metavar, help=text, rich_help_panel="Learned kinds", show_default=False)


def annotate(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="canny, lineart, softedge, tile, blur, color, gray, invert, none; learned, with an extra: depth, "
            "openpose, normal, hed, mlsd, lineart_learned, lineart_anime.",
        ),
    ],
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A PNG, JPEG or WebP file.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Where to write; else here as IMAGE-KIND.png.",
            show_default=False,
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS", help="Width; else the picture's own, or in proportion to --height.", show_default=False
        ),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(metavar="PIXELS", help="Height, likewise.", show_default=False),
    ] = None,
    low: Annotated[float | None, _setting("X", "canny: slopes above it are edges beside strong ones (100).")] = None,
    high: Annotated[float | None, _setting("X", "canny: slopes above it are edges, up to 2040 (200).")] = None,
    line_width: Annotated[
        float | None, _setting("X", "lineart (0.7), softedge (1): in 512ths of the shorter side.")
    ] = None,
    strength: Annotated[float | None, _setting("X", "lineart, softedge: higher shows fainter ones too (1).")] = None,
    blur: Annotated[
        float | None, _setting("PIXELS", "canny, tile (0), blur (8): the Gaussian's standard deviation.")
    ] = None,
    factor: Annotated[float | None, _setting("X", "tile: how much smaller it is made, and large again (1).")] = None,
    cell: Annotated[int | None, _setting("PIXELS", "color: the side of a cell (64).")] = None,
    weights: Annotated[str | None, _learned("SOURCE", "Hub id or folder of the weights.")] = None,
    device: Annotated[str | None, _learned("NAME", "cpu, cuda, ...")] = None,
    resolution: Annotated[
        int | None, _learned("PIXELS", "The shorter side at which it looks; not for depth (512).")
    ] = None,
    hands: Annotated[bool | None, _learned("", "openpose: draw hands too.")] = None,
    face: Annotated[bool | None, _learned("", "openpose: draw faces too.")] = None,
    coarse: Annotated[bool | None, _learned("", "lineart_learned: draw fewer lines.")] = None,
) -> None:
    """Make a picture that leads a ControlNet, and print the path of the file.

    calotype annotate canny photo.jpg --out edges.png --low 80
    """
    from calotype.control.annotators import annotate, annotator
    from calotype.errors import OutputError
    from calotype.image import check_writable, input_picture, open_picture, save
    from calotype.request import Size

    given = {
        "low": low,
        "high": high,
        "line_width": line_width,
        "strength": strength,
        "blur": blur,
        "factor": factor,
        "cell": cell,
        "weights": weights,
        "device": device,
        "resolution": resolution,
        "hands": hands,
        "face": face,
        "coarse": coarse,
    }
    settings: dict[str, object] = {name: value for name, value in given.items() if value is not None}
    annotator(kind, **settings)
    target = Path(f"{image.stem}-{kind}.png") if out is None else out
    check_writable(target)
    if target.exists() and image.exists() and target.samefile(image):
        raise OutputError(f"{target}: is the picture itself; name another file")
    picture = input_picture(open_picture(image, "IMAGE"))
    save(annotate(kind, picture, _size(Size(*picture.size), width, height), **settings), target)
    typer.echo(target)


def _size(own: Size, width: int | None, height: int | None) -> Size:
    """The size asked for; a side that is not given follows the other in the picture's proportions."""
    if width is None and height is not None:
        width = max(1, round(own.width * height / own.height))
    if height is None and width is not None:
        height = max(1, round(own.height * width / own.width))
    return type(own)(own.width if width is None else width, own.height if height is None else height)
