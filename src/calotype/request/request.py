"""Requests, and the jobs that families make of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from calotype.errors import RequestError
from calotype.request.checks import MAX_COUNT, MAX_SEED, MAX_SIDE, MAX_STEPS, flag, picture, real, text, whole
from calotype.request.parts import Control, HighRes, ImagePrompt, Lora, Part, Region, parts_of
from calotype.request.pictures import (
    Extension,
    extended,
    extended_size,
    extension,
    fingerprint,
    is_picture,
    name_of,
    resized,
    resized_mask,
    softened,
)
from calotype.request.size import Size

if TYPE_CHECKING:
    from PIL import Image

    from calotype.request.pictures import PictureSource


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a family does where a request is silent.

    `grain` is the number of pixels that both sides must be a multiple of; `samplers` and `schedules` are the names
    that the family's process allows; `text_tokens` and `clip_skip` are None where a request cannot choose them; `sizes`
    says whether the network is told sizes and a crop, `original_size` which one it is told of the original (None: that
    of the picture); `shifts` whether schedules can be shifted; `largest` is the longest side that the network has
    positions for, None where any will do; `denoising_strength` is for requests with an input image.
    """

    width: int
    height: int
    grain: int
    steps: int
    cfg_scale: float
    embedded_guidance: float | None
    sampler: str
    schedule: str
    shift: float | None
    text_tokens: int | None
    samplers: tuple[str, ...]
    schedules: tuple[str, ...]
    clip_skip: int | None = None
    sizes: bool = False
    original_size: tuple[int, int] | None = None
    shifts: bool = False
    largest: int | None = None
    denoising_strength: float = 0.7

    @property
    def useless(self) -> dict[str, str]:
        """The fields that a request to this model must leave at None, and why."""
        found: dict[str, str] = {}
        if self.embedded_guidance is None:
            found["embedded_guidance"] = "this model has no guidance input; use cfg_scale"
        for field in ("text_tokens", "clip_skip"):
            if getattr(self, field) is None:
                found[field] = "this model leaves no choice there"
        if not self.shifts:
            found["shift"] = "this model's schedules have no shift; choose another schedule"
        if not self.sizes:
            found |= dict.fromkeys(SIZES, "this model is not told sizes")
        return found


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request with every gap filled: what one run of the engine needs to know.

    What a model has no use for stays None: `embedded_guidance`, `shift` (also where the schedule derives it from the
    size, as FLUX.1 dev does), `text_tokens`, `clip_skip`, the sizes that SDXL is told. `input_image` is an RGB picture
    of the job's own size, `input_name` the path that it came from, or its fingerprint; `mask_image` and `region_masks`
    are grey pictures of that size, white where something is to be drawn. `control_images` are RGB pictures of any size,
    one for each of `controls`, None for the picture that the job begins with; `pass_images` are those of the passes,
    `pass_tiles` size and stride of their tiles, where they have any; `prompt_images` are those of `image_prompts`.
    `fingerprints` are those of all pictures as they were given, each behind the field that names it. `follows` are the
    fields that the request left open and that follow from others: another size has its own.
    """

    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    cfg_scale: float
    cfg_rescale: float
    embedded_guidance: float | None
    seed: int
    count: int
    sampler: str
    schedule: str
    shift: float | None
    text_tokens: int | None
    clip_skip: int | None = None
    input_image: Image.Image | None = None
    input_name: str | None = None
    denoising_strength: float | None = None
    mask_image: Image.Image | None = None
    mask_name: str | None = None
    mask_feather: int = 0
    keep_unmasked: bool = False
    extend: Extension | None = None
    loras: tuple[Lora, ...] = ()
    regions: tuple[Region, ...] = ()
    region_masks: tuple[Image.Image, ...] = ()
    controls: tuple[Control, ...] = ()
    control_images: tuple[Image.Image | None, ...] = ()
    image_prompts: tuple[ImagePrompt, ...] = ()
    prompt_images: tuple[Image.Image, ...] = ()
    pass_images: tuple[tuple[Image.Image | None, ...], ...] = ()
    pass_tiles: tuple[tuple[int, int] | None, ...] = ()
    high_res: tuple[HighRes, ...] = ()
    tiled: bool = False
    tile_size: int | None = None
    tile_stride: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    crop_left: int | None = None
    crop_top: int | None = None
    target_width: int | None = None
    target_height: int | None = None
    fingerprints: tuple[tuple[str, str], ...] = ()
    follows: tuple[str, ...] = ()

    @property
    def size(self) -> Size:
        return Size(self.width, self.height)

    def at(self, number: int) -> Job:
        """The job of a pass at a higher resolution; it tells the network its own size, unless the request says one."""
        stage = self.high_res[number]
        tiles = self.pass_tiles[number] or (None, None)
        size = Size(stage.width, stage.height)
        grown = {"original_width": size.width, "original_height": size.height}
        grown |= {"target_width": size.width, "target_height": size.height}
        return replace(
            self,
            prompt=self.prompt if stage.prompt is None else stage.prompt,
            width=size.width,
            height=size.height,
            steps=stage.steps or self.steps,
            denoising_strength=float(stage.strength),
            tiled=self.tiled if stage.tiled is None else stage.tiled,
            tile_size=tiles[0],
            tile_stride=tiles[1],
            controls=self.controls if stage.controls is None else stage.controls,
            control_images=self.control_images if stage.controls is None else self.pass_images[number],
            mask_image=None if self.mask_image is None else resized_mask(self.mask_image, size),
            region_masks=tuple(resized_mask(mask, size) for mask in self.region_masks),
            **{name: value for name, value in grown.items() if name in self.follows},
        )

    def within(self, box: Sequence[int], scale: int) -> Job:
        """The job of a tile: `box` is its top, left, height and width in units of `scale` pixels.

        To a network that is told sizes, it is what it is: a crop of the picture.
        """
        top, left, height, width = (side * scale for side in box)
        if (height, width) == (self.height, self.width):
            return self
        told = {}
        if self.crop_left is not None and self.crop_top is not None:
            told = {"crop_left": self.crop_left + left, "crop_top": self.crop_top + top}
            told |= {"target_width": width, "target_height": height}
        place = (left, top, left + width, top + height)
        masks = tuple(mask.crop(place) for mask in self.region_masks)
        return replace(self, width=width, height=height, region_masks=masks, **told)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the names of a request, for metadata; a picture is named by its path or fingerprint."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["input_image"] = values.pop("input_name")
        values["mask_image"] = values.pop("mask_name")
        del values["region_masks"], values["control_images"], values["prompt_images"]
        del values["pass_images"], values["pass_tiles"], values["fingerprints"], values["follows"]
        return plain(values)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for. None means the family's default; a bad value raises RequestError at once.

    prompt             what to draw
    negative_prompt    what to steer away from; used where cfg_scale is not 1
    width, height      pixels, multiples of the family's grain
    steps              sampling steps
    cfg_scale          classifier-free guidance, two passes (Ho and Salimans 2022); 1 skips the negative pass
    cfg_rescale        0..1: how far the guided estimate is pulled back to the positive one's spread (Lin et al. 2023)
    embedded_guidance  the distilled guidance input of FLUX.1 dev (3.5); refused by models without that input
    seed               picture k of the request is drawn from seed + k; None draws a seed at random
    count              how many pictures
    sampler, schedule  names, as `calotype models` lists them
    shift              how far a flow schedule leans to the noisy side; None follows the family
    text_tokens        length of the sequence that T5 or ChatGLM reads
    clip_skip          which of CLIP's layers is taken, from the end: 1 the last, 2 the one before it
    input_image        a picture to start from (a PIL image, or the path of one), resized to the request's size; a
                       side that is not given follows the picture's proportions, and both the family's usual area
    denoising_strength 0..1, exclusive of 0: how far the input image is taken back to noise. All `steps` are taken over
                       that part of the way
    mask_image         what of the input image is drawn anew: a picture (or its path), white for that, resized likewise;
                       greys are in between
    mask_feather       pixels over which the mask's edge is softened
    keep_unmasked      put the input image back where the mask is black: those pixels stay as they are, bit for bit
    extend             pixels to draw beyond the input image: (left, top, right, bottom); it grows by them, at the right
                       and bottom as far as the grain needs, and is not resized
    loras              LoRAs (LoCon, DoRA, LoHa, LoKr) to draw with, each with its scale; together they add up
    regions            prompts for places in the picture
    controls           pictures that lead ControlNets
    image_prompts      pictures that say what to draw, through IP-Adapters
    high_res           passes over the finished picture at higher resolutions, one after another
    tiled              the network sees the picture in overlapping tiles: for sizes that it was not trained for
    tile_size, tile_stride
                       pixels a side of a tile (the family's usual size), and from one to the next (three quarters)
    original_width, original_height, crop_left, crop_top, target_width, target_height
                       what SDXL and early Hunyuan-DiT are told of the picture: the size before it was scaled, where
                       it was cut, the size aimed at (Podell et al. 2023); None follows width and height, uncropped,
                       but Hunyuan-DiT takes an original of 1024 x 1024
    """

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    cfg_rescale: float = 0.0
    embedded_guidance: float | None = None
    seed: int | None = None
    count: int = 1
    sampler: str | None = None
    schedule: str | None = None
    shift: float | None = None
    text_tokens: int | None = None
    clip_skip: int | None = None
    input_image: PictureSource | None = None
    denoising_strength: float | None = None
    mask_image: PictureSource | None = None
    mask_feather: int = 0
    keep_unmasked: bool = False
    extend: Extension | None = None
    loras: tuple[Lora, ...] = ()
    regions: tuple[Region, ...] = ()
    controls: tuple[Control, ...] = ()
    image_prompts: tuple[ImagePrompt, ...] = ()
    high_res: tuple[HighRes, ...] = ()
    tiled: bool = False
    tile_size: int | None = None
    tile_stride: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    crop_left: int | None = None
    crop_top: int | None = None
    target_width: int | None = None
    target_height: int | None = None

    def __post_init__(self) -> None:
        text("prompt", self.prompt)
        text("negative_prompt", self.negative_prompt)
        whole("count", self.count, 1, MAX_COUNT)
        real("cfg_rescale", self.cfg_rescale, 0, 1)
        for field, low, high in (
            ("width", 1, MAX_SIDE),
            ("height", 1, MAX_SIDE),
            ("steps", 1, MAX_STEPS),
            ("seed", 0, MAX_SEED),
            ("text_tokens", 1, 4096),
            ("clip_skip", 1, 32),
            ("original_width", 1, MAX_SIDE),
            ("original_height", 1, MAX_SIDE),
            ("crop_left", 0, MAX_SIDE),
            ("crop_top", 0, MAX_SIDE),
            ("target_width", 1, MAX_SIDE),
            ("target_height", 1, MAX_SIDE),
        ):
            value = getattr(self, field)
            if value is not None:
                whole(field, value, low, high)
        for field, low, high in (
            ("cfg_scale", 0, 100),
            ("embedded_guidance", 0, 100),
            ("shift", 0.01, 100),
        ):
            value = getattr(self, field)
            if value is not None:
                real(field, value, low, high)
        whole("mask_feather", self.mask_feather, 0, 1024)
        for field in ("keep_unmasked", "tiled"):
            flag(field, getattr(self, field))
        for field in ("input_image", "mask_image"):
            if getattr(self, field) is not None:
                picture(field, getattr(self, field))
        object.__setattr__(self, "loras", parts_of(Lora, "loras", self.loras))
        object.__setattr__(self, "regions", parts_of(Region, "regions", self.regions))
        object.__setattr__(self, "controls", parts_of(Control, "controls", self.controls))
        object.__setattr__(self, "image_prompts", parts_of(ImagePrompt, "image_prompts", self.image_prompts))
        object.__setattr__(self, "high_res", parts_of(HighRes, "high_res", self.high_res))
        if self.extend is not None:
            object.__setattr__(self, "extend", extension("extend", self.extend))
        if self.denoising_strength is not None:
            real("denoising_strength", self.denoising_strength, 0, 1)
            if self.denoising_strength == 0:
                raise RequestError(
                    "denoising_strength", self.denoising_strength, "more than 0: nothing of the picture would change"
                )
        self._go_together()

    def _go_together(self) -> None:
        """Refuse fields that mean nothing without others."""
        if self.input_image is None:
            for field in ("denoising_strength", "mask_image", "extend"):
                if getattr(self, field) is not None:
                    raise RequestError(field, getattr(self, field), "None without an input_image")
        if self.mask_image is None and self.extend is None:
            for field in ("mask_feather", "keep_unmasked"):
                if getattr(self, field):
                    raise RequestError(field, getattr(self, field), "nothing without a mask_image, or extend")
        if self.input_image is None:
            for number, control in enumerate(self.controls):
                if control.image is None:
                    raise RequestError(f"controls[{number}].image", None, "a picture: there is no input_image either")
        if self.keep_unmasked and self.high_res:
            raise RequestError("keep_unmasked", True, "False with high_res: enlarged pixels are not kept as they were")
        if not self.tiled and not any(each.tiled for each in self.high_res):
            for field in ("tile_size", "tile_stride"):
                if getattr(self, field) is not None:
                    raise RequestError(field, getattr(self, field), "None where nothing is tiled")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Request:
        """A request from plain values (a batch line, PNG metadata, an HTTP body); unknown names raise RequestError."""
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                raise RequestError(name, values[name], "one of the fields " + ", ".join(sorted(known)))
        if "prompt" not in values:
            raise RequestError("prompt", None, "text")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the fields left to the family; a picture is named by its path or its fingerprint."""
        values = plain({field.name: getattr(self, field.name) for field in fields(self)})
        return {name: value for name, value in values.items() if value is not None}

    def all_controls(self) -> dict[str, Control]:
        """Its controls and those of its passes, by their fields: "controls[0]", "high_res[0].controls[0]"."""
        stages = [("", self.controls), *((f"high_res[{k}].", each.controls) for k, each in enumerate(self.high_res))]
        return {
            f"{stage}controls[{k}]": control for stage, controls in stages for k, control in enumerate(controls or ())
        }

    def pictures(self) -> dict[str, PictureSource]:
        """All pictures that the request names, by the field that does: "input_image", "controls[0].image"."""
        named: dict[str, PictureSource | None] = {"input_image": self.input_image, "mask_image": self.mask_image}
        named |= {f"regions[{k}].mask": region.mask for k, region in enumerate(self.regions)}
        named |= {f"{field}.image": control.image for field, control in self.all_controls().items()}
        named |= {f"image_prompts[{k}].image": shown.image for k, shown in enumerate(self.image_prompts)}
        return {name: picture for name, picture in named.items() if picture is not None}

    def complete(self, defaults: Defaults, seed: int, opened: Mapping[str, Image.Image] | None = None) -> Job:
        """The job that this request is for a family with these defaults; `seed` is used where none was asked for.

        `opened` are the request's `pictures`. Raises RequestError for sizes off the grid, samplers or schedules that
        the family's process does not have, and values for what the model has no use for.
        """
        opened = {} if opened is None else opened
        assert opened.keys() == self.pictures().keys()
        picture, mask = opened.get("input_image"), opened.get("mask_image")
        masks = [opened[f"regions[{k}].mask"] for k in range(len(self.regions))]

        def leading(stage: str, controls: Sequence[Control] | None) -> tuple[Image.Image | None, ...]:
            return tuple(opened.get(f"{stage}controls[{k}].image") for k in range(len(controls or ())))

        usual = Size(defaults.width, defaults.height)
        if picture is not None and self.extend is not None:
            usual = self._extended(picture, defaults)
        elif picture is not None:
            usual = _in_proportion(Size(*picture.size), self.width, self.height, usual, defaults.grain)
        width = usual.width if self.width is None else self.width
        height = usual.height if self.height is None else self.height
        tiled = self.tiled or any(each.tiled for each in self.high_res)
        tiles = _tiles("", self.tile_size, self.tile_stride, defaults) if tiled else None
        _on_the_grid("", Size(width, height), defaults, tiled=self.tiled)
        pass_tiles: list[tuple[int, int] | None] = []
        before = Size(width, height)
        for number, stage in enumerate(self.high_res):
            field, tiled = f"high_res[{number}].", self.tiled if stage.tiled is None else stage.tiled
            size = Size(stage.width, stage.height)
            _on_the_grid(field, size, defaults, tiled=tiled)
            if size.width < before.width or size.height < before.height:
                raise RequestError(field.rstrip("."), str(size), f"at least {before}, the picture's size before it")
            before, own = size, tiles if tiled else None
            for name in ("tile_size", "tile_stride"):
                if getattr(stage, name) is not None and not tiled:
                    raise RequestError(field + name, getattr(stage, name), "None where nothing is tiled")
            if stage.tile_size is not None or stage.tile_stride is not None:
                own = _tiles(field, stage.tile_size or self.tile_size, stage.tile_stride or self.tile_stride, defaults)
            pass_tiles.append(own)
        sampler = defaults.sampler if self.sampler is None else self.sampler
        if sampler not in defaults.samplers:
            raise RequestError("sampler", sampler, "one of " + ", ".join(defaults.samplers))
        schedule = defaults.schedule if self.schedule is None else self.schedule
        if schedule not in defaults.schedules:
            raise RequestError("schedule", schedule, "one of " + ", ".join(defaults.schedules))
        for field, why in defaults.useless.items():
            if getattr(self, field) is not None:
                raise RequestError(field, getattr(self, field), f"None: {why}")
        told = {name: getattr(self, name) for name in SIZES}
        derived = ("tile_size", "tile_stride") if tiles else ()
        derived += ("width", "height") if self.extend is not None else ()
        if defaults.sizes:
            derived += tuple(name for name in SIZES if not (defaults.original_size and name.startswith("original")))
            usually = (*(defaults.original_size or (width, height)), 0, 0, width, height)
            told = {name: told[name] if told[name] is not None else u for name, u in zip(SIZES, usually, strict=True)}
        strength = name = None
        if picture is not None:
            assert self.input_image is not None
            name = name_of(self.input_image)
            size = Size(width, height)
            if self.extend is not None:
                picture, mask = extended(picture, mask, self.extend, size)
            picture = resized(picture, size)
            mask = None if mask is None else softened(resized_mask(mask, size), self.mask_feather)
            if mask is not None and mask.getbbox() is None:
                raise RequestError("mask_image", self.mask_image, "one with white in it: nothing would be drawn")
            usual_strength = 1.0 if mask is not None else defaults.denoising_strength
            strength = self.denoising_strength or usual_strength
        return Job(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            width=width,
            height=height,
            steps=defaults.steps if self.steps is None else self.steps,
            cfg_scale=float(defaults.cfg_scale if self.cfg_scale is None else self.cfg_scale),
            cfg_rescale=float(self.cfg_rescale),
            embedded_guidance=(
                defaults.embedded_guidance if self.embedded_guidance is None else float(self.embedded_guidance)
            ),
            seed=seed if self.seed is None else self.seed,
            count=self.count,
            sampler=sampler,
            schedule=schedule,
            shift=defaults.shift if self.shift is None else float(self.shift),
            text_tokens=defaults.text_tokens if self.text_tokens is None else self.text_tokens,
            clip_skip=defaults.clip_skip if self.clip_skip is None else self.clip_skip,
            input_image=picture,
            input_name=name,
            denoising_strength=None if strength is None else float(strength),
            mask_image=mask,
            mask_name=None if self.mask_image is None else name_of(self.mask_image),
            mask_feather=self.mask_feather,
            keep_unmasked=self.keep_unmasked,
            extend=self.extend,
            loras=self.loras,
            regions=self.regions,
            region_masks=tuple(resized_mask(each, Size(width, height)) for each in masks),
            controls=self.controls,
            control_images=leading("", self.controls),
            image_prompts=self.image_prompts,
            prompt_images=tuple(opened[f"image_prompts[{k}].image"] for k in range(len(self.image_prompts))),
            pass_images=tuple(leading(f"high_res[{k}].", each.controls) for k, each in enumerate(self.high_res)),
            pass_tiles=tuple(pass_tiles),
            high_res=self.high_res,
            tiled=self.tiled,
            tile_size=None if tiles is None else tiles[0],
            tile_stride=None if tiles is None else tiles[1],
            fingerprints=tuple((name, fingerprint(each)) for name, each in opened.items()),
            follows=tuple(name for name in derived if getattr(self, name) is None),
            **told,
        )

    def _extended(self, picture: Image.Image, defaults: Defaults) -> Size:
        """The size of the extended picture; a request may repeat it, and not want another."""
        assert self.extend is not None
        size = extended_size(Size(*picture.size), self.extend, defaults.grain)
        for field, value, wanted in (("width", self.width, size.width), ("height", self.height, size.height)):
            if value not in (None, wanted):
                raise RequestError(field, value, f"None with extend: {size} follows from it")
        if max(size.width, size.height) > MAX_SIDE:
            raise RequestError("extend", self.extend, f"less: {size} would follow, and {MAX_SIDE:,} are the most")
        return size


SIZES = ("original_width", "original_height", "crop_left", "crop_top", "target_width", "target_height")


# What most requests say nothing of is left out of plain values where it says nothing.
_SILENT: dict[str, Any] = {
    "mask_image": None,
    "mask_feather": 0,
    "keep_unmasked": False,
    "extend": None,
    "loras": (),
    "regions": (),
    "controls": (),
    "image_prompts": (),
    "high_res": (),
    "tiled": False,
    "tile_size": None,
    "tile_stride": None,
}


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Values that JSON has: pictures are named, parts are what they were made of."""
    values = {name: value for name, value in values.items() if name not in _SILENT or value != _SILENT[name]}
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, os.PathLike) or is_picture(value):
            changed[name] = name_of(value)
        elif isinstance(value, tuple):
            items: tuple[Any, ...] = value
            changed[name] = [item.to_dict() if isinstance(item, Part) else item for item in items]
    return values | changed


