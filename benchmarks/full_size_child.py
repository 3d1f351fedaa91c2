"""The process that full_size.py measures: loads a model, draws one picture, prints seconds and memory as JSON."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def memory(field: str) -> float:
    """GiB of this process, as the kernel counts them."""
    found = re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found.group(1)) / 2**20 if found else 0.0


def limit(bytes_: float) -> None:
    """Let torch take no more of a GPU's memory."""
    import torch

    torch.cuda.set_per_process_memory_fraction(min(bytes_ / torch.cuda.mem_get_info()[1], 1.0))


def main(told: dict[str, Any]) -> None:
    clock = time.perf_counter
    start = clock()
    import calotype

    if told["budget"] is not None:
        limit(told["budget"] * 1e9)
    chosen = {"storage": told["storage"]} if told["storage"] else {}
    model = calotype.load(*told["sources"], device=told["device"], memory=told["memory"], **chosen)
    loaded = clock()
    measured: dict[str, Any] = {
        "memory": model.family.memory.rung,
        "load s": loaded - start,
        "GiB in memory after loading": memory("VmRSS"),
        "anonymous GiB after loading": memory("RssAnon"),
    }
    spent = {"condition": 0.0, "decode": 0.0}
    anonymous = {"condition": 0.0, "decode": 0.0}

    def timed(name: str) -> Callable[..., Any]:
        function = getattr(model.family, name)

        def run(*positional: Any, **named: Any) -> Any:
            began = clock()
            result = function(*positional, **named)
            spent[name] += clock() - began
            anonymous[name] = memory("RssAnon")
            return result

        return run

    for name in spent:
        setattr(model.family, name, timed(name))
    request = calotype.Request(
        prompt="a red fox in the snow",
        width=told["side"],
        height=told["side"],
        steps=told["steps"],
        seed=7,
        **told["more"],
    )
    marks: list[float] = []
    between = 0.0
    for event in model.stream(request):
        between = max(between, memory("RssAnon"))
        marks.append(clock())
        if isinstance(event, calotype.Lowered):
            measured["memory"] = event.rung
        if isinstance(event, calotype.Picture):
            event.image.save(told["picture"])
            measured["cfg_scale"] = event.job.cfg_scale
    if told["device"] == "cuda":
        import torch

        measured["peak GB on the GPU"] = torch.cuda.max_memory_reserved() / 1e9
    steps = [now - last for last, now in zip(marks[:-2], marks[1:-1], strict=True)]
    print(
        "\n"
        + json.dumps(
            measured
            | {
                "text encoding s": spent["condition"],
                "prepare and first step s": marks[0] - loaded - spent["condition"],
                "further steps s": steps,
                "decode s": spent["decode"],
                "picture after loading s": marks[-1] - loaded,
                "anonymous GiB after text encoding": anonymous["condition"],
                "anonymous GiB, largest between steps": between,
                "peak GiB in memory, mapped weights included": memory("VmHWM"),
            }
        )
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
