"""What prompts become: read once for all stages and tiles of a job, and remembered from job to job."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from contextlib import nullcontext
from typing import Generic, NamedTuple, TypeVar

from calotype.families.model import FamilyModel
from calotype.request import Job

C = TypeVar("C")


class PromptCache(Generic[C]):
    """What prompts became, by content: the same words under the same settings are not encoded again.

    Holds the `room` entries used last.
    """

    def __init__(self, room: int = 32) -> None:
        self.room = room
        self._held: OrderedDict[Hashable, C] = OrderedDict()

    def get(self, key: Hashable) -> C | None:
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: Hashable, value: C) -> None:
        self._held[key] = value
        while len(self._held) > self.room:
            self._held.popitem(last=False)

    def clear(self) -> None:
        self._held.clear()


class Read(NamedTuple, Generic[C]):
    """What the prompts of one job became; `negative` is None without classifier-free guidance."""

    positive: C
    negative: C | None
    regions: tuple[C, ...]


def read(model: FamilyModel[C], jobs: Sequence[Job], cache: PromptCache[C]) -> list[Read[C]]:
    """Encode the prompts of all jobs, while the encoders are there: each once."""
    asked: dict[Hashable, tuple[str, Job, bool]] = {}
    adapted = None if model.adapters is None else model.adapters.text

    def key(prompt: str, job: Job, *, negative: bool = False) -> Hashable:
        made = (model.content, adapted, negative, model.conditioned_by(job), prompt)
        asked.setdefault(made, (prompt, job, negative))
        return made

    keys = [
        (
            key(job.prompt, job),
            None if job.cfg_scale == 1 else key(job.negative_prompt, job, negative=True),
            tuple(key(region.prompt, job) for region in job.regions),
        )
        for job in jobs
    ]
    known = _conditioned(model, asked, cache)
    return [
        Read(known[positive], None if negative is None else known[negative], tuple(known[each] for each in regions))
        for positive, negative, regions in keys
    ]


def _conditioned(
    model: FamilyModel[C], asked: Mapping[Hashable, tuple[str, Job, bool]], cache: PromptCache[C]
) -> dict[Hashable, C]:
    """What prompts become, by key; the encoders are needed for those alone that are not remembered."""
    known = {key: value for key in asked if (value := cache.get(key)) is not None}
    if len(known) < len(asked):
        encoding = nullcontext() if model.adapters is None else model.adapters.encoding()
        with model.memory.holding(*model.encoders), encoding:
            for key, (prompt, job, negative) in asked.items():
                if key not in known:
                    known[key] = model.condition(prompt, job, negative=negative)
                    cache.put(key, known[key])
    return known
