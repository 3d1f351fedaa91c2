"""`calotype generate`: a prompt becomes files."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Container
from contextlib import closing, nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calotype.errors import OutputError, RequestError
from calotype.image import check_writable, opened, read_metadata, save
from calotype.request import Control, Request, fingerprint
from calotype.request.parts import UPSCALERS

if TYPE_CHECKING:
    from calotype.cli.progress import Silent
    from calotype.generate import Model

BUILT_IN = "built-in"  # the source that the built-in model's pictures name
SLUG_BYTES = 100


def _option(panel: str, metavar: str, text: str) -> Any:
    return typer.Option(metavar=metavar, help=text, rich_help_panel=panel, show_default=False)


def _named(name: str, panel: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=text, rich_help_panel=panel, show_default=False)


def _flag(panel: str, text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=panel, show_default=False)


_PANELS = ("Picture", "Sampling", "Large pictures", "What SDXL is told of the picture", "Model", "Output")
_picture, _sampling, _large, _told, _model, _output = (partial(_option, panel) for panel in _PANELS)


def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What to draw.", show_default=False)] = None,
    negative_prompt: Annotated[str | None, _picture("TEXT", "What to steer away from; see --cfg-scale.")] = None,
    width: Annotated[int | None, _picture("PIXELS", "Width: a multiple of 8, of 16 for FLUX.1.")] = None,
    height: Annotated[int | None, _picture("PIXELS", "Height, likewise.")] = None,
    seed: Annotated[int | None, _picture("N", "Same seed, same picture. Random if not given.")] = None,
    count: Annotated[int | None, _picture("N", "How many pictures: from seed, seed + 1, ... One if not given.")] = None,
    like: Annotated[
        Path | None, _picture("PNG", "Repeat a picture that Calotype wrote; other options change what they name.")
    ] = None,
    steps: Annotated[int | None, _sampling("N", "Sampling steps.")] = None,
    cfg_scale: Annotated[float | None, _sampling("X", "Classifier-free guidance, in two passes; 1 is without.")] = None,
    cfg_rescale: Annotated[float | None, _sampling("X", "0 to 1: against the glare of a high --cfg-scale.")] = None,
    embedded_guidance: Annotated[float | None, _sampling("X", "The guidance input of FLUX.1 dev.")] = None,
    sampler: Annotated[str | None, _sampling("NAME", "One that `calotype models` lists.")] = None,
    schedule: Annotated[str | None, _sampling("NAME", "One that `calotype models` lists.")] = None,
    shift: Annotated[float | None, _sampling("X", "How far the schedule leans to noise.")] = None,
    text_tokens: Annotated[int | None, _sampling("N", "Length of the T5 or ChatGLM sequence.")] = None,
    clip_skip: Annotated[int | None, _sampling("N", "CLIP's layer from the end: 1 the last, 2 ...")] = None,
    input_image: Annotated[
        str | None, _picture("FILE", "Start from this picture, resized; see --denoising-strength.")
    ] = None,
    denoising_strength: Annotated[
        float | None, _picture("X", "Above 0 to 1: how far --input-image is taken back to noise.")
    ] = None,
    mask_image: Annotated[
        str | None, _picture("FILE", "Draw anew what is white in this picture, of the --input-image.")
    ] = None,
    mask_feather: Annotated[int | None, _picture("PIXELS", "Soften the mask's edge over so many.")] = None,
    keep_unmasked: Annotated[
        bool | None, _flag("Picture", "Leave the other pixels of the input image as they are, bit for bit.")
    ] = None,
    extend: Annotated[
        str | None, _picture("LEFT,TOP,RIGHT,BOTTOM", "Draw so many pixels beyond the --input-image.")
    ] = None,
    loras: Annotated[
        list[str] | None,
        _named(
            "--lora",
            "Picture",
            "FILE[@SCALE]",
            "Draw with a LoRA; repeat it for others. In the prompt <lora:NAME:SCALE> says the same.",
        ),
    ] = None,
    regions: Annotated[
        list[str] | None,
        _named(
            "--region", "Picture", "MASK=PROMPT[@SCALE]", "A prompt for what is white in MASK; repeat it for others."
        ),
    ] = None,
    controls: Annotated[
        list[str] | None,
        _named(
            "--control",
            "Picture",
            "KIND=MODEL[:IMG][@SCALE[@START-END]]",
            "Lead the ControlNet in MODEL by IMG, or the --input-image, as the annotator KIND draws it (none: as it "
            "is), from the fraction START of the steps to END; repeat it for others.",
        ),
    ] = None,
    image_prompts: Annotated[
        list[str] | None,
        _named(
            "--image-prompt",
            "Picture",
            "MODEL:IMAGE[@SCALE]",
            "Draw what IMAGE shows, through the IP-Adapter in MODEL; repeat it for others. MODEL,ENCODER where its "
            "image_encoder/ is not beside it.",
        ),
    ] = None,
    high_res: Annotated[
        list[str] | None,
        _named(
            "--high-res",
            "Large pictures",
            "WxH[@STRENGTH[@STEPS[@UPSCALER]]][,tiled...]",
            "Draw over the finished picture at this size; repeat it for larger ones. Strength 0.5, the same steps, and "
            "lanczos (or latent, or the file of an ESRGAN) if not given. For one pass alone may follow: tiled or "
            "untiled, tile-size=PIXELS, tile-stride=PIXELS, prompt=TEXT, control=KIND=MODEL[:IMG][@SCALE].",
        ),
    ] = None,
    high_res_prompt: Annotated[
        str | None,
        _large("TEXT", 'What the --high-res passes draw. In tiles each draws all of it: "" keeps what is there.'),
    ] = None,
    high_res_control: Annotated[
        list[str] | None,
        _large(
            "KIND=MODEL[:IMG][@SCALE[@START-END]]",
            "Lead the --high-res passes by this instead of --control; by what is there.",
        ),
    ] = None,
    tiled: Annotated[
        bool | None, _flag("Large pictures", "See the picture in overlapping tiles: for sizes beyond the model's own.")
    ] = None,
    tile_size: Annotated[int | None, _large("PIXELS", "A side of a tile; the model's usual size if not given.")] = None,
    tile_stride: Annotated[
        int | None, _large("PIXELS", "From one tile to the next; three quarters of one if not given.")
    ] = None,
    original_width: Annotated[int | None, _told("PIXELS", "Width before the picture was scaled.")] = None,
    original_height: Annotated[int | None, _told("PIXELS", "Height, likewise.")] = None,
    crop_left: Annotated[int | None, _told("PIXELS", "Where it was cut, from the left.")] = None,
    crop_top: Annotated[int | None, _told("PIXELS", "From the top.")] = None,
    target_width: Annotated[int | None, _told("PIXELS", "The width aimed at.")] = None,
    target_height: Annotated[int | None, _told("PIXELS", "The height aimed at.")] = None,
    model: Annotated[
        list[str] | None, _model("SOURCE", "File, folder or hub id; repeat it for parts. If not given: the built-in.")
    ] = None,
    device: Annotated[str | None, _model("NAME", "cpu, cuda, cuda:1, mps, ...")] = None,
    dtype: Annotated[str | None, _model("NAME", "float32, bfloat16 or float16.")] = None,
    memory: Annotated[str, _model("MODE", "How much stays loaded: auto, resident, components or stream.")] = "auto",
    backend: Annotated[str, _model("NAME", "torch, or openvino: the UNet families, faster on a CPU.")] = "torch",
    storage: Annotated[
        list[str] | None,
        _model(
            "TYPE",
            "Keep weights in fewer bits: int8, int4, fp8_e4m3 or fp8_e5m2, of the network and the largest encoder; or "
            "of one part, as t5=int4 (repeat it for others). none widens what a file has in fewer bits.",
        ),
    ] = None,
    out: Annotated[
        str | None,
        _output(
            "PATH",
            "A file is overwritten (PNG keeps the settings, .jpg and .webp do not); with --count it becomes -1, -2, "
            "... In a folder (end with / to make it), or without --out here, files are named after prompt and seed, "
            "and none is overwritten.",
        ),
    ] = None,
    preview: Annotated[Path | None, _output("FILE", "Rewrite this small picture at each step.")] = None,
    progress: Annotated[
        bool | None,
        typer.Option(
            "--progress/--no-progress",
            help="Steps on stderr; by default where that is a terminal.",
            rich_help_panel="Output",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Draw pictures and print their paths. What is not given follows the model.

    calotype generate "a red fox in the snow" --seed 7

    calotype generate --like a-red-fox-in-the-snow-7.png --seed 8

    calotype generate "a lighthouse" --model flux1-dev.safetensors --model ae.safetensors
    --model text_encoder/ --model text_encoder_2/
    """
    # Options carry the names of Request's fields, so that one added there cannot be forgotten here.
    values = {field.name: context.params[field.name] for field in fields(Request)}
    given = {name: value for name, value in values.items() if value not in (None, [], ())}
    for name, read in READ.items():
        if name in given:
            given[name] = read(given[name])
    if prompt is not None:
        given["prompt"], named = _loras_in(prompt, given.get("loras", []))
        given |= {"loras": named} if named else {}
    sources, drawn_by = model or [], None
    if like is not None:
        old, record = read_metadata(like)
        request = replace(old, **given)
        sources = sources or _sources(record)
        drawn_by = str(record.get("model"))
        for path in _changed(request, record, given):
            _note(f"{path} is not the picture that {like} was made from: it was changed since")
    elif prompt is None:
        raise typer.BadParameter("give a PROMPT, or --like PNG to repeat a picture")
    else:
        request = Request.from_dict(given)
    if high_res_control:
        led = tuple(Control(**values) for values in _controls(high_res_control))
        request = _passing(request, "high_res_control", ", ".join(high_res_control), controls=led)
    if high_res_prompt is not None:
        request = _passing(request, "high_res_prompt", high_res_prompt, prompt=high_res_prompt)
    check_files(request)
    target = Target.of(out, request.count)
    if preview is not None:
        check_writable(preview)

    from calotype.cli.progress import progress as shown

    show = shown(progress)
    loaded = load_model(sources, show, device=device, dtype=dtype, memory=memory, backend=backend, storage=storage)
    if drawn_by is not None and drawn_by != loaded.name:
        request = _adapted(request, loaded, given, f"{like} was drawn by {drawn_by}; this is {loaded.name}")
    cfg_scale = loaded.family.defaults.cfg_scale if request.cfg_scale is None else request.cfg_scale
    if request.negative_prompt and cfg_scale == 1:
        _note("negative_prompt has no effect where cfg_scale is 1")
    draw(loaded, request, target, preview, show)


