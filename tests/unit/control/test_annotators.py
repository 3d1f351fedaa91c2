"""The pictures that ControlNets are led by."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from calotype.cli.main import main
from calotype.control.annotators import ANNOTATORS, annotate, annotator, drawn_by
from calotype.control.annotators.edges import _groups, blurred, canny, lines, soft_edges
from calotype.errors import RequestError, SourceNotFound
from calotype.families.flux.controlnet import UNION_KINDS as FLUX_UNION
from calotype.nn.controlnet import UNION_KINDS as UNET_UNION
from calotype.request import Control, Size

CLASSICAL = ("canny", "lineart", "softedge", "tile", "blur", "color", "gray", "invert", "none")
DETECTED = {
    "openpose": "OpenposeDetector",
    "normal": "NormalBaeDetector",
    "hed": "HEDdetector",
    "mlsd": "MLSDdetector",
    "lineart_learned": "LineartDetector",
    "lineart_anime": "LineartAnimeDetector",
}


def square(side: int = 64, low: int = 16, high: int = 48) -> Image.Image:
    picture = Image.new("RGB", (side, side))
    ImageDraw.Draw(picture).rectangle((low, low, high - 1, high - 1), fill="white")
    return picture


def noise(width: int = 40, height: int = 56) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def levels(picture: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(picture.convert("L"))


# ---- canny


def test_the_outline_of_a_square_is_one_pixel_wide_and_closed() -> None:
    found = levels(annotate("canny", square())) > 0
    assert found.sum(axis=1)[24:40].tolist() == [2] * 16
    assert found.sum(axis=0)[24:40].tolist() == [2] * 16
    rows, columns = np.nonzero(found)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (15, 47, 15, 47)
    reached = found & False
    reached[0, 0] = True
    for _ in range(200):  # flooded from outside, by sides, the inside stays dry: no gap
        grown = np.pad(reached, 1)
        reached = (grown[1:-1, 1:-1] | grown[:-2, 1:-1] | grown[2:, 1:-1] | grown[1:-1, :-2] | grown[1:-1, 2:]) & ~found
    assert not reached[32, 32]
    assert reached[63, 63]


def test_weak_edges_stay_where_they_touch_strong_ones() -> None:
    strip = np.zeros((48, 64, 1), np.uint8)
    strip[:, 32:] = 30  # a slope of 120
    strip[:8, 32:] = 100  # and of 400
    far = strip.copy()
    far[8:16, 32:] = 0  # with a gap between them
    touching, apart = canny(strip, 100, 300), canny(far, 100, 300)
    assert touching[:, 30:34].any(axis=1).all()
    assert not apart[20:].any()
    assert apart[:7, 31].all()
    assert canny(far, 100, 110)[20:47, 31].all()
    assert canny(strip, 399, 399)[:6].any()
    assert not canny(strip, 400, 400)[:6].any()  # above, not at


@pytest.mark.parametrize("seed", range(4))
def test_kept_edges_are_those_that_a_walk_from_strong_ones_reaches(seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (23, 31, 3), dtype=np.uint8)
    low, high = 300, 900
    weak, strong, kept = canny(pixels, low, low), canny(pixels, high, high), canny(pixels, low, high)
    reached = strong.copy()
    while True:
        grown = np.pad(reached, 1)
        grown = np.lib.stride_tricks.sliding_window_view(grown, (3, 3)).any(axis=(2, 3)) & weak
        if np.array_equal(grown, reached):
            break
        reached = grown
    assert 0 < strong.sum() < kept.sum() < weak.sum()
    np.testing.assert_array_equal(kept, reached)


def test_groups_are_those_of_a_simple_union_find() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 300, (2, 220))
    expected = list(range(300))
    for one, other in zip(a.tolist(), b.tolist(), strict=True):
        least, most = sorted((expected[one], expected[other]))
        expected = [least if group == most else group for group in expected]
    assert _groups(300, a, b).tolist() == expected
    order = rng.permutation(1000)
    assert not _groups(1000, order[1:], order[:-1]).any()  # one long chain


def test_canny_is_opencv_s() -> None:
    cv2 = pytest.importorskip("cv2")
    for picture in (noise(), square(), annotate("blur", noise(120, 90), blur=3)):
        pixels = np.asarray(picture)
        for low, high in ((100, 200), (20.5, 60.5), (400, 1200)):
            np.testing.assert_array_equal(canny(pixels, low, high), cv2.Canny(pixels, low, high) > 0)


def test_edges_of_colour_alone_are_found_and_blur_takes_noise_away() -> None:
    picture = Image.new("RGB", (32, 32), (0, 76, 0))
    picture.paste((150, 0, 0), (16, 0, 32, 32))  # of the same grey, within 1
    assert np.ptp(levels(picture)) <= 1
    assert (levels(annotate("canny", picture)) > 0).sum() == 32
    assert levels(annotate("canny", noise())).any()
    assert not levels(annotate("canny", noise(), blur=8)).any()


# ---- lines and soft edges


def test_lineart_draws_dark_lines_white_and_nothing_where_it_is_plain() -> None:
    picture = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(picture).line((64, 0, 64, 127), fill="black", width=2)
    drawn = levels(annotate("lineart", picture, line_width=4))
    assert drawn[20:100, 64].min() > 200
    assert drawn[:, :56].max() == drawn[:, 73:].max() == 0
    assert not levels(annotate("lineart", Image.new("RGB", (64, 48), "gray"))).any()


@pytest.mark.parametrize("kind", ["lineart", "softedge"])
def test_lines_are_the_same_at_every_size(kind: str) -> None:
    small = Image.new("RGB", (192, 192), "white")
    ImageDraw.Draw(small).ellipse((40, 40, 150, 150), fill="black")
    large = small.resize((384, 384), Image.Resampling.BICUBIC)
    one, other = (annotate(kind, picture, line_width=4) for picture in (small, large))
    again = other.resize((192, 192), Image.Resampling.BOX)
    difference = levels(one).astype(float) - levels(again)
    assert np.abs(difference).mean() < 1.5
    assert levels(one).max() > 200


@pytest.mark.parametrize("kind", ["lineart", "softedge"])
def test_strength_and_line_width_do_what_they_say(kind: str) -> None:
    picture = annotate("blur", noise(200, 160), blur=2)
    means = [levels(annotate(kind, picture, strength=strength)).mean() for strength in (0.5, 1, 2)]
    assert means[0] < means[1] < means[2]
    straight = square(128, 40, 90)
    thin, thick = ((levels(annotate(kind, straight, line_width=width)) > 99).sum() for width in (4, 12))
    assert thin < thick


def test_lines_run_on_along_contours_where_a_plain_difference_breaks() -> None:
    """Averaged along the flow, a line under noise is more even than its surroundings."""
    rng = np.random.default_rng(2)
    picture = np.full((96, 96, 3), 0.6, np.float32)
    picture[:, 47:49] = 0.35
    picture += rng.normal(0, 0.06, picture.shape).astype(np.float32)
    found = lines(picture, 1)
    assert found[8:-8, 46:50].max(axis=1).min() > 3 * found[:, :40].mean()


def test_soft_edges_are_soft_and_pass_over_fine_texture() -> None:
    picture = np.full((128, 128, 3), 0.2, np.float32)
    picture[:, 64:] = 0.6
    picture[:, ::2] += 0.2  # stripes as fine as can be, half as high as the step
    found = soft_edges(picture, 1)
    assert found[64, 62:66].min() > 10 * found[64, 20:44].max()
    across = levels(annotate("softedge", square(512, 128, 384)))[256, 118:138].astype(int)
    assert across.max() > 200
    assert len(set(across.tolist())) >= 5  # from black to white by steps
    assert not levels(annotate("softedge", Image.new("RGB", (64, 48), "gray"))).any()


def test_a_gaussian_keeps_the_sum_and_has_its_spread() -> None:
    point = np.zeros((65, 65), np.float32)
    point[32, 32] = 1
    spot = blurred(point, 3)
    distance = np.arange(65) - 32
    assert spot.sum() == pytest.approx(1, abs=1e-5)
    assert (spot.sum(axis=0) * distance**2).sum() == pytest.approx(9, rel=0.05)
    np.testing.assert_allclose(spot, spot.T, atol=1e-8)
    np.testing.assert_allclose(blurred(np.full((5, 9), 0.3, np.float32), 4), 0.3, rtol=1e-5)


# ---- the plain kinds


def test_tile_is_the_picture_and_loses_detail_by_factor() -> None:
    picture = noise(64, 64)
    assert np.array_equal(np.asarray(annotate("tile", picture)), np.asarray(picture))
    spreads = [np.asarray(annotate("tile", picture, factor=factor)).std() for factor in (1, 2, 8)]
    assert spreads[0] > spreads[1] > spreads[2]
    assert np.asarray(annotate("tile", picture, blur=2)).std() < spreads[0]


def test_color_is_the_mean_of_each_cell() -> None:
    picture = noise(64, 32)
    drawn = np.asarray(annotate("color", picture, cell=16)).astype(float)
    cells = np.asarray(picture).astype(float).reshape(2, 16, 4, 16, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(drawn, cells.repeat(16, axis=0).repeat(16, axis=1), atol=1)
    assert len(np.unique(np.asarray(annotate("color", noise(100, 70))).reshape(-1, 3), axis=0)) == 2


def test_gray_invert_none() -> None:
    picture = noise()
    gray = np.asarray(annotate("gray", picture))
    assert (gray == gray[..., :1]).all()
    np.testing.assert_array_equal(gray[..., 0], levels(picture))
    np.testing.assert_array_equal(np.asarray(annotate("invert", picture)), 255 - np.asarray(picture))
    np.testing.assert_array_equal(np.asarray(annotate("none", picture)), np.asarray(picture))


# ---- every kind


@pytest.mark.parametrize("kind", CLASSICAL)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "LA"])
def test_every_kind_takes_every_picture_and_gives_rgb_of_the_size_asked(kind: str, mode: str) -> None:
    picture = noise().convert(mode)
    before = picture.tobytes()
    own, asked = annotate(kind, picture), annotate(kind, picture, Size(72, 24))
    assert (own.mode, own.size, asked.mode, asked.size) == ("RGB", (40, 56), "RGB", (72, 24))
    assert own.tobytes() == annotate(kind, picture).tobytes()
    assert picture.tobytes() == before
    assert annotate(kind, picture, Size(1, 1)).size == (1, 1)


def test_transparent_places_are_white_and_cameras_turned() -> None:
    clear = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    assert np.asarray(annotate("none", clear)).min() == 255
    turned = Image.new("RGB", (8, 4))
    turned.getexif()[0x0112] = 6
    assert annotate("none", turned).size == (4, 8)


def test_settings_are_frozen_and_checked() -> None:
    with pytest.raises(FrozenInstanceError):
        annotator("canny").low = 3  # type: ignore[attr-defined]
    for kind, settings, field, allowed in (
        ("cany", {}, "kind", "canny, lineart"),
        ("canny", {"lo": 3}, "lo", "low, high, blur"),
        ("gray", {"low": 3}, "low", "no setting"),
        ("canny", {"low": 300, "high": 200}, "low", "at most high, 200"),
        ("canny", {"high": 2041}, "high", "2040"),
        ("canny", {"low": float("nan")}, "low", "finite"),
        ("canny", {"blur": -1}, "blur", "0 to 1024"),
        ("lineart", {"line_width": 0}, "line_width", "0.25 to 16"),
        ("lineart", {"strength": 0}, "strength", "0.01"),
        ("softedge", {"line_width": True}, "line_width", "0.25"),
        ("softedge", {"strength": "a"}, "strength", "0.01"),
        ("tile", {"factor": 0.5}, "factor", "1 to 64"),
        ("blur", {"blur": 2000}, "blur", "1024"),
        ("color", {"cell": 0}, "cell", "1 to"),
        ("openpose", {"hands": 1}, "hands", "True"),
        ("openpose", {"resolution": 500}, "resolution", "multiple of 64"),
        ("lineart_learned", {"coarse": "yes"}, "coarse", "True"),
        ("depth", {"weights": 3}, "weights", "text"),
    ):
        with pytest.raises(RequestError, match=allowed) as caught:
            annotate(kind, noise(), **settings)
        assert caught.value.field == field
    with pytest.raises(RequestError, match="height"):
        annotate("none", noise(), Size(5, 0))
    with pytest.raises(TypeError):
        ANNOTATORS["x"] = ANNOTATORS["canny"]  # type: ignore[index]


def test_torch_stays_out() -> None:
    words = "import sys; import calotype.control.annotators; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", words], check=True)


# ---- learned kinds, with libraries that only note what they are asked


class Detector:
    asked: dict[str, Any] = {}

    @classmethod
    def from_pretrained(cls, weights: str) -> Detector:
        cls.asked = {"class": cls.__name__, "weights": weights}
        if weights == "nowhere":
            raise OSError("no such repository")
        return cls()

    def to(self, device: str) -> Detector:
        type(self).asked["device"] = device
        return self

    def __call__(self, picture: Image.Image, **options: object) -> Image.Image:
        type(self).asked.update(options, saw=picture.size)
        return Image.new("L", (128, 64), 200)


@pytest.fixture
def aux(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    library: Any = ModuleType("controlnet_aux")
    library.__spec__ = importlib.machinery.ModuleSpec("controlnet_aux", None)
    for name in DETECTED.values():
        setattr(library, name, type(name, (Detector,), {}))
    monkeypatch.setitem(sys.modules, "controlnet_aux", library)
    return library


@pytest.mark.parametrize("kind", DETECTED)
def test_detectors_are_asked_by_name_and_answer_in_the_picture_s_size(kind: str, aux: Any) -> None:
    drawn = annotate(kind, noise(), Size(96, 48), resolution=128, weights="me/mine", device="meta")
    assert (drawn.mode, drawn.size, drawn.getpixel((5, 5))) == ("RGB", (96, 48), (200, 200, 200))
    options = {
        "openpose": {"include_hand": False, "include_face": False},
        "lineart_learned": {"coarse": False},
    }.get(kind, {})
    assert getattr(aux, DETECTED[kind]).asked == {
        "class": DETECTED[kind],
        "weights": "me/mine",
        "device": "meta",
        "detect_resolution": 128,
        "image_resolution": 128,
        "saw": (96, 48),
        **options,
    }


def test_settings_reach_detectors(aux: Any) -> None:
    annotate("openpose", noise(), hands=True, face=True)
    assert aux.OpenposeDetector.asked["include_hand"] and aux.OpenposeDetector.asked["include_face"]
    annotate("lineart_learned", noise(), coarse=True)
    assert aux.LineartDetector.asked["coarse"]
    with pytest.raises(SourceNotFound, match="nowhere.*no such repository"):
        annotate("hed", noise(), weights="nowhere")


@pytest.mark.parametrize(
    ("kind", "module", "extra"), [("hed", "controlnet_aux", "annotators"), ("depth", "transformers", "depth")]
)
def test_a_library_that_is_missing_is_asked_for(
    kind: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(RequestError, match=rf"not installed.*calotype\[{extra}\]") as caught:
        annotate(kind, noise())
    assert (caught.value.field, caught.value.value) == ("kind", kind)


def test_a_library_that_does_not_start_says_why(aux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(RequestError, match=r"torchvision::nms.*the torchvision that is for your torch"):
        annotate("hed", noise())


def test_depth_runs_a_model_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    backbone = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, out_indices=[1, 2],
        apply_layernorm=True, reshape_hidden_states=False,
    )  # fmt: skip
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=16, reassemble_factors=[1, 0.5],
        neck_hidden_sizes=[8, 8], fusion_hidden_size=8, head_hidden_size=4,
    )  # fmt: skip
    transformers.DepthAnythingForDepthEstimation(config).save_pretrained(tmp_path)
    size = {"height": 56, "width": 56}
    transformers.DPTImageProcessor(size=size, keep_aspect_ratio=True, ensure_multiple_of=14).save_pretrained(tmp_path)
    drawn = annotate("depth", noise(), Size(50, 30), weights=str(tmp_path))
    assert (drawn.mode, drawn.size) == ("RGB", (50, 30))
    assert (levels(drawn).min(), levels(drawn).max()) == (0, 255)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceNotFound, match="weights could not be fetched"):
        annotate("depth", noise(), weights=str(tmp_path / "empty"))


# ---- the command

Said = pytest.CaptureFixture[str]


def test_the_command_writes_what_the_call_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    monkeypatch.chdir(tmp_path)
    noise().save("photo.png")
    assert main(["annotate", "canny", "photo.png", "--low", "300", "--high", "900", "--width", "48"]) == 0
    assert capsys.readouterr().out == "photo-canny.png\n"
    with Image.open("photo-canny.png") as written:
        assert written.tobytes() == annotate("canny", noise(), Size(48, 67), low=300, high=900).tobytes()
    assert (
        main(["annotate", "lineart", "photo.png", "--out", "drawn.webp", "--line-width", "2", "--strength", "3"]) == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn.webp", "photo-canny.png", "photo.png"]
    for sides, size in (
        (["--height", "28"], (20, 28)),
        (["--height", "28", "--width", "30"], (30, 28)),
        ([], (40, 56)),
    ):
        assert main(["annotate", "gray", "photo.png", *sides]) == 0
        with Image.open("photo-gray.png") as written:
            assert written.size == size


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("cany photo.png", 2, "kind: got 'cany'"),
        ("gray photo.png --low 3", 2, "low: got 3.0; allowed: for gray, no setting"),
        ("canny photo.png --low 300", 2, "at most high, 200"),
        ("canny none.png", 2, "none.png"),
        ("canny photo.png --width 0", 2, "width: got 0"),
        ("canny photo.png --out there/x.png", 1, "no folder"),
        ("canny photo.png --out x.gif", 1, "unknown kind of picture"),
        ("canny photo.png --out photo.png", 1, "the picture itself"),
    ],
)
def test_the_command_refuses_in_one_line_and_writes_nothing(
    words: str, status: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    monkeypatch.chdir(tmp_path)
    noise().save("photo.png")
    before = Path("photo.png").read_bytes()
    assert main(["annotate", *words.split()]) == status
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]
    assert Path("photo.png").read_bytes() == before


# ---- of controls


def test_a_learned_kind_of_a_control_runs_where_the_model_does() -> None:
    for kind in ("depth", *DETECTED):
        drawing = drawn_by(Control(kind=kind, model="x"), "cuda:1")
        assert getattr(drawing, "device", None) == "cuda:1"
        drawing = drawn_by(Control(kind=kind, model="x", settings={"device": "cpu"}), "cuda:1")
        assert getattr(drawing, "device", None) == "cpu"
    assert drawn_by(Control(kind="canny", model="x"), "cuda:1") == annotator("canny")
    assert drawn_by(Control(kind="inpaint", model="x")) is drawn_by(Control(kind="none:hed", model="x")) is None


# ---- what the guide says of them


def documented(union: str) -> dict[str, int]:
    """The kinds that the guide's table gives to a union, and the numbers that it does."""
    guide = Path(__file__).parents[3] / "docs" / "guide" / "annotators.md"
    rows = [line.split("|") for line in guide.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert {row[1].strip(" `") for row in rows} == set(ANNOTATORS)
    found = {row[1].strip(" `"): re.search(rf"(?:; |\| ){union} (\d)", "| " + row[3].strip()) for row in rows}
    return {kind: int(number[1]) for kind, number in found.items() if number is not None}


@pytest.mark.parametrize(("union", "kinds"), [("union", UNET_UNION), ("FLUX union", FLUX_UNION)])
def test_unions_take_the_annotators_that_the_guide_gives_them(union: str, kinds: dict[str, int]) -> None:
    assert documented(union) == {kind: number for kind, number in kinds.items() if kind in ANNOTATORS}
