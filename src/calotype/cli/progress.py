"""Progress on stderr: bars for a terminal, lines for a log, nothing for a script."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

if TYPE_CHECKING:
    from calotype.generate import Progress

Stepper = Callable[["Progress"], None]


class Silent:
    """Shows nothing."""

    @contextmanager
    def waiting(self, what: str) -> Generator[None, None, None]:
        """Something of unknown length happens inside the block."""
        yield

    @contextmanager
    def picture(self, number: int, count: int) -> Generator[Stepper, None, None]:
        """Picture `number` (from 0) is drawn inside the block, which hands on its steps."""
        yield lambda event: None


class Lines(Silent):
    """A line for each step."""

    @contextmanager
    def waiting(self, what: str) -> Generator[None, None, None]:
        typer.echo(what, err=True)
        yield

    @contextmanager
    def picture(self, number: int, count: int) -> Generator[Stepper, None, None]:
        def step(event: Progress) -> None:
            stage = f"stage {event.stage + 1}/{event.stages}, " if event.stages > 1 else ""
            typer.echo(f"picture {number + 1}/{count}: {stage}step {event.step}/{event.steps}", err=True)

        yield step


class Bars(Silent):
    """A bar that is gone when its picture is there: stdout may be the same terminal."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)

    @contextmanager
    def waiting(self, what: str) -> Generator[None, None, None]:
        with self.console.status(escape(what)):
            yield

    @contextmanager
    def picture(self, number: int, count: int) -> Generator[Stepper, None, None]:
        name = f"picture {number + 1} of {count}" if count > 1 else "drawing"
        columns = (TextColumn("{task.description}"), BarColumn(), Pace())
        with Bar(*columns, console=self.console, transient=True, redirect_stdout=False) as bar:
            # Until the first step the length is unknown: encoders may take longer than a step.
            task = bar.add_task("reading the prompt" if number == 0 else name, total=None)

            def step(event: Progress) -> None:
                now = name if event.stage == 0 else f"{name}, stage {event.stage + 1} of {event.stages}"
                if event.step == event.steps:
                    now = "decoding"
                bar.update(task, description=now, completed=event.step, total=event.steps)

            yield step


class Pace(ProgressColumn):
    """Steps done, how long one takes, how long the rest will."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        words = [f"{task.completed:.0f}/{task.total:.0f}"]
        if task.speed:
            words.append(f"{1 / task.speed:.2f} s/step")
        if task.time_remaining:
            minutes, seconds = divmod(round(task.time_remaining), 60)
            words.append(f"{minutes}:{seconds:02} left")
        return Text("  ".join(words))


def progress(wanted: bool | None) -> Silent:
    """What was asked for; where nothing was, bars if somebody looks."""
    terminal = sys.stderr.isatty()
    if wanted is False or (wanted is None and not terminal):
        return Silent()
    return Bars() if terminal else Lines()