def load_model(
    sources: list[str], show: Silent, *, backend: str, storage: list[str] | None, **options: str | None
) -> Model[Any]:
    """The model in these sources (none: the built-in), and a note for all that it does without."""
    # The hub shows a progress of its own.
    with show.waiting(f"loading {', '.join(sources) or 'the built-in model'}") if _local(sources) else nullcontext():
        from calotype.loading import load

        loaded = load(*sources, backend=backend, storage=_storage(storage), **options)  # type: ignore[arg-type]
    for part, error in loaded.storage_errors.items():
        what = "its answers" if (backend, part) == ("openvino", "unet") else "its matrices"
        _note(f"{part} is kept in fewer bits: {what} are off by {error:.1%}")
    for part, effect in loaded.left_out.items():
        _note(f"without {part} {effect}")
    return loaded


def _passing(request: Request, option: str, given: str, **values: Any) -> Request:
    """A request whose passes at higher resolutions all have these values."""
    if not request.high_res:
        raise RequestError(option, given, "None without --high-res")
    return replace(request, high_res=tuple(replace(each, **values) for each in request.high_res))


def check_files(request: Request) -> None:
    """Not to find out after loading a model that they cannot be read."""
    if request.all_controls():
        from calotype.control.annotators import check

        check(request)
    opened(request)
    upscalers = {each.upscaler for each in request.high_res}.difference(UPSCALERS)
    if upscalers:
        from calotype.control.upscalers import check_upscaler

        for file in sorted(upscalers):
            check_upscaler(file)
    if request.loras:
        from calotype.lora.files import find

        for lora in request.loras:
            find(lora.file)


