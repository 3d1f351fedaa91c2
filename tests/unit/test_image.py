"""Pictures in and out, and the metadata that lets one be drawn again."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import warnings
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from calotype.errors import MetadataError, OutputError, RequestError
from calotype.image import (
    A1111_KEY,
    KEY,
    a1111_parameters,
    check_writable,
    embed_metadata,
    filled,
    input_picture,
    mask_picture,
    open_picture,
    read_metadata,
    save,
    to_pil,
    to_tensor,
)
from calotype.request import SIZES, Job, Region, Request
from calotype.version import VERSION

JOB = Job(
    prompt="a red fox,\nby night: 狐 🦊 \\(x\\)",
    negative_prompt="snow",
    width=32,
    height=16,
    steps=4,
    cfg_scale=3.5,
    cfg_rescale=0.25,
    embedded_guidance=None,
    seed=2**62,
    count=1,
    sampler="dpmpp_2m",
    schedule="beta",
    shift=None,
    text_tokens=256,
)


def drawn(job: Job = JOB) -> Image.Image:
    picture = to_pil(torch.linspace(0, 1, 3 * 16 * 32).reshape(3, 16, 32))
    embed_metadata(picture, job, model="flux/dev", source="flux1-dev.safetensors, ae.safetensors")
    return picture


def png_of_size(path: Path, width: int, height: int) -> Path:
    """A PNG's header that promises a size, and hardly any pixels behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)))
    return path


def with_text(path: Path, text: str | None) -> Path:
    chunks = PngInfo()
    if text is not None:
        chunks.add_itxt(KEY, text)
    Image.new("RGB", (4, 4)).save(path, pnginfo=chunks)
    return path


def test_every_level_survives_tensor_and_picture() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray(np.stack([levels, levels.T, 255 - levels], axis=-1))
    tensor = to_tensor(picture)
    assert tensor.shape == (3, 16, 16)
    assert tensor.dtype == torch.float32
    assert (tensor.min().item(), tensor.max().item()) == (0.0, 1.0)
    assert to_pil(tensor).tobytes() == picture.tobytes()


def test_values_are_clipped_and_rounded_to_nearest() -> None:
    tensor = torch.tensor([-1.0, 0.4 / 255, 0.6 / 255, 2.0]).expand(3, 1, 4)
    assert np.asarray(to_pil(tensor))[0, :, 0].tolist() == [0, 0, 1, 255]
    assert to_pil(torch.ones(3, 2, 2, dtype=torch.bfloat16)).getpixel((0, 0)) == (255, 255, 255)


def test_other_modes_become_rgb() -> None:
    assert to_tensor(Image.new("L", (3, 2), 255)).shape == (3, 2, 3)
    assert to_tensor(Image.new("RGBA", (3, 2), (255, 0, 0, 128)))[:, 0, 0].tolist() == [1.0, 0.0, 0.0]


def test_metadata_comes_back_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "fox.png"
    save(drawn(), path)
    request, record = read_metadata(path)
    assert request.to_dict() == {name: value for name, value in JOB.to_dict().items() if value is not None}
    assert (record["version"], record["model"]) == (VERSION, "flux/dev")
    assert record["source"] == "flux1-dev.safetensors, ae.safetensors"
    assert open_picture(path).tobytes() == drawn().tobytes()


@pytest.mark.parametrize("prompt", ["", "\0", "x" * 20_000, 'a "fox": {\n}', "é狐🦊"])
def test_any_prompt_comes_back(tmp_path: Path, prompt: str) -> None:
    path = tmp_path / "fox.png"
    save(drawn(Job(**{**vars(JOB), "prompt": prompt})), path)
    assert read_metadata(path)[0].prompt == prompt


