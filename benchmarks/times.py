"""The seconds of one contestant, on one clock. Imports nothing that a contestant may import: it starts before them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

T = TypeVar("T")
clock = time.perf_counter


@dataclass
class Times:
    """Seconds, on one clock."""

    start: float = field(default_factory=clock)
    loaded: float = 0.0
    text: float = 0.0
    text_end: float = 0.0
    marks: list[float] = field(default_factory=list)  # the end of each step
    decode: float = 0.0
    end: float = 0.0

    def reading(self, function: Callable[..., T]) -> Callable[..., T]:
        """The function, with its time counted as text encoding."""

        def timed(*positional: Any, **named: Any) -> T:
            start = clock()
            result = function(*positional, **named)
            self.text_end = clock()
            self.text += self.text_end - start
            return result

        return timed

    def decoding(self, function: Callable[..., T]) -> Callable[..., T]:
        """The function, with its time counted as decoding."""

        def timed(*positional: Any, **named: Any) -> T:
            start = clock()
            result = function(*positional, **named)
            self.decode += clock() - start
            return result

        return timed

    def summary(self) -> dict[str, Any]:
        steps = [now - last for last, now in pairwise(self.marks)]
        return {
            "import and load": self.loaded - self.start,
            "text encoding": self.text,
            "first step": self.marks[0] - self.text_end,
            "step": min(steps),
            "steps": steps,
            "decode": self.decode,
            "picture after loading": self.end - self.loaded,
            "picture in all": self.end - self.start,
        }