def draw(model: Model[Any], request: Request, target: Target, preview: Path | None, show: Silent) -> None:
    """Run a request, write each picture as it is finished, and print its path."""
    from calotype.generate import Lowered, Picture

    with closing(model.stream(request)) as events:
        for number in range(request.count):
            with show.picture(number, request.count) as step:
                for event in events:
                    if isinstance(event, Picture):
                        break
                    if isinstance(event, Lowered):
                        _note(f"out of memory with memory={event.before}; going on with memory={event.rung}")
                        continue
                    step(event)
                    if preview is not None:
                        save(event.preview(), preview)
                else:
                    raise AssertionError("the stream ended before its last picture")
                path = target.path(number, request.prompt, event.seed)
                save(event.image, path)
            typer.echo(path)
    adapters = model.family.adapters
    for file, layers in ({} if adapters is None else adapters.left_out).items():
        _note(f"{file}: {layers} layers are of text encoders that this model does without")


def _sources(record: dict[str, Any]) -> list[str]:
    """The sources that a picture's record names, as `load` takes them: none for the built-in model."""
    source = str(record.get("source") or BUILT_IN)
    if source == BUILT_IN:
        return []
    return [source] if Path(source).exists() else source.split(", ")


def _adapted(request: Request, model: Model[Any], given: dict[str, Any], why: str) -> Request:
    """An old picture's request for another model: what that one cannot take is left out, and said."""
    defaults = model.family.defaults
    useless = set(defaults.useless)
    for name, allowed in (("sampler", defaults.samplers), ("schedule", defaults.schedules)):
        if getattr(request, name) not in allowed:
            useless.add(name)
    dropped = [name for name in sorted(useless - set(given)) if getattr(request, name) is not None]
    _note(f"{why}, which cannot take the old {', '.join(dropped)}" if dropped else why)
    return replace(request, **dict.fromkeys(dropped))