def test_the_a1111_text_has_its_three_parts() -> None:
    text = a1111_parameters(Job(**{**vars(JOB), "prompt": "a fox", "embedded_guidance": 3.5}), "flux/dev")
    assert text == (
        "a fox\n"
        "Negative prompt: snow\n"
        "Steps: 4, Sampler: dpmpp_2m, Schedule type: beta, CFG scale: 3.5, Distilled CFG Scale: 3.5, "
        f"Seed: {2**62}, Size: 32x16, Model: flux/dev, Version: Calotype {VERSION}"
    )
    plain = a1111_parameters(Job(**{**vars(JOB), "negative_prompt": ""}), "flux/dev")
    assert "Negative" not in plain
    assert "Distilled" not in plain


def test_a_value_that_would_be_taken_for_two_is_quoted() -> None:
    """A1111 reads the last line back with the first pattern below, and unquotes with JSON."""
    text = a1111_parameters(JOB, 'sd1/a "fine" tune, v2: final')
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', text.splitlines()[-1])
    read = {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}
    assert read["Model"] == 'sd1/a "fine" tune, v2: final'
    assert (read["Seed"], read["Size"], read["Version"]) == (str(2**62), "32x16", f"Calotype {VERSION}")


@pytest.mark.parametrize(("prompt", "chunk"), [("a fox in a café", b"tEXt"), ("狐", b"iTXt")])
def test_the_a1111_text_is_the_chunk_that_most_programs_know(tmp_path: Path, prompt: str, chunk: bytes) -> None:
    save(drawn(Job(**{**vars(JOB), "prompt": prompt})), tmp_path / "fox.png")
    assert chunk + A1111_KEY.encode() + b"\0" in (tmp_path / "fox.png").read_bytes()


def test_other_programs_find_the_a1111_text_in_the_file(tmp_path: Path) -> None:
    save(drawn(), tmp_path / "fox.png")
    with Image.open(tmp_path / "fox.png") as picture:
        assert picture.info[A1111_KEY] == drawn().info[A1111_KEY]


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "[]",
        "7",
        "null",
        "{}",
        '{"job": 5}',
        '{"job": null}',
        '{"job": [1, 2]}',
        "[" * 100_000,
        '{"job": ' * 50_000,
        "1" * 10_000,
    ],
)
def test_missing_or_damaged_metadata_is_said(tmp_path: Path, text: str | None) -> None:
    path = with_text(tmp_path / "fox.png", text)
    with pytest.raises(MetadataError, match="fox.png"):
        read_metadata(path)


@pytest.mark.parametrize(
    ("job", "field"),
    [
        ({"prompt": 7}, "prompt"),
        ({"steps": 3}, "prompt"),
        ({"prompt": "a fox", "steps": 0}, "steps"),
        ({"prompt": "a fox", "cfg_scale": float("nan")}, "cfg_scale"),
        ({"prompt": "a fox", "from_the_future": 1}, "from_the_future"),
    ],
)
def test_metadata_is_checked_like_any_request(tmp_path: Path, job: dict[str, Any], field: str) -> None:
    path = with_text(tmp_path / "fox.png", json.dumps({"job": job}))
    with pytest.raises(RequestError) as caught:
        read_metadata(path)
    assert caught.value.field == field


def test_metadata_without_a_model_still_gives_its_request(tmp_path: Path) -> None:
    path = with_text(tmp_path / "fox.png", json.dumps({"job": {"prompt": "a fox", "seed": None}}))
    assert read_metadata(path) == (Request(prompt="a fox"), {"job": {"prompt": "a fox", "seed": None}})


