"""The one path from a request to pictures: prompt, conditioning, denoising, decoding."""

from __future__ import annotations

from calotype.generate.events import Event, Events, Lowered, Picture, Progress
from calotype.generate.model import Model
from calotype.generate.path import stream
from calotype.generate.prompts import PromptCache

__all__ = ["Event", "Events", "Lowered", "Model", "Picture", "Progress", "PromptCache", "stream"]
