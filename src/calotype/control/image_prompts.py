"""Image prompts: pictures, read by CLIP and an IP-Adapter into what every cross-attention attends to beside text."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from calotype.memory.ladder import Memory
from calotype.nn.image_adapter import ImageAdapter, Places
from calotype.nn.unet import KeysAndValues
from calotype.nn.vision import VisionEncoder
from calotype.request import Job, fingerprint

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures: red, green, blue
SPREAD = (0.26862954, 0.26130258, 0.27577711)
REMEMBERED = 4  # pictures


def pixels(picture: Image.Image, side: int) -> Tensor:
    """A picture as CLIP sees it: its shorter side scaled to `side`, the middle of it, normalised; 1 3 side side."""
    short, long = sorted(picture.size)
    scaled = int(side * long / short)
    size = (side, scaled) if picture.width <= picture.height else (scaled, side)
    seen = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = (seen.width - side) // 2, (seen.height - side) // 2
    values = np.asarray(seen.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
    values = (values - np.array(MEAN, np.float32)) / np.array(SPREAD, np.float32)
    return torch.from_numpy(values).permute(2, 0, 1)[None]


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageReader:
    """An IP-Adapter and its image encoder, for the UNet whose cross-attentions are at `places`."""

    adapter: ImageAdapter
    encoder: VisionEncoder
    places: Places
    _known: OrderedDict[tuple[str, bool], KeysAndValues] = field(default_factory=OrderedDict)

    def read(self, picture: Image.Image, memory: Memory, *, negative: bool) -> KeysAndValues:
        """What each cross-attention reads of a picture, in the UNet's order; `negative` adds a row without it."""
        key = (fingerprint(picture), negative)
        if key not in self._known:
            self._known[key] = self._read(picture, memory, negative=negative)
        self._known.move_to_end(key)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return self._known[key]

    def _read(self, picture: Image.Image, memory: Memory, *, negative: bool) -> KeysAndValues:
        shown = pixels(picture, self.encoder.config.side).to(memory.device)
        adapter = self.adapter
        if negative and not adapter.of_embedding:
            shown = torch.cat([shown, torch.zeros_like(shown)])
        with memory.holding(self.encoder):
            seen = self.encoder(shown)
        with memory.holding(adapter):
            taken = adapter.taken(seen)
            if negative and adapter.of_embedding:
                taken = torch.cat([taken, torch.zeros_like(taken)])
            return self.places.in_forward_order(adapter(taken, self.places.heads))


ImageReaders = Mapping[tuple[str, str | None], ImageReader]
"""The readers of a job's image prompts, by their `networks`."""


def read_pictures(job: Job, readers: ImageReaders, memory: Memory) -> tuple[list[KeysAndValues], list[KeysAndValues]]:
    """A job's image prompts, for either side of guidance; what counts for nothing is left out.

    Those of one network and one scale are read together, as one row of tokens. The second is empty where the job has no
    negative side.
    """
    negative = job.cfg_scale != 1
    alike: dict[tuple[object, float], list[KeysAndValues]] = {}
    for prompt, picture in zip(job.image_prompts, job.prompt_images, strict=True):
        if prompt.scale != 0:
            read = readers[prompt.networks].read(picture, memory, negative=negative)
            alike.setdefault((prompt.networks, prompt.scale), []).append(read)
    with_, without = list[KeysAndValues](), list[KeysAndValues]()
    for (_, scale), reads in alike.items():
        # Attention is linear in its values: scaled there, once a job, and not in every step.
        pairs = [zip(*each, strict=True) for each in zip(*reads, strict=True)]  # of each place: all keys, all values
        places = [(torch.cat(k, dim=2), scale * torch.cat(v, dim=2)) for k, v in pairs]
        with_.append(tuple((k[:1], v[:1]) for k, v in places))
        if negative:
            without.append(tuple((k[1:], v[1:]) for k, v in places))
    return with_, without
