"""`calotype`: its commands, and what their errors look like from outside.

Exit status: 0 done, 1 an error, 2 a request or a command line that cannot be honoured, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from calotype.cli.annotate import annotate
from calotype.cli.batch import batch
from calotype.cli.convert import convert
from calotype.cli.doctor import doctor
from calotype.cli.generate import generate
from calotype.cli.info import info
from calotype.cli.models import models
from calotype.errors import CalotypeError, RequestError
from calotype.version import VERSION

INTERRUPTED = 130

app = typer.Typer(
    name="calotype",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclass
class Settings:
    """What holds for any command."""

    debug: bool = False


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"calotype {VERSION}")
        raise typer.Exit


@app.callback()
def calotype(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Pictures from prompts: open text-to-image models in one engine.

    calotype generate "a red apple on a blue background"
    """
    context.ensure_object(Settings).debug = debug


app.command()(generate)
app.command()(batch)
app.command()(info)
app.command()(convert)
app.command()(annotate)
app.command()(models)
app.command()(doctor)


def run() -> None:
    """The entry point."""
    # A polite kill unwinds like an interrupt does: nothing half-written stays behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run one command line; the exit status."""
    settings = Settings()
    try:
        status = app(
            args=_global_first(arguments) or ["--help"], prog_name="calotype", standalone_mode=False, obj=settings
        )
        status = status if isinstance(status, int) else 0
        sys.stdout.flush()
        if status == INTERRUPTED:
            _say("interrupted")
        return status
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read us has enough (`| head`); what is left in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _explained(error, settings.debug)


def _global_first(arguments: Sequence[str]) -> list[str]:
    """`--debug` is understood after the command too: one adds it at the end of the line that failed."""
    stop = arguments.index("--") if "--" in arguments else len(arguments)
    if "--debug" not in arguments[:stop]:
        return list(arguments)
    return ["--debug", *(word for word in arguments[:stop] if word != "--debug"), *arguments[stop:]]


def _explained(error: Exception, debug: bool) -> int:
    """Say an error in one line; the exit status."""
    status, text = _status(error), _one_line(str(error))
    if debug or status is None:
        traceback.print_exc()
    usage = getattr(error, "format_message", None)
    if usage is not None:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "calotype"
        # "Invalid value: " says nothing where no option is named.
        text = f"{_one_line(usage()).removeprefix('Invalid value: ').rstrip('.')} (see `{command} --help`)"
    elif status is None:
        text = "the error above is a fault of Calotype; please report it with the command that led to it"
    elif _is_out_of_memory(error) and not isinstance(error, CalotypeError):
        text = f"out of memory: {text}; try a smaller --width and --height, or --dtype bfloat16"
    _say(text)
    return 1 if status is None else status


def _status(error: Exception) -> int | None:
    """The exit status of an expected error; None for a fault of ours."""
    if isinstance(error, RequestError) or hasattr(error, "format_message"):  # typer's own, which it does not export
        return 2
    return 1 if isinstance(error, (CalotypeError, OSError)) or _is_out_of_memory(error) else None


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, not imported here


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _say(message: str) -> None:
    typer.echo(f"calotype: {message}", err=True)