@pytest.mark.parametrize("size", [(9400, 9400), (12_000, 12_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_picture_bomb_is_refused_before_it_is_decoded(
    tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(self: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    path = png_of_size(tmp_path / "bomb.png", *size)
    with pytest.raises(RequestError, match="bomb.png.*64,000,000 pixels"):
        open_picture(path)


def test_a_text_bomb_is_refused(tmp_path: Path) -> None:
    chunks = PngInfo()
    chunks.add_text(KEY, " " * 30_000_000, zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "bomb.png", pnginfo=chunks)
    with pytest.raises(RequestError, match="bomb.png"):
        read_metadata(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    "content",
    [b"", b"\x89PNG\r\n\x1a\n", b"no picture at all", b"GIF89a" + b"\0" * 50],
    ids=["empty", "start", "text", "gif"],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "fox.png").write_bytes(content)
    with pytest.raises(RequestError, match="fox.png.*allowed: a PNG, JPEG or WebP"):
        open_picture(tmp_path / "fox.png")


def test_a_truncated_picture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fox.png"
    save(drawn(), path)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(RequestError, match="fox.png"):
        open_picture(path)


@pytest.mark.parametrize("name", ["fox.png", "fox.jpg", "fox.webp"])
def test_damage_anywhere_is_noticed_or_harmless(tmp_path: Path, name: str) -> None:
    """Nothing but typed errors, whatever became of a file."""
    path = tmp_path / name
    save(drawn(), path)
    whole, rng = path.read_bytes(), random.Random(7)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])])
        with suppress(RequestError, MetadataError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on damaged EXIF
            read_metadata(path)


def test_a_missing_picture_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(RequestError, match=path.name):
            open_picture(path)


@pytest.mark.parametrize("name", ["fox.png", "fox.PNG", "fox.jpg", "fox.jpeg", "fox.webp"])
def test_the_ending_names_the_format(tmp_path: Path, name: str) -> None:
    save(drawn(), tmp_path / name)
    picture = open_picture(tmp_path / name)
    assert picture.format == {"png": "PNG", "webp": "WEBP"}.get(name.split(".")[1].lower(), "JPEG")
    assert picture.size == (32, 16)


@pytest.mark.parametrize("name", ["fox", "fox.gif", "fox.tar.gz", "none/fox.png", "file/fox.png", "."])
def test_an_impossible_place_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=name.split("/")[0]):
        check_writable(tmp_path / name)
    with pytest.raises(OutputError):
        save(drawn(), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_room_for_new_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OutputError, match="not writable"):
        check_writable(tmp_path / "fox.png")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_protected_file_or_folder_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "fox.png"
    file.write_bytes(b"precious")
    file.chmod(0o444)
    with pytest.raises(OutputError, match="not writable"):
        check_writable(file)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="not writable"):
            check_writable(tmp_path / "new.png")
    finally:
        tmp_path.chmod(0o755)


def test_checking_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "fox.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["PIL.Image.Image.save", "os.fsync", "os.replace"])
def test_an_interrupt_at_any_point_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(drawn(), tmp_path / "fox.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    path = tmp_path / "fox.png"
    path.write_bytes(b"old")

    def half(self: Image.Image, file: Any, **options: object) -> None:
        file.write(b"half a picture")
        raise error("stopped")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OutputError if error is OSError else error, match="stopped"):
        save(drawn(), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["fox.png"]
    assert path.read_bytes() == b"old"


def test_a_saved_file_has_ordinary_permissions(tmp_path: Path) -> None:
    save(drawn(), tmp_path / "fox.png")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "fox.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_name_too_long_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="not writable"):
        check_writable(tmp_path / ("x" * 300 + ".png"))


def test_a_long_name_is_no_obstacle(tmp_path: Path) -> None:
    save(drawn(), tmp_path / ("x" * 250 + ".png"))
    assert (tmp_path / ("x" * 250 + ".png")).exists()


# ---- pictures to start from


def corners() -> Image.Image:
    """Wider than high, each corner of its own colour."""
    picture = Image.new("RGB", (4, 2), "black")
    for place, colour in (((0, 0), "red"), ((3, 0), "lime"), ((0, 1), "blue")):
        picture.putpixel(place, Image.new("RGB", (1, 1), colour).getpixel((0, 0)))  # pyright: ignore[reportArgumentType]
    return picture


@pytest.mark.parametrize("kind", [str, Path])
def test_a_start_is_read_from_its_path(tmp_path: Path, kind: type[str] | type[Path]) -> None:
    corners().save(tmp_path / "x.png")
    assert input_picture(kind(tmp_path / "x.png")) == corners()
    assert input_picture(corners()) == corners()


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "I;16", "LA", "RGBA", "PA"])
def test_a_start_of_any_mode_becomes_rgb(mode: str) -> None:
    assert input_picture(Image.new(mode, (3, 2))).mode == "RGB"


