"""`calotype batch`: a file of requests becomes pictures, with the model loaded once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from calotype.cli.generate import Target, check_files, draw, load_model
from calotype.errors import RequestError
from calotype.image import opened
from calotype.request import Request

SEED = 0  # for the trial alone


def batch(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A request a line, as JSON.")],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where pictures go, named after prompt and seed; made if need be.")
    ] = Path("."),
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="File, folder or hub id; repeat it for parts.", show_default=False),
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps, ...")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="NAME", help="float32, bfloat16 or float16.")] = None,
    memory: Annotated[
        str, typer.Option(metavar="MODE", help="How much stays loaded: auto, resident, components or stream.")
    ] = "auto",
    backend: Annotated[str, typer.Option(metavar="NAME", help="torch, or openvino.")] = "torch",
    storage: Annotated[
        list[str] | None,
        typer.Option(metavar="TYPE", help="Keep weights in fewer bits, as `generate` does.", show_default=False),
    ] = None,
    progress: Annotated[
        bool | None, typer.Option("--progress/--no-progress", help="Steps on stderr.", show_default=False)
    ] = None,
) -> None:
    """Draw a file of requests, one model for all, and print the pictures' paths.

    Each line is one request in the fields of Python's Request: {"prompt": "a red fox", "seed": 7, "steps": 20}. All of
    them are checked before the first picture is drawn.

    calotype batch prompts.jsonl --model sd_xl_base_1.0.safetensors --out pictures
    """
    requests = read(file)
    target = Target.of(f"{out}/", 1)
    from calotype.cli.progress import progress as shown

    show = shown(progress)
    loaded = load_model(model or [], show, device=device, dtype=dtype, memory=memory, backend=backend, storage=storage)
    for line, request in requests.items():
        try:
            loaded.family.levels(request.complete(loaded.family.defaults, SEED, opened(request)))
        except RequestError as error:
            raise error.under(line) from None
    for request in requests.values():
        draw(loaded, request, target, None, show)


def read(file: Path) -> dict[str, Request]:
    """The requests of a file, by the line that each is on ("line 3: "). RequestError where any is none."""
    made: dict[str, Request] = {}
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise RequestError("FILE", file, f"UTF-8 text, a request a line as JSON ({error})") from None
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        line = f"line {number}: "
        try:
            values: Any = json.loads(text)
            if not isinstance(values, dict):
                raise RequestError("request", text, 'an object, as {"prompt": "a red fox", "seed": 7}')
            made[line] = Request.from_dict(values)  # pyright: ignore[reportUnknownArgumentType]
            check_files(made[line])
        except (json.JSONDecodeError, RecursionError) as error:
            raise RequestError(f"{line}request", text, f"JSON ({error})") from None
        except RequestError as error:
            raise error.under(line) from None
    if not made:
        raise RequestError("FILE", file, "at least one request, a line each as JSON")
    return made