def _changed(request: Request, record: dict[str, Any], given: Container[str]) -> list[str]:
    """The files that an old picture was made from, are not given anew, and hold another picture now."""
    known = record.get("pictures", {})
    named = request.pictures()
    return [
        str(named[name])
        for name, picture in opened(request).items()
        if name in known and re.split(r"\W", name)[0] not in given and fingerprint(picture) != known[name]
    ]


def _extension(text: str) -> list[int]:
    """LEFT,TOP,RIGHT,BOTTOM"""
    found = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*", text)
    if found is None:
        raise RequestError("extend", text, "LEFT,TOP,RIGHT,BOTTOM in pixels, as 0,0,256,0")
    return [int(side) for side in found.groups()]


def _regions(texts: list[str]) -> list[dict[str, Any]]:
    """MASK=PROMPT[@SCALE], each."""
    made: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        mask, equals, rest = text.partition("=")
        if not (mask and equals):
            raise RequestError(f"regions[{number}]", text, 'MASK=PROMPT[@SCALE], as left.png="a red fox@2"')
        found = re.fullmatch(rf"(.*)@({NUMBER})", rest, re.DOTALL)
        values = {"prompt": rest} if found is None else {"prompt": found[1], "scale": float(found[2])}
        made.append({"mask": mask, **values})
    return made


