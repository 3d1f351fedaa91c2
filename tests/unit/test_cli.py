"""The command line, in this process on a tiny random model, and in processes of its own where signals matter."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import flux_model

import calotype
from calotype.cli import doctor, progress
from calotype.cli.generate import READ, SLUG_BYTES, Target, slug
from calotype.cli.generate import _loras as loras_of
from calotype.cli.generate import _loras_in as loras_in
from calotype.cli.main import app, main
from calotype.cli.output import columns, size
from calotype.errors import DamagedFile, OutputError, RequestError
from calotype.families import flux, hunyuan_dit, kolors, sd1, sd3, sdxl
from calotype.families.flux import FluxModel
from calotype.generate import Events, Model
from calotype.image import read_metadata, save, to_pil
from calotype.loading import Description, PartDescription
from calotype.request import SIZES, Control, Request
from calotype.version import VERSION

HELP = Path(__file__).parents[1] / "data" / "help"
# What `load` is told where the command line says nothing.
PLAIN: dict[str, Any] = {"device": None, "dtype": None, "memory": "auto", "backend": "torch", "storage": {}}


class Loader:
    """Stands in for `load`: notes what it was asked for, and gives the same tiny model each time."""

    def __init__(self, family: FluxModel) -> None:
        self.model = Model(family)
        self.calls: list[tuple[tuple[str, ...], dict[str, Any]]] = []

    def __call__(self, *sources: str, **options: Any) -> Model[Any]:
        self.calls.append((sources, options))
        return self.model


@pytest.fixture(scope="module")
def family() -> FluxModel:
    return flux_model()


@pytest.fixture
def loader(family: FluxModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Loader:
    """A tiny model behind `calotype`, and an empty folder to work in."""
    fake = Loader(family)
    monkeypatch.setattr("calotype.loading.load", fake)
    monkeypatch.chdir(tmp_path)
    return fake


Said = pytest.CaptureFixture[str]


def files() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


# ---- generate: what is written where


def test_a_prompt_becomes_a_file_and_its_path_is_all_that_is_printed(loader: Loader, capsys: Said) -> None:
    assert main(["generate", "A red fox, in the SNOW!", "--seed", "7"]) == 0
    assert capsys.readouterr() == ("a-red-fox-in-the-snow-7.png\n", "")
    assert files() == ["a-red-fox-in-the-snow-7.png"]
    assert loader.calls == [((), PLAIN)]
    with Image.open("a-red-fox-in-the-snow-7.png") as picture:
        assert picture.size == (32, 32)


def test_nothing_is_overwritten_where_the_name_is_ours(loader: Loader, capsys: Said) -> None:
    for _ in range(3):
        assert main(["generate", "a fox", "--seed", "7"]) == 0
    assert capsys.readouterr().out.split() == ["a-fox-7.png", "a-fox-7-2.png", "a-fox-7-3.png"]
    assert files() == ["a-fox-7-2.png", "a-fox-7-3.png", "a-fox-7.png"]


def test_several_pictures_are_named_after_their_seeds(loader: Loader, capsys: Said) -> None:
    assert main(["generate", "a fox", "--seed", "7", "--count", "3"]) == 0
    assert capsys.readouterr().out.split() == ["a-fox-7.png", "a-fox-8.png", "a-fox-9.png"]
    assert read_metadata("a-fox-9.png")[0].seed == 9


def test_a_seed_that_was_not_given_is_in_the_name(loader: Loader, capsys: Said) -> None:
    assert main(["generate", "a fox"]) == 0
    name = capsys.readouterr().out.strip()
    assert name == f"a-fox-{read_metadata(name)[0].seed}.png"


def test_a_file_that_is_named_is_overwritten(loader: Loader, capsys: Said) -> None:
    Path("fox.png").write_bytes(b"old")
    assert main(["generate", "a fox", "--out", "fox.png"]) == 0
    assert capsys.readouterr().out == "fox.png\n"
    assert read_metadata("fox.png")[0].prompt == "a fox"


def test_several_pictures_number_the_file_that_is_named(loader: Loader, capsys: Said) -> None:
    Path("fox-2.png").write_bytes(b"old")
    assert main(["generate", "a fox", "--out", "fox.png", "--count", "2"]) == 0
    assert capsys.readouterr().out.split() == ["fox-1.png", "fox-2.png"]
    assert files() == ["fox-1.png", "fox-2.png"]
    assert read_metadata("fox-2.png")[0].prompt == "a fox"


def test_a_folder_is_filled_and_made_where_its_name_ends_with_a_slash(loader: Loader, capsys: Said) -> None:
    Path("there").mkdir()
    assert main(["generate", "a fox", "--seed", "1", "--out", "there"]) == 0
    assert main(["generate", "a fox", "--seed", "1", "--out", "new/"]) == 0
    assert main(["generate", "a fox", "--seed", "1", "--out", "new/"]) == 0
    names = [str(Path(line)) for line in capsys.readouterr().out.split()]
    assert names == [str(Path(name)) for name in ("there/a-fox-1.png", "new/a-fox-1.png", "new/a-fox-1-2.png")]
    assert all(Path(name).is_file() for name in names)


@pytest.mark.parametrize("out", ["none/fox.png", "none/deep/", "file/fox.png", "file/", "fox", "fox.gif", "x" * 300])
@pytest.mark.parametrize("count", ["1", "2"])
def test_an_impossible_place_fails_before_the_model_is_loaded(
    loader: Loader, capsys: Said, out: str, count: str
) -> None:
    Path("file").write_text("")
    assert main(["generate", "a fox", "--out", out, "--count", count]) == 1
    assert one_line(capsys)
    assert loader.calls == []
    assert files() == ["file"]


def test_a_folder_that_takes_no_files_fails_before_the_model_is_loaded(
    loader: Loader, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    for words in ([], ["--out", "fox.png"], ["--preview", "preview.png"]):
        assert main(["generate", "a fox", *words]) == 1
        assert "not writable" in one_line(capsys)
    assert loader.calls == []


def test_the_preview_file_is_a_whole_picture_at_every_step(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    from calotype.image import save

    saved: list[str] = []

    def watched(picture: Image.Image, path: Path) -> None:
        save(picture, path)
        saved.append(str(path))

    monkeypatch.setattr("calotype.cli.generate.save", watched)
    assert main(["generate", "a fox", "--steps", "3", "--preview", "now.png", "--out", "fox.png"]) == 0
    assert saved == ["now.png"] * 3 + ["fox.png"]
    with Image.open("now.png") as picture:
        picture.load()


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A Red Fox", "a-red-fox"),
        ("  what?! (a:1.2) fox/../..\\etc ", "what-a-1-2-fox-etc"),
        ("", "picture"),
        ("🦊!", "picture"),
        ("snake_case", "snake-case"),
        ("狐 in Überlingen", "狐-in-überlingen"),
        ("word " * 60, "-".join(["word"] * 20)),
        ("x" * 500, "x" * SLUG_BYTES),
        ("狐" * 500, "狐" * (SLUG_BYTES // 3)),
    ],
)
def test_names_are_made_of_the_words_of_a_prompt(prompt: str, name: str) -> None:
    assert slug(prompt) == name
    assert len(slug(prompt).encode()) <= SLUG_BYTES


# ---- generate: what is asked for


def test_every_field_of_a_request_is_an_option_and_reaches_the_engine(
    loader: Loader, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, width in (("start", 32), ("mask", 32), ("left", 48)):
        Image.new("RGB", (width, 16)).save(f"{name}.png")
    asked: dict[str, Any] = {
        "negative_prompt": "snow",
        "width": 48,
        "height": 16,
        "steps": 2,
        "cfg_scale": 2.5,
        "cfg_rescale": 0.5,
        "embedded_guidance": 1.5,
        "seed": 3,
        "count": 1,
        "sampler": "heun",
        "schedule": "beta",
        "shift": 2.0,
        "text_tokens": 9,
        "clip_skip": 3,
        "input_image": "start.png",
        "denoising_strength": 0.25,
        "mask_image": "mask.png",
        "mask_feather": 2,
        "tile_size": 32,
        "tile_stride": 16,
        "original_width": 1001,
        "original_height": 1002,
        "crop_left": 4,
        "crop_top": 5,
        "target_width": 1006,
        "target_height": 1007,
    }
    # Spelt otherwise on the command line than among plain values.
    spelt: dict[str, tuple[list[str], Any]] = {
        "extend": (["--extend", "0,0,16,0"], [0, 0, 16, 0]),
        "tiled": (["--tiled"], True),
        "loras": (
            ["--lora", "ink.safetensors@0.5", "--lora", "line.safetensors"],
            [{"file": "ink.safetensors", "scale": 0.5}, {"file": "line.safetensors", "scale": 1.0}],
        ),
        "regions": (
            ["--region", "left.png=a bear@2.5", "--region", "left.png=a man @ home"],
            [
                {"prompt": "a bear", "mask": "left.png", "scale": 2.5},
                {"prompt": "a man @ home", "mask": "left.png", "scale": 1.0},
            ],
        ),
        "controls": (
            ["--control", "canny=net.safetensors:start.png@0.5", "--control", "none=org/net:left.png"],
            [
                {
                    "kind": "canny",
                    "model": "net.safetensors",
                    "image": "start.png",
                    "scale": 0.5,
                    "start": 0.0,
                    "end": 1.0,
                },
                {"kind": "none", "model": "org/net", "image": "left.png", "scale": 1.0, "start": 0.0, "end": 1.0},
            ],
        ),
        "image_prompts": (
            ["--image-prompt", "ip.bin:start.png@0.5", "--image-prompt", "org/ip/a.bin,clip:left.png"],
            [
                {"model": "ip.bin", "image": "start.png", "scale": 0.5},
                {"model": "org/ip/a.bin", "image": "left.png", "scale": 1.0, "encoder": "clip"},
            ],
        ),
        "high_res": (
            ["--high-res", "64x32", "--high-res", "96x48@0.25@1@latent"],
            [
                {"width": 64, "height": 32, "strength": 0.5, "upscaler": "lanczos"},
                {"width": 96, "height": 48, "strength": 0.25, "steps": 1, "upscaler": "latent"},
            ],
        ),
    }
    assert {"prompt", "keep_unmasked", *asked, *spelt} == {field.name for field in fields(Request)}
    for name in ("ink", "line"):
        Path(f"{name}.safetensors").touch()
    requests: list[Request] = []
    stream = loader.model.stream

    def watched(request: Request) -> Events:
        requests.append(request)
        # This model has no use for these.
        none = dict.fromkeys(SIZES)
        return stream(replace(request, clip_skip=None, loras=(), controls=(), image_prompts=(), **none))

    monkeypatch.setattr(loader.model, "stream", watched)
    words = [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += [word for given, _ in spelt.values() for word in given]
    assert main(["generate", "a fox", *words]) == 0
    asked |= {name: value for name, (_, value) in spelt.items()}
    assert [request.to_dict() for request in requests] == [{"prompt": "a fox", **asked}]
    left_out = ("clip_skip", "loras", "controls", "image_prompts", *SIZES)
    kept = {name: value for name, value in asked.items() if name not in left_out}
    assert read_metadata(capsys.readouterr().out.strip())[0].to_dict() == {"prompt": "a fox", **kept}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("tile=tile.pth", {"kind": "tile", "model": "tile.pth"}),
        (r"tile=C:\nets\tile.pth@0.5", {"kind": "tile", "model": r"C:\nets\tile.pth", "scale": 0.5}),
        (r"a=C:/d.pth:D:\left.png", {"kind": "a", "model": "C:/d.pth", "image": r"D:\left.png"}),
        ("none:depth=org/net:a.png@1", {"kind": "none:depth", "model": "org/net", "image": "a.png", "scale": 1.0}),
        ("tile=tile.pth@.8", {"kind": "tile", "model": "tile.pth", "scale": 0.8}),
        ("a=b.pth@1.@0-.5", {"kind": "a", "model": "b.pth", "scale": 1.0, "start": 0.0, "end": 0.5}),
        (
            "a=b.pth:c.png@0.5@.25-1e-0",
            {"kind": "a", "model": "b.pth", "image": "c.png", "scale": 0.5, "start": 0.25, "end": 1.0},
        ),
    ],
)
def test_a_control_is_read_from_its_option(text: str, wanted: dict[str, Any]) -> None:
    assert READ["controls"]([text]) == [wanted]


def test_passes_have_controls_of_their_own(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[Request] = []

    def watched(request: Request) -> Events:
        requests.append(request)
        return stream(replace(request, high_res=()))

    stream = loader.model.stream
    monkeypatch.setattr(loader.model, "stream", watched)
    words = ["--high-res=64x32", "--high-res=96x48", "--high-res-control", "tile=net.pth@0.5", "--high-res-prompt="]
    assert main(["generate", "a fox", *words]) == 0
    led = (Control(kind="tile", model="net.pth", scale=0.5),)
    assert [(each.controls, each.prompt) for each in requests[0].high_res] == [(led, ""), (led, "")]


def test_the_model_is_loaded_as_asked(loader: Loader, capsys: Said) -> None:
    words = ["--model", "a.safetensors", "--model=org/name", "--device=cpu", "--dtype=bfloat16", "--memory=resident"]
    words += ["--backend=openvino", "--storage", "t5=int8", "--storage=transformer=int4", "--storage=fp8_e4m3"]
    assert main(["generate", "a fox", *words]) == 0
    assert loader.calls == [
        (
            ("a.safetensors", "org/name"),
            {
                "device": "cpu",
                "dtype": "bfloat16",
                "memory": "resident",
                "backend": "openvino",
                "storage": {"t5": "int8", "transformer": "int4", "*": "fp8_e4m3"},
            },
        )
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "steps: got 0; allowed: a whole number from 1 to 1,000"),
        (["--cfg-scale", "nan"], "cfg_scale: got nan; allowed: a finite number"),
        (["--cfg-scale", "inf"], "cfg_scale"),
        (["--count", "0"], "count"),
        (["--seed", "-1"], "seed"),
        (["--seed", str(2**70)], "seed"),
        (["--negative-prompt", "x" * 30_000], "negative_prompt"),
        (["--steps", "many"], "--steps"),
        (["--stepz", "3"], "--steps"),
        (["--steps"], "--steps"),
        (["another"], "another"),
        (["--like", "none.png"], "none.png.*No such file"),
        (["--control", "canny=net.pth"], r"controls\[0\].image.*no input_image"),
        (["--control", "canny=net.pth:none.png"], r"controls\[0\].image: got 'none.png'.*No such file"),
        (["--high-res-control", "canny=net.pth"], "high_res_control.*without --high-res"),
        (["--control", "cany=net.pth:none.png"], r"controls\[0\].kind: got 'cany'; allowed: one of canny, lineart"),
        (["--control", "canny=net.pth:a.png@1@0.5-2"], r"controls\[0\].end: got 2.0"),
    ],
)
def test_a_bad_command_line_is_refused_before_the_model_is_loaded(
    loader: Loader, capsys: Said, words: list[str], message: str
) -> None:
    assert main(["generate", "a fox", *words]) == 2
    assert re.search(message, one_line(capsys))
    assert loader.calls == []
    assert files() == []


def test_an_upscaler_is_looked_for_before_the_model_is_loaded(loader: Loader, capsys: Said) -> None:
    assert main(["generate", "a fox", "--high-res", "64x64@0.5@2@none.pth"]) == 1
    assert "none.pth: no such file" in one_line(capsys)
    assert loader.calls == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--width", "33"], "width: got 33; allowed: multiples of 16; the nearest valid size is 32x32"),
        (["--sampler", "eular"], "sampler: got 'eular'; allowed: one of euler, "),
        (["--schedule", "karras"], "schedule: got 'karras'; allowed: one of "),
    ],
)
def test_what_only_the_model_can_refuse_is_refused(
    loader: Loader, capsys: Said, words: list[str], message: str
) -> None:
    assert main(["generate", "a fox", *words]) == 2
    assert message in one_line(capsys)
    assert files() == []


@pytest.mark.parametrize("prompt", ["x" * 100_000, "caf\udce9"])
def test_a_prompt_that_cannot_be_is_refused_in_few_words(loader: Loader, capsys: Said, prompt: str) -> None:
    assert main(["generate", prompt]) == 2
    line = one_line(capsys)
    assert line.startswith("calotype: prompt: got ")
    assert len(line) < 250
    assert loader.calls == []


def test_without_a_prompt_one_is_asked_for(loader: Loader, capsys: Said) -> None:
    assert main(["generate"]) == 2
    assert one_line(capsys) == (
        "calotype: give a PROMPT, or --like PNG to repeat a picture (see `calotype generate --help`)"
    )


def test_a_negative_prompt_without_guidance_is_not_passed_over(loader: Loader, capsys: Said) -> None:
    assert main(["generate", "a fox", "--negative-prompt", "snow"]) == 0
    assert one_line(capsys) == "calotype: note: negative_prompt has no effect where cfg_scale is 1"
    assert main(["generate", "a fox", "--negative-prompt", "snow", "--cfg-scale", "2"]) == 0
    assert capsys.readouterr().err == ""


# ---- generate --like


@pytest.fixture
def old(loader: Loader, capsys: Said) -> Path:
    words = ["--steps=3", "--cfg-scale=2", "--sampler=euler_ancestral", "--seed=7", "--count=2", "--width=48"]
    assert main(["generate", "a red fox", *words]) == 0
    capsys.readouterr()
    loader.calls.clear()
    return Path("a-red-fox-8.png")


def test_like_repeats_a_picture_bit_for_bit(loader: Loader, capsys: Said, old: Path) -> None:
    assert main(["generate", "--like", str(old)]) == 0
    printed = capsys.readouterr()
    assert printed == ("a-red-fox-8-2.png\n", "")
    assert Path(printed.out.strip()).read_bytes() == old.read_bytes()
    assert loader.calls == [(("tiny",), PLAIN)]


def test_any_option_changes_what_it_names(loader: Loader, capsys: Said, old: Path) -> None:
    words = ["generate", "a blue cat", "--like", str(old), "--steps", "2", "--cfg-scale", "1"]
    assert main(words) == 0
    was = read_metadata(old)[0]
    now = read_metadata(capsys.readouterr().out.strip())[0]
    assert now == replace(was, prompt="a blue cat", steps=2, cfg_scale=1.0)


@pytest.mark.parametrize(
    ("source", "given", "loaded"),
    [
        ("built-in", [], ()),
        (None, [], ()),
        ("built-in", ["mine/"], ("mine/",)),
        ("org/name", [], ("org/name",)),
        ("org/name", ["mine/"], ("mine/",)),
        ("a.safetensors, b/", [], ("a.safetensors", "b/")),
        ("with, comma", [], ("with, comma",)),
    ],
)
def test_like_loads_the_model_that_drew_the_picture(
    loader: Loader, capsys: Said, old: Path, source: str | None, given: list[str], loaded: tuple[str, ...]
) -> None:
    Path("with, comma").mkdir()
    edit_metadata(old, source=source)
    assert main(["generate", "--like", str(old), *(f"--model={name}" for name in given)]) == 0
    assert [sources for sources, _ in loader.calls] == [loaded]


def test_another_model_is_said_and_takes_what_it_can(loader: Loader, capsys: Said, old: Path) -> None:
    loader.model = Model(flux_model(guidance=False))
    edit_metadata(old, model="flux/dev")
    assert main(["generate", "--like", str(old), "--model", "schnell/"]) == 0
    printed = capsys.readouterr()
    assert printed.err == (
        f"calotype: note: {old} was drawn by flux/dev; this is flux/tiny, which cannot take the old embedded_guidance\n"
    )
    assert read_metadata(printed.out.strip())[0].embedded_guidance is None


def test_a_guidance_that_is_asked_for_is_never_left_out(loader: Loader, capsys: Said, old: Path) -> None:
    loader.model = Model(flux_model(guidance=False))
    edit_metadata(old, model="flux/dev")
    assert main(["generate", "--like", str(old), "--embedded-guidance", "2"]) == 2
    assert "no guidance input" in capsys.readouterr().err


def test_a_picture_without_metadata_cannot_be_repeated(loader: Loader, capsys: Said) -> None:
    Image.new("RGB", (8, 8)).save("plain.png")
    assert main(["generate", "--like", "plain.png"]) == 1
    assert "only PNGs that Calotype wrote" in one_line(capsys)
    assert loader.calls == []


# ---- generate from a picture


@pytest.fixture
def start(loader: Loader) -> Path:
    x = torch.linspace(0, 1, 48)
    to_pil(torch.stack([x.expand(24, 48), x.flip(0).expand(24, 48), torch.rand(24, 48)])).save("start.png")
    return Path("start.png")


def generated(capsys: Said, *words: str) -> Path:
    assert main(["generate", *words]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return Path(printed.out.strip())


def test_a_picture_that_started_from_a_file_is_repeated_from_it(loader: Loader, capsys: Said, start: Path) -> None:
    first = generated(capsys, "a fox", "--seed=7", f"--input-image={start}", "--denoising-strength=0.5")
    with Image.open(first) as picture:
        assert picture.size == (48, 16)  # about its proportions, the model's area, a multiple of 16
    request = read_metadata(first)[0]
    assert (request.input_image, request.denoising_strength) == ("start.png", 0.5)
    again = generated(capsys, "--like", str(first))
    assert again.read_bytes() == first.read_bytes()
    weaker = generated(capsys, "--like", str(first), "--denoising-strength", "0.1")
    assert read_metadata(weaker)[0] == replace(request, denoising_strength=0.1)
    assert weaker.read_bytes() != first.read_bytes()


def test_a_start_that_is_gone_or_was_never_a_file_is_asked_for(loader: Loader, capsys: Said, start: Path) -> None:
    with Image.open(start) as opened:
        picture = loader.model.generate("a fox", seed=7, input_image=opened)
    assert isinstance(picture, Image.Image)
    save(picture, "from-memory.png")
    assert main(["generate", "--like", "from-memory.png"]) == 2
    line = one_line(capsys)
    assert line.startswith("calotype: input_image: got 'sha256:")
    assert "the picture itself (--input-image FILE)" in line
    again = generated(capsys, "--like", "from-memory.png", "--input-image", str(start))
    with Image.open(again) as repeated:
        assert repeated.convert("RGB").tobytes() == picture.tobytes()
    start.unlink()
    assert main(["generate", "--like", str(again)]) == 2
    assert one_line(capsys).endswith("a PNG, JPEG or WebP file of at most 64,000,000 pixels; No such file or directory")
    assert loader.calls == [(("tiny",), PLAIN)]


def test_a_mask_that_was_changed_is_said(loader: Loader, capsys: Said, start: Path) -> None:
    Image.new("L", (48, 24), 255).save("mask.png")
    Image.new("L", (48, 24), 255).save("left.png")
    places = ["--mask-image=mask.png", "--region=left.png=a goose", "--region=mask.png=a hen"]
    first = generated(capsys, "a fox", "--seed=7", f"--input-image={start}", *places)
    assert generated(capsys, "--like", str(first)).read_bytes() == first.read_bytes()
    Image.new("L", (48, 24), 0).save("left.png")
    assert main(["generate", "--like", str(first)]) == 0
    assert "left.png is not the picture that" in (said := capsys.readouterr().err)
    assert "mask.png" not in said
    assert main(["generate", "--like", str(first), "--region=mask.png=a goose"]) == 0
    assert capsys.readouterr().err == ""


def test_a_start_that_was_changed_is_said(loader: Loader, capsys: Said, start: Path) -> None:
    first = generated(capsys, "a fox", "--seed=7", f"--input-image={start}")
    Image.new("RGB", (48, 24), "red").save(start)
    assert main(["generate", "--like", str(first)]) == 0
    assert one_line(capsys) == (
        f"calotype: note: start.png is not the picture that {first} was made from: it was changed since"
    )
    # Where another is given, nothing is said; nor where it is resized to another size.
    generated(capsys, "--like", str(first), "--input-image", str(start))
    second = generated(capsys, "a fox", "--seed=8", f"--input-image={start}")
    generated(capsys, "--like", str(second), "--width", "32", "--height", "32")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input-image", "none.png"], "input_image: got 'none.png'.*No such file"),
        (["--input-image", "."], "input_image: got '.'.*directory"),
        (["--denoising-strength", "0.5"], "denoising_strength: got 0.5; allowed: None without an input_image"),
        (["--input-image=start.png", "--denoising-strength", "0"], "denoising_strength: got 0.0; allowed: more than 0"),
        (["--clip-skip", "0"], "clip_skip"),
        (["--crop-left", "-1"], "crop_left"),
    ],
)
def test_a_bad_start_is_refused_before_the_model_is_loaded(
    loader: Loader, capsys: Said, start: Path, words: list[str], message: str
) -> None:
    assert main(["generate", "a fox", *words]) == 2
    assert re.search(message, one_line(capsys))
    assert loader.calls == []


@pytest.mark.parametrize("words", [["--clip-skip=2"], ["--target-width=512"], ["--crop-top=0"]])
def test_what_flux_is_not_told_is_refused(loader: Loader, capsys: Said, words: list[str]) -> None:
    assert main(["generate", "a fox", *words]) == 2
    assert "allowed: None: this model" in one_line(capsys)
    assert files() == []


# ---- progress


def test_progress_can_be_had_in_a_log(loader: Loader, capsys: Said) -> None:
    assert main(["generate", "a fox", "--steps", "2", "--count", "2", "--progress"]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "loading the built-in model",
        "picture 1/2: step 1/2",
        "picture 1/2: step 2/2",
        "picture 2/2: step 1/2",
        "picture 2/2: step 2/2",
    ]


@pytest.mark.parametrize(
    ("terminal", "wanted", "kind"),
    [
        (True, None, progress.Bars),
        (True, True, progress.Bars),
        (True, False, progress.Silent),
        (False, None, progress.Silent),
        (False, True, progress.Lines),
        (False, False, progress.Silent),
    ],
)
def test_progress_goes_where_somebody_looks(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, wanted: bool | None, kind: type[progress.Silent]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert type(progress.progress(wanted)) is kind


def test_a_terminal_shows_bars_that_leave_only_the_paths(
    loader: Loader, capsys: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    screen = io.StringIO()
    bars = progress.Bars()
    bars.console = Console(file=screen, force_terminal=True, width=80, color_system=None, _environ={})
    monkeypatch.setattr("calotype.cli.progress.progress", lambda wanted: bars)
    assert main(["generate", "a fox", "--steps", "2", "--count", "2", "--seed", "1"]) == 0
    assert capsys.readouterr() == ("a-fox-1.png\na-fox-2.png\n", "")
    shown = screen.getvalue()
    assert "loading the built-in model" in shown
    assert re.search(r"decoding ━+ 2/2", shown)
    last = shown.rsplit("\n", 1)[-1]
    assert last.endswith("\x1b[2K"), "the last bar is not cleared"


# ---- errors


def one_line(capsys: Said) -> str:
    """The one line that a failed command printed."""
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("calotype: ")
    assert "Traceback" not in printed.err
    return lines[0]


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def load(*sources: str, **options: object) -> None:
        raise error

    monkeypatch.setattr("calotype.loading.load", load)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (DamagedFile("a.safetensors: cut short;\nfetch it again"), 1, "a.safetensors: cut short; fetch it again"),
        (RequestError("device", "gpu", "cpu, cuda"), 2, "device: got 'gpu'; allowed: cpu, cuda"),
        (OutputError("x.png: no"), 1, "x.png: no"),
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
        (MemoryError("4 GiB"), 1, "out of memory: 4 GiB; try a smaller --width and --height, or --dtype bfloat16"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_is_one_line_and_a_status(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, capsys: Said, error: BaseException, status: int, message: str
) -> None:
    failing(monkeypatch, error)
    assert main(["generate", "a fox"]) == status
    assert one_line(capsys) == f"calotype: {message}"
    assert files() == []


def test_torchs_out_of_memory_is_told_by_its_name(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    failing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    assert main(["generate", "a fox"]) == 1
    assert "try a smaller" in one_line(capsys)


@pytest.mark.parametrize("words", [["--debug", "generate", "a fox"], ["generate", "a fox", "--debug"]])
def test_debug_shows_where_an_error_comes_from(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, capsys: Said, words: list[str]
) -> None:
    failing(monkeypatch, DamagedFile("cut short"))
    assert main(words) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "calotype: cut short"


def test_debug_after_two_dashes_is_a_prompt(loader: Loader, capsys: Said) -> None:
    assert main(["generate", "--seed", "1", "--", "--debug"]) == 0
    assert capsys.readouterr().out == "debug-1.png\n"


def test_a_fault_of_ours_shows_its_traceback_once(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    failing(monkeypatch, ZeroDivisionError("oops"))
    assert main(["generate", "a fox", "--debug"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("Traceback") for line in lines) == 1
    assert lines[-2] == "ZeroDivisionError: oops"
    assert "report it" in lines[-1]


# ---- the other commands

PART = PartDescription(
    name="transformer",
    layout="original",
    dtypes={"BF16": 780},
    tensors=780,
    parameters=11_901_408_320,
    bytes=23_802_816_640,
    files=("flux1-dev.safetensors",),
    prefix="",
)
DESCRIPTION = Description(
    source="flux1-dev.safetensors",
    kind="part",
    family="flux",
    variant="dev",
    layout="original",
    supported=True,
    note="to run, it needs also: clip, t5, vae",
    parts=(PART, replace(PART, name="vae", tensors=5, parameters=12, bytes=24, prefix="vae.")),
)


def test_info_says_what_a_source_is(monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    monkeypatch.setattr("calotype.loading.describe", lambda source: replace(DESCRIPTION, source=source))
    assert main(["info", "flux1-dev.safetensors"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "flux1-dev.safetensors",
        "  flux/dev part, original layout",
        "  to run, it needs also: clip, t5, vae",
        "",
        "  transformer  original  BF16  780 tensors  11,901,408,320 parameters  22.2 GiB",
        "  vae          original  BF16    5 tensors              12 parameters      24 B  under vae.",
    ]
    assert main(["info", "flux1-dev.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(DESCRIPTION.to_dict()))


def test_info_of_a_stranger_is_an_answer_too(monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    unknown = replace(
        DESCRIPTION, kind="unknown", family=None, variant=None, layout=None, note="no known model", parts=()
    )
    monkeypatch.setattr("calotype.loading.describe", lambda source: unknown)
    assert main(["info", "x.safetensors"]) == 0
    assert capsys.readouterr().out.splitlines() == ["flux1-dev.safetensors", "  unknown", "  no known model"]


SYSTEM = os.system  # pyright: ignore[reportDeprecated]


class Payload:
    """What an attacker's class looks like: unpickled as others do it, it creates a file."""

    def __init__(self, canary: Path) -> None:
        self.command = f"echo > {canary}"

    def __reduce__(self) -> tuple[object, ...]:
        return SYSTEM, (self.command,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_malicious_checkpoint_is_named_and_nothing_of_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {"a.weight": torch.zeros(2)}, "callbacks": Payload(tmp_path / "canary")}
    torch.save(content, "evil.ckpt", _use_new_zipfile_serialization=zipped)
    for words in (
        ["info", "evil.ckpt"],
        ["info", "evil.ckpt", "--json"],
        ["info", "--plan", "evil.ckpt"],
        ["info", "."],
        ["convert", "evil.ckpt", "out", "--to", "diffusers"],
        ["generate", "a fox", "--model", "evil.ckpt"],
    ):
        assert main(words) == 1, words
        said = one_line(capsys)
        assert f"evil.ckpt: a pickle that asks for '{SYSTEM.__module__}.system'" in said
        assert "Nothing of it was run" in said
        assert files() == ["evil.ckpt"]
    # The file is what it says: others would have run it.
    torch.load("evil.ckpt", weights_only=False)
    assert files() == ["canary", "evil.ckpt"]