def test_a_transparent_start_lies_on_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((255, 128, 0)):
        picture.putpixel((x, 0), (255, 0, 0, alpha))
    picture.save(tmp_path / "x.png")
    palette = Image.new("P", (3, 1), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((2, 0), 0)
    palette.save(tmp_path / "p.png", transparency=0)
    for given in (picture, tmp_path / "x.png"):
        seen = np.asarray(input_picture(given))[0]
        assert seen.tolist() == [[255, 0, 0], [255, 127, 127], [255, 255, 255]]
    assert np.asarray(input_picture(tmp_path / "p.png"))[0].tolist() == [[255, 0, 0], [255, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize("turned", range(1, 9))
def test_a_start_is_turned_as_its_camera_was_held(tmp_path: Path, turned: int) -> None:
    upright = corners()
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[turned]) if turned in undo else upright
    exif = Image.Exif()
    exif[0x0112] = turned
    stored.save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(to_tensor(input_picture(tmp_path / "x.png")), to_tensor(upright))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("none.png", "No such file"),
        ("", "directory"),
        ("a\0b", "null"),
        ("sha256:" + "0" * 64, "--input-image FILE"),
        ("broken.png", "it is none of these"),
    ],
)
def test_a_start_that_cannot_be_read_is_refused_by_its_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(RequestError, match=why) as caught:
        input_picture(given)
    assert caught.value.field == "input_image"


def test_sizes_that_follow_from_the_picture_stay_open(tmp_path: Path) -> None:
    told = {"original_width": 64, "original_height": 48, "crop_left": 0, "crop_top": 5, "target_width": 64}
    follows = ("original_width", "original_height", "crop_left", "target_width")
    job = replace(JOB, width=64, height=48, target_height=99, follows=follows, **told)
    picture = Image.new("RGB", (64, 48))
    embed_metadata(picture, job, model="sdxl/base", source="x")
    save(picture, tmp_path / "x.png")
    request, record = read_metadata(tmp_path / "x.png")
    assert {name: getattr(request, name) for name in SIZES} == {
        **dict.fromkeys(SIZES),
        "crop_top": 5,
        "target_height": 99,
    }
    assert record["job"]["original_width"] == 64


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "file"])
def test_grey_pictures_of_16_bits_keep_their_greys(tmp_path: Path, mode: str) -> None:
    """In starts, masks and all else that is given: not clipped to white."""
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    given: Any = Image.fromarray(levels)
    if mode == "file":
        given.save(tmp_path / "deep.png")
        given = str(tmp_path / "deep.png")
    elif mode != "I;16":
        stored = levels.astype(">u2" if mode == "I;16B" else np.int32)
        given = Image.frombytes(mode, (16, 16), stored.tobytes())
    wanted = np.arange(256).reshape(16, 16)
    assert np.array_equal(np.asarray(mask_picture(given)), wanted)
    assert np.array_equal(np.asarray(input_picture(given)), np.stack([wanted] * 3, axis=-1))
    deep = np.asarray([[0, 128, 129, 65535]], np.uint16)
    assert np.asarray(mask_picture(Image.fromarray(deep))).tolist() == [[0, 0, 1, 255]]  # to the nearest


def test_a_grey_of_16_bits_may_stand_for_what_is_clear(tmp_path: Path) -> None:
    Image.fromarray(np.asarray([[0, 1000, 65535]], np.uint16)).save(tmp_path / "clear.png", transparency=1000)
    assert np.asarray(input_picture(tmp_path / "clear.png"))[0, :, 0].tolist() == [0, 255, 255]
    assert np.asarray(mask_picture(tmp_path / "clear.png")).tolist() == [[0, 0, 255]]