def _controls(texts: list[str]) -> list[dict[str, Any]]:
    """KIND=MODEL[:IMG][@SCALE[@START-END]], each. The last colon that is not a drive's parts the two."""
    made: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        weighed = rf"(?:@({NUMBER})(?:@({NUMBER})-({NUMBER}))?)?"
        found = re.fullmatch(rf"([^=]+)=({_PATH})(?::({_PATH}))?{weighed}", text)
        if found is None:
            allowed = "KIND=MODEL[:IMG][@SCALE[@START-END]], as canny=control.safetensors:photo.png@0.8@0-0.5"
            raise RequestError(f"controls[{number}]", text, allowed)
        kinds = {"kind": str, "model": str, "image": str, "scale": float, "start": float, "end": float}
        pairs = zip(kinds.items(), found.groups(), strict=True)
        made.append({name: kind(value) for (name, kind), value in pairs if value is not None})
    return made


def _image_prompts(texts: list[str]) -> list[dict[str, Any]]:
    """MODEL[,ENCODER]:IMAGE[@SCALE], each; parted as in `_controls`."""
    made: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        found = re.fullmatch(rf"(.+):({_PATH})(?:@({NUMBER}))?", text)
        if found is None:
            allowed = "MODEL[,ENCODER]:IMAGE[@SCALE], as ip-adapter_sd15.safetensors:photo.png@0.6"
            raise RequestError(f"image_prompts[{number}]", text, allowed)
        model, comma, encoder = (found[1], "", "") if Path(found[1]).exists() else found[1].rpartition(",")
        values: dict[str, Any] = {"model": model, "encoder": encoder} if comma else {"model": found[1]}
        values["image"] = found[2]
        made.append(values if found[3] is None else {**values, "scale": float(found[3])})
    return made


NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"  # what it may be is not the command line's to say

_PATH = r"(?:[A-Za-z]:(?=[\\/]))?[^:]+?"  # a drive before it, or none


_MORE = r",(?=(?:tiled|untiled)(?:,|$)|(?:tile-size|tile-stride|prompt|control)=)"  # what only one pass has


def _high_res(texts: list[str]) -> list[dict[str, Any]]:
    """WxH[@STRENGTH[@STEPS[@UPSCALER]]][,tiled...], each."""
    made: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        place, *more = re.split(_MORE, text)
        found = re.fullmatch(rf"(\d+)[xX](\d+)(?:@({NUMBER})(?:@(\d+)(?:@(.+))?)?)?", place)
        if found is None:
            allowed = "WIDTHxHEIGHT[@STRENGTH[@STEPS[@UPSCALER]]][,tiled...], as 2048x2048@0.5@20,tiled,tile-size=1024"
            raise RequestError(f"high_res[{number}]", text, allowed)
        kinds = {"width": int, "height": int, "strength": float, "steps": int, "upscaler": str}
        pairs = zip(kinds.items(), found.groups(), strict=True)
        values: dict[str, Any] = {name: kind(value) for (name, kind), value in pairs if value is not None}
        try:
            made.append(values | _of_one_pass(more))
        except RequestError as error:
            raise error.under(f"high_res[{number}].") from None
    return made


def _of_one_pass(texts: list[str]) -> dict[str, Any]:
    """tiled, untiled, NAME=VALUE, each."""
    values: dict[str, Any] = {}
    controls: list[str] = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            values["tiled"] = text == "tiled"
        elif name == "control":
            controls.append(value)
        elif name == "prompt":
            values["prompt"] = value
        else:
            values[name.replace("-", "_")] = int(value) if value.isdecimal() else value
    return values | ({"controls": _controls(controls)} if controls else {})


TAG = re.compile(r"<\s*lora\s*:([^<>]*)>", re.IGNORECASE)


def _loras(texts: list[str]) -> list[dict[str, Any]]:
    """FILE[@SCALE], each."""
    made: list[dict[str, Any]] = []
    for text in texts:
        found = None if Path(text).exists() else re.fullmatch(rf"(.+)@({NUMBER})", text)
        made.append({"file": text} if found is None else {"file": found[1], "scale": float(found[2])})
    return made