def test_manifests_are_listed_for_programs(monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    listed = [("logit_scale", ()), ("net.bias", (4,)), ("net.weight", (4, 3, 1, 1))]
    monkeypatch.setattr("calotype.loading.manifest", lambda name: listed)
    assert main(["info", "--manifest", "tiny"]) == 0
    assert capsys.readouterr().out == "logit_scale\t\nnet.bias\t4\nnet.weight\t4,3,1,1\n"
    assert main(["info", "--manifests"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert "flux1-dev" in names
    assert not any(" " in name for name in names)


def test_an_unknown_manifest_is_refused(capsys: Said) -> None:
    assert main(["info", "--manifest", "flux9"]) == 2
    assert "flux1-dev" in one_line(capsys)


@pytest.mark.parametrize("words", [[], ["x", "--manifests"], ["--manifests", "--manifest", "x"]])
def test_info_wants_one_thing(capsys: Said, words: list[str]) -> None:
    assert main(["info", *words]) == 2
    assert "give one of SOURCE, --manifests and --manifest NAME" in one_line(capsys)


def test_convert_hands_on_what_it_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    calls: list[tuple[object, ...]] = []

    def convert(*given: object) -> tuple[Path, ...]:
        calls.append(given)
        return Path("out/a.safetensors"), Path("out/b.safetensors")

    monkeypatch.setattr("calotype.loading.convert", convert)
    assert main(["convert", "org/name", "out", "--to", "original"]) == 0
    assert calls == [("org/name", Path("out"), "original")]
    assert [Path(line).name for line in capsys.readouterr().out.splitlines()] == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("words", [["a", "b"], ["a", "b", "--to", "gguf"], ["a", "--to", "original"]])
def test_convert_refuses_half_a_command(capsys: Said, words: list[str]) -> None:
    assert main(["convert", *words]) == 2
    assert one_line(capsys)


def test_models_lists_what_runs_and_what_does_not_yet(capsys: Said) -> None:
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^flux/dev +1024x1024 +28 +1 +3.5 +euler +linear +512$", printed, re.MULTILINE)
    assert re.search(r"^sdxl/turbo +512x512 +1 +1 +- +euler_ancestral +trailing +-$", printed, re.MULTILINE)
    assert re.search(r"^sd3/3.5-large-turbo +1024x1024 +4 +1 +- +euler +normal +256$", printed, re.MULTILINE)
    assert re.search(r"^kolors/base +1024x1024 +25 +5 +- +dpmpp_2m +karras +256$", printed, re.MULTILINE)
    assert "dpmpp_2m_sde" in printed
    coming = printed.split("RECOGNISED, NOT RUN YET")[1].split("\n\n")[0]
    assert {line.split()[0] for line in coming.splitlines()[1:]} == {"sd1", "sdxl", "sd2"}
    assert all(len(line) <= 110 and line == line.rstrip() for line in printed.splitlines())


def test_models_for_programs(capsys: Said) -> None:
    assert main(["models", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {item["status"] for item in listed} == {"runs", "recognised, not run yet"}
    assert all((item["defaults"] is None) == (item["status"] != "runs") for item in listed)


def test_doctor_reports_and_loads_the_built_in_model(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    monkeypatch.setenv("CALOTYPE_HOME", str(Path("not/yet").absolute()))
    assert main(["doctor"]) == 0
    printed = re.sub(" +", " ", capsys.readouterr().out)
    for text in (
        f" calotype {VERSION}",
        f" torch {torch.__version__}",
        "cpu bfloat16",
        "ram",
        "yet (not made yet)",
        "hub cache",
        "yes, flux/tiny in ",
    ):
        assert text in printed
    assert main(["doctor", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"versions", "devices", "memory", "folders", "built-in model"}
    assert files() == []


def test_doctor_fails_where_the_built_in_model_does(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    failing(monkeypatch, DamagedFile("cut short"))
    assert main(["doctor"]) == 1
    assert "no: cut short" in capsys.readouterr().out


def test_memory_is_a_part_of_what_there_is() -> None:
    free, total = doctor.memory()
    assert total is None or total > 2**20
    assert free is None or total is None or 0 < free <= total


def test_version(capsys: Said) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr() == (f"calotype {VERSION}\n", "")


def test_an_unknown_command_is_refused(capsys: Said) -> None:
    assert main(["generat", "a fox"]) == 2
    assert "generat" in one_line(capsys)


def test_columns_are_aligned_and_empty_ones_left_out() -> None:
    assert columns([("a", "", "1"), ("bbb", "", "22")], right=(2,)) == ["a     1", "bbb  22"]
    assert [size(count) for count in (0, 1023, 1024, 3.5 * 2**30, 2**50)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "3.5 GiB",
        "1024.0 TiB",
    ]


# ---- help


@pytest.mark.parametrize("command", ["", "generate", "batch", "info", "convert", "models", "annotate", "doctor"])
def test_help_is_as_it_was_written(command: str, capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words only: frames, colours and the names of types are typer's. `CALOTYPE_WRITE_HELP=1` writes them anew."""
    for name, value in (("COLUMNS", "100"), ("TERM", "dumb"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    assert main([*command.split(), "--help"]) == 0
    shown = "\n".join(plain(line) for line in capsys.readouterr().out.splitlines() if plain(line)) + "\n"
    file = HELP / f"{command or 'calotype'}.txt"
    if "CALOTYPE_WRITE_HELP" in os.environ:
        file.parent.mkdir(exist_ok=True)
        file.write_text(shown, encoding="utf-8")
    assert shown == file.read_text(encoding="utf-8")


def plain(line: str) -> str:
    line = re.sub(r"[─│╭╮╰╯]|<(bool|str|path)>", " ", line)
    return " ".join(line.split())


def test_no_words_show_the_help(capsys: Said) -> None:
    assert main([]) == 0
    assert "generate" in capsys.readouterr().out


def test_every_command_and_option_is_explained() -> None:
    import typer

    group: Any = typer.main.get_command(app)
    for command in group.commands.values():
        assert command.help
        for parameter in command.params:
            assert parameter.help or parameter.name == "help"


# ---- signals, in a process of its own

SLOW = """
import sys, time, types
from dataclasses import dataclass
from PIL import Image

@dataclass
class Progress:
    step: int
    steps: int
    picture: int = 0
    stage: int = 0
    stages: int = 1

@dataclass
class Picture:
    image: object
    seed: int = 7

class SlowImage:
    info = {}
    def save(self, file, **options):
        file.write(b"half a picture")
        file.flush()
        print("saving", file=sys.stderr, flush=True)
        time.sleep(60)

class Lowered:
    pass

class Model:
    name = "slow"
    storage_errors = left_out = {}
    family = types.SimpleNamespace(defaults=types.SimpleNamespace(cfg_scale=1, embedded_guidance=None))
    def stream(self, request):
        try:
            for step in range(1, 4):
                yield Progress(step, request.steps)
            if request.steps == 3:
                yield Picture(SlowImage())
            time.sleep(60)
        finally:
            print("closed", file=sys.stderr, flush=True)

# Stand-ins that come without torch, so that this starts at once.
events = {"Lowered": Lowered, "Picture": Picture, "Progress": Progress}
for name, content in (("generate", events), ("loading", {"load": lambda *a, **k: Model()})):
    module = types.ModuleType("calotype." + name)
    vars(module).update(content)
    sys.modules[module.__name__] = module
from calotype.cli.main import run
run()
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(
    ("steps", "awaited"), [("9", "picture 1/1: step 3/9"), ("3", "saving")], ids=["drawing", "saving"]
)
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_at_once_and_leaves_no_file(
    tmp_path: Path, sent: signal.Signals, status: int, steps: str, awaited: str
) -> None:
    words = ["generate", "a fox", "--steps", steps, "--progress", "--out", "fox.png"]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(calotype.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        seen: list[str] = []
        for line in process.stderr:
            seen.append(line)
            if awaited in line:
                break
        assert awaited in seen[-1], seen
        started = time.monotonic()
        process.send_signal(sent)
        rest = process.stderr.read()
        assert process.wait(timeout=30) == status
        assert time.monotonic() - started < 30
        assert process.stdout.read() == ""
    assert "closed" in rest
    assert "Traceback" not in rest
    assert ("calotype: interrupted" in rest) == (sent == signal.SIGINT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_a_reader_that_has_enough_is_no_error() -> None:
    code = (
        "import sys, types; module = types.ModuleType('calotype.loading'); "
        "module.manifest = lambda name: [('key' * 1000, (1, 2))] * 1000; sys.modules[module.__name__] = module; "
        "from calotype.cli.main import run; run()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "info", "--manifest", "x"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""


def edit_metadata(path: Path, **changes: object) -> None:
    from PIL.PngImagePlugin import PngInfo

    with Image.open(path) as picture:
        picture.load()
        record = {**json.loads(picture.info["calotype"]), **changes}
        chunks = PngInfo()
        chunks.add_itxt("calotype", json.dumps(record))
    picture.save(path, pnginfo=chunks)


def test_a_place_is_a_folder_or_numbered_files(tmp_path: Path) -> None:
    numbered = Target.of(str(tmp_path / "a.b.png"), 2)
    assert [numbered.path(number, "fox", 7).name for number in (0, 1)] == ["a.b-1.png", "a.b-2.png"]
    assert Target.of(str(tmp_path), 2).path(1, "fox", 7) == tmp_path / "fox-7.png"


@pytest.mark.parametrize(("written", "scale"), [(".5", 0.5), ("1e-1", 0.1), ("2.", 2.0), ("-1", -1.0), ("3", 3.0)])
@pytest.mark.parametrize(
    ("field", "before"),
    [
        ("loras", "ink.pt"),
        ("regions", "a.png=a fox"),
        ("controls", "canny=net.pt:a.png"),
        ("image_prompts", "ip.bin:a.png"),
    ],
)
def test_a_number_behind_an_at_sign_is_a_scale(field: str, before: str, written: str, scale: float) -> None:
    (read,) = READ[field]([f"{before}@{written}"])
    assert read["scale"] == scale
    assert "@" not in "".join(str(value) for value in read.values())


# ---- LoRAs in prompts


@pytest.mark.parametrize(
    ("prompt", "options", "drawn", "loras"),
    [
        ("a fox", [], "a fox", []),
        ("a  fox < lora", [], "a  fox < lora", []),
        ("a fox <lora:ink:0.8>", [], "a fox", [{"file": "ink", "scale": 0.8}]),
        ("a <lora:ink> fox", [], "a fox", [{"file": "ink"}]),
        ("a fox<lora:ink:-.5>", ["b/ink.safetensors"], "a fox", [{"file": "b/ink.safetensors", "scale": -0.5}]),
        ("a fox < LoRA : ink : 5e-1 >", [], "a fox", [{"file": "ink", "scale": 0.5}]),
        ("a <lora:C:/x/ink.safetensors:0.5> fox", [], "a fox", [{"file": "C:/x/ink.safetensors", "scale": 0.5}]),
        ("a <lora:C:/x/ink.pt> fox", ["ink.pt"], "a fox", [{"file": "ink.pt"}, {"file": "C:/x/ink.pt"}]),
        ("<lora:ink:1> a fox <lora:ink:1>", [], "a fox", [{"file": "ink", "scale": 1.0}]),
        (
            "a fox",
            ["ink@.5", "line@1e-1", "wash@-2."],
            "a fox",
            [{"file": "ink", "scale": 0.5}, {"file": "line", "scale": 0.1}, {"file": "wash", "scale": -2.0}],
        ),
        ("a fox <lora:ink>", ["ink.pt@2"], "a fox", [{"file": "ink.pt", "scale": 2.0}]),
        ("<lora:line:1>a fox", ["ink.pt"], "a fox", [{"file": "ink.pt"}, {"file": "line", "scale": 1.0}]),
    ],
)
def test_a_prompt_may_name_loras(prompt: str, options: list[str], drawn: str, loras: list[dict[str, Any]]) -> None:
    assert loras_in(prompt, loras_of(options)) == (drawn, loras)


@pytest.mark.parametrize(
    ("prompt", "options", "allowed"),
    [
        ("a fox <lora:ink:strong>", [], "with one number"),
        ("a fox <lora:ink:0,8>", [], "with one number"),
        ("a fox <lora:ink:1:0.5>", [], "with one number"),
        ("a fox <lora:ink:>", [], "with one number"),
        ("a fox <lora:>", [], "with one number"),
        ("<lora:ink:1> a fox <lora:ink:0.5>", [], "ink has another scale before"),
        ("<lora:ink> a fox <lora:ink:0.5>", [], "ink has another scale before"),
        ("a fox <lora:ink:0.5>", ["a/ink.pt", "b/ink.safetensors"], "--lora has a/ink.pt, b/ink.safetensors"),
    ],
)
def test_a_lora_that_a_prompt_does_not_name_clearly_is_refused(prompt: str, options: list[str], allowed: str) -> None:
    with pytest.raises(RequestError, match=allowed):
        loras_in(prompt, loras_of(options))


def test_an_upscaler_is_read_from_the_option_of_a_pass() -> None:
    wanted = {"width": 96, "height": 96, "strength": 1.0, "steps": 2, "upscaler": "up/4x@b.pth"}
    assert READ["high_res"](["96x96@1@2@up/4x@b.pth"]) == [wanted]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("96x96,tiled", {"tiled": True}),
        ("96x96@0.5,untiled,prompt=", {"strength": 0.5, "tiled": False, "prompt": ""}),
        ("96x96,tiled,tile-size=64,tile-stride=32", {"tiled": True, "tile_size": 64, "tile_stride": 32}),
        ("96x96,prompt=a fox, tiled, in snow,tiled", {"prompt": "a fox, tiled, in snow", "tiled": True}),
        ("96x96@1@2@a,b.pth,tiled", {"strength": 1.0, "steps": 2, "upscaler": "a,b.pth", "tiled": True}),
        (
            "96x96,control=tile=a.pth@0.5,control=canny=b.pth:c.png",
            {
                "controls": [
                    {"kind": "tile", "model": "a.pth", "scale": 0.5},
                    {"kind": "canny", "model": "b.pth", "image": "c.png"},
                ]
            },
        ),
    ],
)
def test_a_pass_says_what_is_its_own(text: str, wanted: dict[str, Any]) -> None:
    assert READ["high_res"]([text]) == [{"width": 96, "height": 96, **wanted}]


def test_what_is_wrong_with_a_pass_is_said_by_its_field() -> None:
    with pytest.raises(RequestError, match=r"high_res\[1\]\.controls\[0\]: "):
        READ["high_res"](["96x96", "96x96,control=none"])
    with pytest.raises(RequestError, match=r"high_res\[0\]\.tile_size: got 'large'"):
        Request.from_dict({"prompt": "", "high_res": READ["high_res"](["96x96,tiled,tile-size=large"])})
    with pytest.raises(RequestError, match=r"high_res\[0\]: got '96x96,tilde'"):
        READ["high_res"](["96x96,tilde"])


@pytest.mark.parametrize(("text", "scale"), [("@-1", -1.0), ("@.5", 0.5), ("@2e1", 20.0), ("@3.", 3.0)])
def test_any_number_at_the_end_of_a_region_is_its_scale(text: str, scale: float) -> None:
    assert READ["regions"]([f"m.png=a fox{text}"]) == [{"mask": "m.png", "prompt": "a fox", "scale": scale}]


DEFAULTS_OF = {
    "sd1": sd1.DEFAULTS,
    "sdxl": sdxl.DEFAULTS,
    "sd3": sd3.DEFAULTS["medium"],
    "kolors": kolors.DEFAULTS,
    "hunyuan_dit": hunyuan_dit.DEFAULTS,
    "flux": flux.DEV_DEFAULTS,
    "turbo": sdxl.TURBO_DEFAULTS,
}


def test_the_one_liners_of_the_guide_are_the_recipes_of_the_example(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]
    found = re.search(
        r"### One line for each family.*?```sh\n(.*?)```", (root / "docs/guide/pictures.md").read_text(), re.S
    )
    assert found is not None
    lines = [shlex.split(line) for line in found[1].replace("\\\n", " ").splitlines() if line.startswith("calotype")]
    recipes = runpy.run_path(str(root / "examples/high_resolution.py"))["RECIPES"]
    Image.new("RGB", (512, 512)).save("black-car.png")
    requests: list[Request] = []
    stream = loader.model.stream

    def watched(request: Request) -> Events:
        requests.append(request)
        return stream(Request(prompt="a fox"))

    monkeypatch.setattr(loader.model, "stream", watched)
    for line in lines:
        assert main(line[1:]) == 0
    assert len(requests) == len(recipes) == len(DEFAULTS_OF)
    for request, (family, recipe) in zip(requests, recipes.items(), strict=True):
        plain = replace(request, prompt="", input_image=None, denoising_strength=None)
        passes = tuple(replace(each, controls=None, tiled=bool(each.tiled)) for each in plain.high_res)
        wanted = Request.from_dict({"prompt": "", **recipe})
        made, asked = (
            replace(each.complete(DEFAULTS_OF[family], seed=0), follows=())
            for each in (replace(plain, high_res=passes), wanted)
        )
        assert made == asked
        if family == "sd1":
            assert [[control.kind for control in each.controls or ()] for each in request.high_res] == [
                ["tile", "lineart"]
            ] * 3


# ---- batch


def test_a_file_of_requests_is_drawn_with_one_model(loader: Loader, capsys: Said) -> None:
    lines = [{"prompt": "a fox", "seed": 1}, {"prompt": "a goose", "seed": 2, "steps": 1, "count": 2}]
    Path("all.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert main(["batch", "all.jsonl", "--out", "there", "--model", "x", "--device=cpu"]) == 0
    names = [str(Path("there") / name) for name in ("a-fox-1.png", "a-goose-2.png", "a-goose-3.png")]
    assert capsys.readouterr().out.split() == names
    assert read_metadata(names[1])[0].steps == 1
    assert [sources for sources, _ in loader.calls] == [("x",)]


@pytest.mark.parametrize(
    ("text", "said", "loaded"),
    [
        ("{", "line 2: request: got '{'.*JSON", 0),
        ("[1]", "line 2: request: .*an object", 0),
        ('{"prompt": "a fox", "stepz": 3}', "line 2: stepz: got 3", 0),
        ('{"prompt": "a fox", "steps": 0}', "line 2: steps: got 0", 0),
        ('{"prompt": "a fox", "input_image": "none.png"}', "line 2: input_image: .*No such file", 0),
        ('{"prompt": "a fox", "width": 33}', "line 2: width: got 33", 1),
        (
            '{"prompt": "", "input_image": "s.png", "schedule": "simple", "steps": 1000}',
            "line 2: steps: .*at most 700",
            1,
        ),
    ],
)
def test_a_file_of_requests_is_checked_whole(loader: Loader, capsys: Said, text: str, said: str, loaded: int) -> None:
    Image.new("RGB", (32, 32)).save("s.png")
    Path("all.jsonl").write_text('{"prompt": "a fox"}\n' + text)
    assert main(["batch", "all.jsonl", "--out", "there"]) == 2
    assert re.search(said, one_line(capsys))
    assert len(loader.calls) == loaded
    assert not Path("there").exists()


def test_a_request_that_is_refused_leaves_no_folder(loader: Loader, capsys: Said) -> None:
    assert main(["generate", "a fox", "--width", "33", "--out", "new/"]) == 2
    assert "nearest valid size" in one_line(capsys)
    assert not Path("new").exists()