@pytest.mark.parametrize(
    ("picture", "allowed"),
    [
        (Image.new("F", (4, 4), 0.5), "one of 8 or 16 bits"),
        (Image.new("I", (4, 4), 70_000), "numbers from 0 to 65,535"),
        (Image.new("I", (4, 4), -1), "numbers from 0 to 65,535"),
    ],
)
def test_pictures_of_other_numbers_are_refused(picture: Image.Image, allowed: str) -> None:
    for read, field in ((input_picture, "controls[0].image"), (mask_picture, "mask_image")):
        with pytest.raises(RequestError, match=allowed) as caught:
            read(picture, field)
        assert caught.value.field == field


def filling(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.asarray(filled(Image.fromarray(picture), Image.fromarray(mask)))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (8, 512), (9, 7), (1, 5)])
def test_a_place_is_filled_from_its_surroundings(height: int, width: int) -> None:
    picture = np.random.default_rng(1).integers(20, 200, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 4 : width // 4 * 3 + 1] = 255
    made = filling(picture, mask)
    known, hidden = mask == 0, mask > 0
    assert np.array_equal(made[known], picture[known])
    assert picture[known].min() <= made[hidden].min() <= made[hidden].max() <= picture[known].max()
    assert np.array_equal(filling(made, mask), made)
    assert np.array_equal(filling(np.where(hidden[..., None], np.uint8(255), picture), mask), made)
    assert np.array_equal(filling(picture, np.zeros_like(mask)), picture)


def test_a_fill_goes_over_softly() -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (64, 64, 3)).copy()
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    made = filling(ramp, mask).astype(int)
    assert abs(made - ramp).max() < 64
    assert abs(np.diff(made, axis=1)).max() < 25  # no edge where the place begins


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def linear_profile() -> bytes:
    """sRGB's, under another name and with a straight line for its tone curves."""
    made = bytearray(SRGB)
    (count,) = struct.unpack(">I", made[128:132])
    entries = [struct.unpack(">4sII", made[at : at + 12]) for at in range(132, 132 + 12 * count, 12)]
    places = {tag: slice(place, place + length) for tag, place, length in entries}
    made[places[b"desc"]] = made[places[b"desc"]].replace(b"s\0R\0G\0B", b"m\0i\0n\0e")
    curve = places[b"rTRC"].start  # of all three colours
    made[curve : curve + 16] = b"curv" + struct.pack(">IIHH", 0, 1, 256, 0)
    return bytes(made)


def test_a_start_with_a_profile_shows_its_colours(tmp_path: Path) -> None:
    grey = Image.new("RGB", (8, 8), (128, 128, 128))
    grey.save(tmp_path / "x.png", icc_profile=linear_profile())
    for field in ("input_image", "image_prompts[0].image"):
        made = input_picture(tmp_path / "x.png", field)
        assert made.getpixel((0, 0)) == pytest.approx((188, 188, 188), abs=1)  # half the light
        assert not made.info
    assert input_picture(tmp_path / "x.png", "controls[0].image").getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("profile", [b"broken", b"", SRGB])
def test_a_profile_that_says_nothing_changes_nothing(tmp_path: Path, profile: bytes) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    picture.save(tmp_path / "x.png", icc_profile=profile)
    made = input_picture(tmp_path / "x.png")
    assert np.array_equal(np.asarray(made), np.asarray(picture))
    assert not made.info


def test_a_picture_that_moved_with_its_inputs_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "moved"
    folder.mkdir()
    (folder / "start.png").write_bytes(b"")
    region = {"prompt": "a fox", "mask": "mask.png"}
    job = replace(JOB, input_name="start.png", denoising_strength=0.5, regions=(Region(**region),))
    save(drawn(job), folder / "x.png")
    monkeypatch.chdir(tmp_path)
    request, record = read_metadata(folder / "x.png")
    assert request.input_image == record["job"]["input_image"] == str(folder / "start.png")
    assert request.regions[0].mask == "mask.png"  # nowhere: said when it is asked for