def _loras_in(prompt: str, given: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """A prompt without the words <lora:NAME:SCALE>, and all LoRAs: those given by options, and those that it names.

    NAME is that of a file among the options, which then takes the prompt's scale, or what --lora would take. Raises
    RequestError for a word that cannot be read so, or that contradicts another.
    """
    made = [dict(each) for each in given]
    said: dict[str, float | None] = {}
    for tag in TAG.finditer(prompt):
        found = re.fullmatch(rf"\s*({_PATH})\s*(?::\s*({NUMBER})\s*)?", tag[1])
        if found is None:
            raise RequestError("prompt", tag[0], "<lora:NAME> or <lora:NAME:SCALE> with one number, as <lora:ink:0.8>")
        name, scale = found[1], None if found[2] is None else float(found[2])
        if said.setdefault(name, scale) != scale:
            raise RequestError("prompt", tag[0], f"each LoRA once: {name} has another scale before")
        known = [each for each in made if name in (Path(each["file"]).stem, Path(each["file"]).name, each["file"])]
        if len(known) > 1:
            listed = ", ".join(each["file"] for each in known)
            raise RequestError("prompt", tag[0], f"a name that is one file's; --lora has {listed}")
        if not known:
            known = [{"file": name}]
            made += known
        if scale is not None:
            known[0]["scale"] = scale
    return re.sub(r"\s{2,}", " ", TAG.sub("", prompt)).strip() if TAG.search(prompt) else prompt, made


READ: dict[str, Callable[[Any], Any]] = {
    "extend": _extension,
    "loras": _loras,
    "regions": _regions,
    "controls": _controls,
    "image_prompts": _image_prompts,
    "high_res": _high_res,
}


def _storage(given: list[str] | None) -> dict[str, str]:
    """PART=TYPE, or TYPE for what is worth it, as `load` takes them."""
    if not given:
        return {}
    from calotype.loading.storage import ALL

    return {part or ALL: kind for part, _, kind in (text.rpartition("=") for text in given)}


def _note(text: str) -> None:
    typer.echo(f"calotype: note: {text}", err=True)


def _local(sources: list[str]) -> bool:
    """Whether nothing will be asked of the hub."""
    return all(Path(source).expanduser().exists() for source in sources)


class Target:
    """Where pictures go. Everything that can be known before the work is checked before it, by `of`."""

    def __init__(self, folder: Path, files: tuple[Path, ...] = ()) -> None:
        self.folder = folder
        self.files = files

    @classmethod
    def of(cls, out: str | None, count: int) -> Target:
        """The place that `--out` means. A path with a slash at its end is a folder, made if need be.

        Raises OutputError if pictures could not be written there.
        """
        path = Path(out or ".")
        if out and out.endswith(("/", os.sep)):
            try:
                if not path.is_dir():
                    # A trial: what is still wrong with the request must leave no empty folder.
                    path.mkdir()
                    path.rmdir()
                    return cls(path)
            except OSError as error:
                raise OutputError(f"{path}: the folder could not be made ({error})") from error
        if path.is_dir():
            check_writable(path / "picture.png")
            return cls(path)
        files = (path,)
        if count > 1:
            files = tuple(path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, count + 1))
        for file in files:
            check_writable(file)
        return cls(path.parent, files)

    def path(self, number: int, prompt: str, seed: int) -> Path:
        """Where picture `number` (from 0) goes: its own file, or a new name in the folder, which is made if need be."""
        if self.files:
            return self.files[number]
        self.folder.mkdir(exist_ok=True)
        stem = f"{slug(prompt)}-{seed}"
        path, copy = self.folder / f"{stem}.png", 1
        while path.exists():
            copy += 1
            path = self.folder / f"{stem}-{copy}.png"
        return path


def slug(prompt: str) -> str:
    """A prompt as part of a file name: letters and digits, joined by hyphens, cut at a word."""
    words = re.findall(r"\w+", unicodedata.normalize("NFC", prompt[:1000]).lower().replace("_", " "))
    name = ""
    for word in words:
        longer = f"{name}-{word}" if name else word
        if len(longer.encode()) > SLUG_BYTES:
            break
        name = longer
    return name or (words[0].encode()[:SLUG_BYTES].decode(errors="ignore") if words else "picture")