def _on_the_grid(prefix: str, size: Size, defaults: Defaults, *, tiled: bool) -> None:
    """Refuse a size that the family cannot draw."""
    nearest = size.nearest(defaults.grain)
    for field, value, near in (("width", size.width, nearest.width), ("height", size.height, nearest.height)):
        if value != near:
            allowed = f"multiples of {defaults.grain}; the nearest valid size is {nearest}"
            raise RequestError(prefix + field, value, allowed)
        if defaults.largest is not None and value > defaults.largest and not tiled:
            allowed = f"at most {defaults.largest:,}: this model knows no positions beyond; or tiled"
            raise RequestError(prefix + field, value, allowed)


def _tiles(prefix: str, size: int | None, stride: int | None, defaults: Defaults) -> tuple[int, int]:
    """Pixels a side of a tile, and from one to the next."""
    size = min(defaults.width, defaults.height) if size is None else size
    stride = max(size * 3 // 4 // defaults.grain, 1) * defaults.grain if stride is None else stride
    for field, value in ((prefix + "tile_size", size), (prefix + "tile_stride", stride)):
        whole(field, value, defaults.grain, MAX_SIDE)
        if value % defaults.grain:
            raise RequestError(field, value, f"multiples of {defaults.grain}")
    if stride > size:
        allowed = f"at most the tile_size, {size}: the tiles would leave gaps"
        raise RequestError(prefix + "tile_stride", stride, allowed)
    if defaults.largest is not None and size > defaults.largest:
        allowed = f"at most {defaults.largest:,}: this model knows no positions beyond"
        raise RequestError(prefix + "tile_size", size, allowed)
    return size, stride


def _in_proportion(picture: Size, width: int | None, height: int | None, usual: Size, grain: int) -> Size:
    """A size for a job that starts from a picture, where its request leaves sides open."""
    if width is not None and height is not None:
        return usual
    if width is not None:
        found = Size(width, round(width * picture.height / picture.width)).nearest(grain)
    elif height is not None:
        found = Size(round(height * picture.width / picture.height), height).nearest(grain)
    else:
        found = picture.of_area(usual.width * usual.height, grain)
    if max(found.width, found.height) > MAX_SIDE:
        raise RequestError(
            "input_image", f"{picture} pixels", f"milder proportions: {found} would follow; give width and height"
        )
    return found
