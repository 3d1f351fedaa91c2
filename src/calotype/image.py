"""Pictures in and out: tensors, files, and the metadata that lets a picture be drawn again."""

from __future__ import annotations

import io
import json
import os
import secrets
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from calotype.errors import MetadataError, OutputError, RequestError
from calotype.request import FINGERPRINT, SIZES, Job, Request
from calotype.version import VERSION

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
MOST_PIXELS = 64_000_000  # Pillow itself would decode almost three times as many before it objects
KEY = "calotype"  # the PNG text chunk with everything, as JSON
A1111_KEY = "parameters"  # the one that other programs read


def to_pil(picture: Tensor) -> Image.Image:
    """3 h w in 0..1 (clipped) -> 8 bit RGB, rounded to nearest."""
    from numpy import uint8

    levels = picture.detach().float().clamp(0, 1).mul(255).round().permute(1, 2, 0)
    return Image.fromarray(levels.cpu().numpy().astype(uint8))


def to_tensor(picture: Image.Image) -> Tensor:
    """RGB picture -> float32 3 h w in 0..1."""
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)


def open_picture(path: str | os.PathLike[str], field: str = "picture") -> Image.Image:
    """A user's picture, fully decoded. Only PNG, JPEG and WebP of at most 64 million pixels are read.

    Raises RequestError naming the field, the file and what is wrong with it; the size is checked before anything is
    decoded.
    """
    try:
        with warnings.catch_warnings():
            # Pillow's own, much higher limit: ours follows.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(Path(path), formats=FORMATS)
        with opened as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise _unreadable(field, path, f"it has {picture.width} x {picture.height}")
            picture.load()
    except UnidentifiedImageError:
        raise _unreadable(field, path, "it is none of these") from None
    except OSError as error:
        raise _unreadable(field, path, error.strerror or str(error)) from error
    except (Image.DecompressionBombError, SyntaxError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise _unreadable(field, path, str(error)) from error
    return picture


def mask_picture(given: str | os.PathLike[str] | Image.Image, field: str = "mask_image") -> Image.Image:
    """A mask, grey: opened if it is a path, turned as its camera was held, black where it is clear.

    Raises RequestError naming what cannot be read.
    """
    picture = _opened(given, field)
    if picture.has_transparency_data:
        black = Image.new("RGBA", picture.size, "black")
        picture = Image.alpha_composite(black, picture.convert("RGBA"))
    return picture.convert("L")


def mask_tensor(mask: Image.Image, height: int, width: int) -> Tensor:
    """A grey picture as 1 1 h w in 0..1, float32: of each place the mean of what the mask has there."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    values = torch.from_numpy(np.asarray(mask.convert("L"), dtype=np.float32) / 255)[None, None]
    return F.adaptive_avg_pool2d(values, (height, width))


def filled(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """A picture that is made of its surroundings where a mask of its size is white; greys are in between.

    Push and pull (Gortler et al. 1996, "The Lumigraph", section 3.4): what is known is averaged to half the size and
    so on, and what is not known taken from the first such size that has something there, going over smoothly.
    """
    import torch.nn.functional as F

    def smaller(x: Tensor) -> Tensor:
        kernel, stride, padding = ([over if side > 1 else one for side in x.shape[2:]] for over, one in _OVERLAPPING)
        return F.avg_pool2d(x, kernel, stride, padding)

    def of(colours: Tensor, known: Tensor) -> Tensor:
        """Colours times how far they are known, and that -> colours everywhere."""
        if known.min() == 1 or known.shape[2:].numel() == 1:
            return colours / known.clamp(min=1e-6)
        share = smaller(known)
        surely = (16 * share).clamp(max=1)
        means = smaller(colours) / share.clamp(min=1e-6)
        around = F.interpolate(of(means * surely, surely), size=known.shape[2:], mode="bilinear")
        return colours + (1 - known) * around

    known = 1 - mask_tensor(mask, picture.height, picture.width)
    return to_pil(of(to_tensor(picture) * known, known)[0])


_OVERLAPPING = (4, 1), (2, 1), (1, 0)  # kernel, stride and padding that halve a side, and that leave one of 1


def input_picture(given: str | os.PathLike[str] | Image.Image, field: str = "input_image") -> Image.Image:
    """A picture to start from: opened if it is a path, turned as its camera was held, on white where it is clear.

    Raises RequestError naming what cannot be read.
    """
    picture = _opened(given, field)
    if "controls[" not in field:  # whose numbers may be no colours
        picture = in_srgb(picture)
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    picture = picture.convert("RGB")
    picture.info = {}  # what the file says of itself is not said of what becomes of it
    return picture


def in_srgb(picture: Image.Image) -> Image.Image:
    """A picture whose file says what its numbers mean, in the numbers that mean the same in sRGB.

    A profile that cannot be read, or does not fit, says nothing; one of sRGB changes nothing.
    """
    profile = picture.info.get("icc_profile")
    if not profile:
        return picture
    from PIL import ImageCms

    mode = "RGBA" if picture.has_transparency_data else "RGB"
    own = picture.convert(mode) if picture.mode not in ("L", "CMYK", mode) else picture
    try:
        known = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(known).lower():
            return picture
        made = ImageCms.profileToProfile(own, known, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return picture
    return picture if made is None else made


def opened(request: Request) -> dict[str, Image.Image]:
    """All pictures of a request, by the field that names them. RequestError names the one that cannot be read."""
    return {
        name: (mask_picture if name.endswith(("mask", "mask_image")) else input_picture)(given, name)
        for name, given in request.pictures().items()
    }


OPTIONS = {"regions": "region", "controls": "control", "image_prompts": "image-prompt"}  # called otherwise than fields


def _opened(given: str | os.PathLike[str] | Image.Image, field: str) -> Image.Image:
    if isinstance(given, str) and given.startswith(FINGERPRINT):
        part = field.split("[")[0]
        option = f"--{OPTIONS.get(part, part)} FILE".replace("_", "-")
        raise RequestError(field, given, f"the picture itself ({option}): this is only the mark by which it is known")
    picture = given if isinstance(given, Image.Image) else open_picture(given, field)
    return _of_eight_bits(ImageOps.exif_transpose(picture), field)


def _of_eight_bits(picture: Image.Image, field: str) -> Image.Image:
    """A grey picture of 16 bits as one of 8, for Pillow would clip it; others as they are.

    RequestError for what has no such range: numbers beyond 16 bits, and floating-point ones.
    """
    if picture.mode == "F":
        raise RequestError(field, "a picture of floating-point numbers (mode F)", "one of 8 or 16 bits: scale it first")
    if not picture.mode.startswith("I"):
        return picture
    import numpy as np

    values = np.asarray(picture)
    least, most = int(values.min(initial=0)), int(values.max(initial=0))
    if least < 0 or most > 65535:
        raise RequestError(field, f"a picture of numbers from {least} to {most}", "numbers from 0 to 65,535")
    grey = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    clear = picture.info.get("transparency")
    if isinstance(clear, int):  # one grey stands for it
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _unreadable(field: str, path: str | os.PathLike[str], why: str) -> RequestError:
    return RequestError(field, str(path), f"a PNG, JPEG or WebP file of at most {MOST_PIXELS:,} pixels; {why}")


def embed_metadata(
    picture: Image.Image, job: Job, *, model: str, source: str, attached: Sequence[Mapping[str, object]] = ()
) -> None:
    """Note in `picture.info` what made it, as `save` writes it: an A1111 `parameters` text and a `calotype` JSON.

    `attached` are adapters that the model had beside the job's own, each with name, file and scale.
    """
    picture.info[A1111_KEY] = a1111_parameters(job, model)
    record: dict[str, Any] = {"version": VERSION, "model": model, "source": source, "job": job.to_dict()}
    if attached:
        record["attached"] = list(attached)
    record["follows"] = list(job.follows)
    if job.fingerprints:
        record["pictures"] = dict(job.fingerprints)  # a path may come to lead to another one
    picture.info[KEY] = json.dumps(record, ensure_ascii=False)


def a1111_parameters(job: Job, model: str) -> str:
    """The three-part text that A1111 introduced and most programs and sites can read."""
    settings: dict[str, object] = {
        "Steps": job.steps,
        "Sampler": job.sampler,
        "Schedule type": job.schedule,
        "CFG scale": f"{job.cfg_scale:g}",
        "Distilled CFG Scale": None if job.embedded_guidance is None else f"{job.embedded_guidance:g}",
        "Seed": job.seed,
        "Size": f"{job.width}x{job.height}",
        "Denoising strength": None if job.denoising_strength is None else f"{job.denoising_strength:g}",
        "Mask blur": job.mask_feather or None,
        "Hires resize": f"{job.high_res[-1].width}x{job.high_res[-1].height}" if job.high_res else None,
        "Clip skip": job.clip_skip,
        "Model": model,
        "Version": f"Calotype {VERSION}",
    }
    lines = [job.prompt]
    if job.negative_prompt:
        lines.append(f"Negative prompt: {job.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None))
    return "\n".join(lines)


def _quoted(value: object) -> str:
    """A value of the last line; JSON where it would be taken for two."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:"\n') else text


def read_metadata(path: str | Path) -> tuple[Request, dict[str, Any]]:
    """The request that drew a picture, and the record it comes from (version, model, source, job, attached, pictures).

    Adapters that were attached to the model are among the request's `loras`: a plain model draws the picture again.
    What only followed from other values (tiles, sizes that a model was told) is left open, to follow from others. A
    relative path that leads nowhere from here is taken from the file's folder, where it leads somewhere from there.
    Raises MetadataError where the file holds none, or none that can be read; RequestError for what is no picture.
    """
    picture = open_picture(path)
    text = picture.info.get(KEY)
    if not isinstance(text, str):
        raise MetadataError(f"{path}: no `{KEY}` text in the file; only PNGs that Calotype wrote can be repeated")
    try:
        record = json.loads(text)
        _found_beside(Path(path).parent, record["job"])
        job = dict(record["job"])
        scales: dict[str, float] = {}
        for each in [*record.get("attached", []), *job.get("loras", [])]:
            scales[each["file"]] = scales.get(each["file"], 0) + each.get("scale", 1)
        job["loras"] = [{"file": file, "scale": scale} for file, scale in scales.items()]
        likely = zip(SIZES, (job.get("width"), job.get("height"), 0, 0) * 2, strict=False)
        # Older files do not say it.
        follows = set(record.get("follows", [name for name, usual in likely if job.get(name) == usual]))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise MetadataError(f"{path}: its `{KEY}` text is damaged ({error}); nothing can be read from it") from error
    return Request.from_dict({name: value for name, value in job.items() if name not in follows}), record


PLACES = ("input_image", "mask_image", "image", "mask")  # what pictures are called in plain values


def _found_beside(folder: Path, values: Any) -> None:  # noqa: ANN401
    """Take the pictures that relative paths no longer lead to from this folder, where they are there."""
    if isinstance(values, list):
        for each in values:  # pyright: ignore[reportUnknownVariableType]
            _found_beside(folder, each)
    elif isinstance(values, dict):
        for name, value in values.items():  # pyright: ignore[reportUnknownVariableType]
            if name in PLACES and isinstance(value, str):
                if not os.path.exists(value) and os.path.isfile(folder / value):
                    values[name] = str(folder / value)
            else:
                _found_beside(folder, value)


def check_writable(path: Path) -> None:
    """Raise OutputError now, before any work, if a picture could not be written at `path`."""
    try:
        folder = path.is_dir()
    except OSError as error:  # a name too long, a drive that does not answer
        raise OutputError(f"{path}: not writable ({error.strerror}); choose another place") from error
    if folder:
        raise OutputError(f"{path}: is a folder; name a file in it")
    if path.suffix.lower() not in ENDINGS:
        raise OutputError(f"{path}: unknown kind of picture {path.suffix!r}; use .png, .jpg or .webp")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}; make it first")
    try:
        # A trial: permissions alone do not tell of read-only disks.
        with tempfile.TemporaryFile(dir=path.parent):
            writable = not path.exists() or os.access(path, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise OutputError(f"{path}: not writable; choose another place")


def save(picture: Image.Image, path: str | Path) -> None:
    """Write a picture with its metadata: a temporary file in the same folder, then a rename, so never half a file.

    The ending names the format; metadata is kept in PNG. Raises OutputError if it cannot be written.
    """
    path = Path(path)
    check_writable(path)
    ending = path.suffix.lower()
    options: Mapping[str, Any] = {"pnginfo": _text_chunks(picture)} if ending == ".png" else {"quality": 95}
    # Named before it is made: an interrupt finds it whenever it comes.
    part = path.with_name(f".calotype-{secrets.token_hex(8)}{ending}")
    try:
        with part.open("xb") as file:
            picture.save(file, format=Image.registered_extensions()[ending], **options)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(f"{path}: could not be written ({error})") from error
        raise


def _text_chunks(picture: Image.Image) -> PngInfo:
    chunks = PngInfo()
    if A1111_KEY in picture.info:
        # As A1111 does: the older kind of chunk where it can hold the text, for many programs know no other.
        chunks.add_text(A1111_KEY, str(picture.info[A1111_KEY]))
    if KEY in picture.info:
        chunks.add_itxt(KEY, str(picture.info[KEY]))
    return chunks
