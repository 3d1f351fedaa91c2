"""A loaded model, as users hold it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import count
from typing import Generic, TypeVar

from PIL import Image

from calotype.checkpoint.files import Weights
from calotype.control.annotators import check
from calotype.control.image_prompts import ImageReader
from calotype.errors import RequestError
from calotype.families.model import FamilyModel
from calotype.generate.events import Events, Picture
from calotype.generate.loras import able
from calotype.generate.path import stream
from calotype.generate.prompts import PromptCache
from calotype.lora.files import UNTOLD, find
from calotype.nn.leader import Leader
from calotype.request import Request

C = TypeVar("C")


class Model(Generic[C]):
    """A loaded model, as `calotype.load` returns it."""

    def __init__(
        self,
        family: FamilyModel[C],
        *,
        storage_errors: Mapping[str, float] | None = None,
        left_out: Mapping[str, str] | None = None,
        prompts: PromptCache[C] | None = None,
        controls: Callable[[str], Leader] | None = None,
        readers: Callable[[str, str | None], ImageReader] | None = None,
    ) -> None:
        """`controls` loads ControlNets for this model, `readers` IP-Adapters, each with its encoder.

        `prompts` may be shared between models: each finds its own by `family.content`.
        """
        self.family = family
        self.storage_errors = dict(storage_errors or {})  # of parts kept in fewer bits, relative to what was read
        self.left_out = dict(left_out or {})  # parts that it does without, and what that means
        self.prompts = PromptCache[C]() if prompts is None else prompts
        self._controls = controls
        self._loaded: dict[str, Leader] = {}
        self._readers = readers

    @property
    def name(self) -> str:
        """Family and variant: flux/dev."""
        return f"{self.family.family}/{self.family.variant}"

    @property
    def attached(self) -> dict[str, float]:
        """The adapters attached, by name, each with its strength."""
        adapters = self.family.adapters
        return {} if adapters is None else {name: adapters[name].scale for name in adapters.names}

    def attach(self, file: str | os.PathLike[str], scale: float = 1.0, name: str | None = None) -> str:
        """Attach a LoRA (LoCon, DoRA, LoHa, LoKr) to the model, `scale` times as strong as it was trained to be.

        `file` is a path, a folder that PEFT or diffusers wrote, or the name of a file in CALOTYPE_HOME/loras. The name
        that it is attached under is returned: by default the file's, with a number where that is taken.

        Raises a LoadError for a file that is not sound, UnexpectedKeys for one that belongs to another family, which
        is named; RequestError for a name or scale that cannot be. The model is then as it was.
        """
        adapters = able(self.family)
        path = find(file)
        weights = Weights.of(str(file), [path])
        if name is None:
            stem = path.stem if path.stem not in UNTOLD else path.parent.name or path.stem
            taken = set(adapters.names)
            name = next(n for k in count(1) if (n := stem if k == 1 else f"{stem}-{k}") not in taken)
        elif not (isinstance(name, str) and name.strip() and name.isprintable()):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise RequestError("name", name, "text that can be read, and None for the file's name")
        adapters.attach(weights, name=name, scale=scale)
        return name

    def scale(self, name: str, value: float) -> None:
        """Change an attached adapter's strength; 0 is without it, while the file stays at hand."""
        able(self.family).scale(name, value)

    def detach(self, name: str) -> None:
        """Take an adapter away: the model's numbers are those of before, bit for bit."""
        able(self.family).detach(name)

    def load_control(self, source: str | os.PathLike[str]) -> Leader:
        """The ControlNet that a file, folder, hub id or file on the hub holds, loaded once, where and as this model is.

        Raises a LoadError: WrongShape, which names the families that it fits, where this model's is not among them.
        """
        name = os.fspath(source)
        if name not in self._loaded:
            if self._controls is None:
                raise RequestError("controls", name, f"none: ControlNets of {self.name} do not run here yet")
            self._loaded[name] = self._controls(name)
        return self._loaded[name]

    def load_image_prompt(
        self, source: str | os.PathLike[str], encoder: str | os.PathLike[str] | None = None
    ) -> ImageReader:
        """The IP-Adapter in a file (or org/name/path of one on the hub) with its image encoder, loaded once.

        Raises a LoadError: WrongShape, which names the families that it fits, where this model's is not among them;
        MissingPart where the encoder is neither given nor beside it.
        """
        if self._readers is None:
            raise RequestError("image_prompts", os.fspath(source), f"none: they do not run with {self.name} yet")
        return self._readers(os.fspath(source), None if encoder is None else os.fspath(encoder))

    def stream(self, request: Request) -> Events:
        """Progress and pictures as they come; close the iterator to stop early."""
        check(request)
        networks = {control.source: self.load_control(control.source) for control in request.all_controls().values()}
        readers = {each.networks: self.load_image_prompt(*each.networks) for each in request.image_prompts}
        return stream(self.family, request, cache=self.prompts, networks=networks, readers=readers)

    def generate(self, prompt: str | Request, **fields: object) -> Image.Image | list[Image.Image]:
        """Draw a prompt: one picture, or a list when `count` is more than 1.

        `fields` are those of `Request`. `picture.info` holds what made the picture.
        """
        if isinstance(prompt, Request):
            request = replace(prompt, **fields)
        else:
            request = Request.from_dict({"prompt": prompt, **fields})
        with closing(self.stream(request)) as events:
            pictures = [event.image for event in events if isinstance(event, Picture)]
        return pictures if request.count > 1 else pictures[0]
