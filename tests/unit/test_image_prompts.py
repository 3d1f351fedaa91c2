"""Where an IP-Adapter's networks are found, and what is said of files that will not do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny_checkpoints as tiny
import tiny_stable as stable
import torch
from PIL import Image
from strangers import header_only
from torch import Tensor

from calotype.backends import openvino
from calotype.checkpoint.files import Weights
from calotype.checkpoint.hub import file_on_hub
from calotype.checkpoint.image_prompts import IMAGE_ADAPTER, VISION, found_in
from calotype.errors import (
    LoadError,
    MissingPart,
    NotAModel,
    RequestError,
    SourceNotFound,
    UnknownModel,
    UnsupportedModel,
    WrongShape,
)
from calotype.families import FAMILIES
from calotype.generate import Model
from calotype.loading import load, manifest
from calotype.loading.image_prompts import adapter_in
from calotype.nn.image_adapter import ImageAdapterConfig, Places, ProjectionConfig
from calotype.nn.vision import BIG_G, VIT_H, VisionConfig
from calotype.request import ImagePrompt, Request

SMALL = VisionConfig(width=64, layers=2, heads=1, mlp_width=96, patch=7, side=14, quick_gelu=False, projection=24)
OTHER = replace(SMALL, projection=32)
ADAPTER = ImageAdapterConfig(
    seen_width=24,
    text_width=stable.SD1.text_width,
    widths=Places.of(stable.SD1).widths,
    form=ProjectionConfig(tokens=2),
)
RED = Image.new("RGB", (20, 10), "red")


def adapter(path: Path, config: ImageAdapterConfig = ADAPTER, **more: Tensor) -> Path:
    return tiny.save(path, {**tiny.tensors(IMAGE_ADAPTER, "base", config), **more})


def encoder(folder: Path, config: VisionConfig = SMALL) -> Path:
    return tiny.save(folder / "model.safetensors", tiny.tensors(VISION, "transformers", config)).parent


@pytest.fixture
def model(tmp_path: Path) -> Model[Any]:
    return load(tiny.save(tmp_path / "sd1.safetensors", stable.sd1()), *stable.tokenizers(tmp_path), device="cpu")


def drawn(model: Model[Any], *prompts: ImagePrompt) -> bytes:
    made = model.generate("a fox", seed=1, steps=1, width=32, height=32, image_prompts=list(prompts))
    assert isinstance(made, Image.Image)
    return made.tobytes()


@pytest.mark.parametrize("place", ["models/image_encoder", "image_encoder", "models/models/image_encoder", "elsewhere"])
def test_the_encoder_is_beside_the_adapter_or_named(model: Model[Any], tmp_path: Path, place: str) -> None:
    """One that the adapter was not trained with is passed over: h94/IP-Adapter has two."""
    file = adapter(tmp_path / "models" / "ip.safetensors")
    if place != "models/image_encoder":
        encoder(tmp_path / "models" / "image_encoder", OTHER)
    if place == "models/models/image_encoder":
        file = adapter(tmp_path / "models" / "sdxl_models" / "ip.safetensors")
    folder = encoder(tmp_path / place)
    named = folder if place == "elsewhere" else None
    assert drawn(model, ImagePrompt(file, RED, encoder=named)) != drawn(model)
    assert model.load_image_prompt(file, named) is model.load_image_prompt(file, named)


def test_a_pickle_without_a_configuration_will_do(model: Model[Any], tmp_path: Path) -> None:
    file = adapter(tmp_path / "ip.safetensors")
    known = drawn(model, ImagePrompt(file, RED, encoder=encoder(tmp_path / "encoder")))
    (tmp_path / "image_encoder").mkdir()
    torch.save(tiny.tensors(VISION, "transformers", SMALL), tmp_path / "image_encoder" / "pytorch_model.bin")
    assert drawn(model, ImagePrompt(file, RED)) == known
    flat = tiny.tensors(IMAGE_ADAPTER, "base", ADAPTER)
    parts = {
        name: {k[len(name) + 1 :]: v for k, v in flat.items() if k.startswith(name)}
        for name in ("image_proj", "ip_adapter")
    }
    torch.save(parts, tmp_path / "ip.bin")
    assert drawn(model, ImagePrompt(tmp_path / "ip.bin", RED)) == known


def test_without_an_encoder_the_message_says_which(model: Model[Any], tmp_path: Path) -> None:
    file = adapter(tmp_path / "models" / "ip.safetensors")
    encoder(tmp_path / "models" / "image_encoder", OTHER)
    with pytest.raises(MissingPart, match=r"image_encoder.*give CLIP with answers of width 24") as caught:
        model.load_image_prompt(file)
    assert str(tmp_path / "image_encoder") in str(caught.value)
    with pytest.raises(WrongShape, match="was not trained with; give CLIP"):
        model.load_image_prompt(file, tmp_path / "models" / "image_encoder")
    with pytest.raises(UnknownModel, match="no image encoder of CLIP"):
        model.load_image_prompt(file, file)
    with pytest.raises(SourceNotFound):
        model.load_image_prompt(file, tmp_path / "nothing")


def test_an_adapter_of_another_family_names_those_that_it_fits(model: Model[Any], tmp_path: Path) -> None:
    for name, families in (("sd1-ip-adapter", "Stable Diffusion 1.x"), ("sdxl-ip-adapter", "SDXL and Kolors")):
        path = header_only(tmp_path / f"{name}.safetensors", dict(manifest(name)))
        with pytest.raises(WrongShape, match=f"an IP-Adapter for {families}: tokens of width .* where the UNet has 64"):
            model.load_image_prompt(path)
    swapped = replace(ADAPTER, widths=(*ADAPTER.widths[:-1], 96))
    with pytest.raises(WrongShape, match="for no family here: cross-attentions of widths"):
        model.load_image_prompt(adapter(tmp_path / "x.safetensors", swapped))


def faces(shapes: dict[str, Any]) -> dict[str, Any]:
    kept = {key: shape for key, shape in shapes.items() if not key.startswith("image_proj.proj.")}
    return kept | {"image_proj.proj.0.weight": (1024, 512), "image_proj.proj.2.weight": (3072, 1024)}


@pytest.mark.parametrize(
    ("shapes", "error", "said"),
    [
        (lambda: faces(dict(manifest("sd1-ip-adapter"))), UnsupportedModel, r"an IP-Adapter \(faceid\) for sd1, which"),
        (lambda: {"a.lora_up.weight": (4, 4), "a.lora_down.weight": (4, 4)}, UnknownModel, "a LoRA.*no IP-Adapter"),
        (lambda: dict(manifest("sd1-unet-diffusers")), UnknownModel, "no IP-Adapter; give an IP-Adapter of"),
    ],
)
def test_what_is_no_adapter(
    model: Model[Any], tmp_path: Path, shapes: Callable[[], dict[str, Any]], error: type[LoadError], said: str
) -> None:
    with pytest.raises(error, match=said):
        model.load_image_prompt(header_only(tmp_path / "x.safetensors", shapes()))


def test_a_folder_of_one_adapter(model: Model[Any], tmp_path: Path) -> None:
    for name in ("one", "two"):
        file = adapter(tmp_path / name / "a.safetensors")
        encoder(tmp_path / name / "image_encoder")
        assert drawn(model, ImagePrompt(file, RED)) != drawn(model)
    assert drawn(model, ImagePrompt(tmp_path / "one", RED)) == drawn(model, ImagePrompt(file, RED))
    shutil.copy(file, tmp_path / "two" / "b.safetensors")
    with pytest.raises(LoadError, match="2 IP-Adapters; name the file of one"):
        model.load_image_prompt(tmp_path / "two")


def test_a_family_without_image_prompts(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="image_prompts: .*IP-Adapters of flux do not run here yet"):
        load(tiny.pipeline(tmp_path), device="cpu").load_image_prompt("x.safetensors")


@pytest.mark.skipif(not openvino.available(), reason="the extra `openvino` is not installed")
def test_a_backend_without_image_prompts(tmp_path: Path) -> None:
    whole = tiny.save(tmp_path / "sd1.safetensors", stable.sd1())
    model = load(whole, *stable.tokenizers(tmp_path), backend="openvino")
    with pytest.raises(RequestError, match="none with the backend openvino"):
        model.load_image_prompt("x.safetensors")


def test_one_given_as_a_part_of_a_model(tmp_path: Path) -> None:
    whole = tiny.save(tmp_path / "sd1.safetensors", stable.sd1())
    with pytest.raises(NotAModel, match="--image-prompt"):
        load(whole, adapter(tmp_path / "ip.safetensors"), *stable.tokenizers(tmp_path))
    with pytest.raises(NotAModel, match="the encoder of an image prompt"):
        load(whole, encoder(tmp_path / "image_encoder"), *stable.tokenizers(tmp_path))


def test_a_request_checks_its_image_prompts() -> None:
    request = Request(prompt="", image_prompts=[{"model": Path("ip.bin"), "image": "a.png"}])  # pyright: ignore[reportArgumentType]
    assert request.image_prompts == (ImagePrompt("ip.bin", "a.png"),)
    assert request.to_dict()["image_prompts"] == [{"model": "ip.bin", "image": "a.png", "scale": 1.0}]
    for given, field in (
        ({"model": "", "image": "a.png"}, r"image_prompts\[0\].model"),
        ({"model": 3, "image": "a.png"}, r"image_prompts\[0\].model"),
        ({"model": "a", "image": 3}, r"image_prompts\[0\].image"),
        ({"model": "a", "image": "a.png", "scale": -1}, r"image_prompts\[0\].scale"),
        ({"model": "a", "image": "a.png", "encoder": ""}, r"image_prompts\[0\].encoder"),
        ({"model": "a"}, r"image_prompts\[0\]"),
    ):
        with pytest.raises(RequestError, match=field):
            Request.from_dict({"prompt": "", "image_prompts": [given]})


def test_a_picture_known_by_its_mark_alone(model: Model[Any], tmp_path: Path) -> None:
    encoder(tmp_path / "image_encoder")
    file = adapter(tmp_path / "ip.safetensors")
    with pytest.raises(RequestError, match=r"image_prompts\[0\].image: .*--image-prompt FILE"):
        model.generate("a fox", image_prompts=[ImagePrompt(file, "sha256:" + "0" * 64)])


# ---- the hub, played by a folder


def test_what_is_fetched_from_the_hub(model: Model[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter's file, and of the encoders the one that goes with it."""
    hub = tmp_path / "hub"
    adapter(hub / "sdxl_models" / "ip.safetensors")
    for folder, config in (("sdxl_models", OTHER), ("models", SMALL)):
        place = encoder(hub / folder / "image_encoder", config)
        widths = {"hidden_size": config.width, "projection_dim": config.projection}
        tiny.write_json(place / "config.json", {**widths, "num_attention_heads": 1, "hidden_act": "gelu"})
    cache = tmp_path / "cache"
    fetched: list[str] = []

    def held(file: str) -> str:
        fetched.append(file)
        (cache / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(hub / file, cache / file)
        return str(cache / file)

    def hf_hub_download(name: str, file: str, *, local_files_only: bool) -> str:
        from huggingface_hub.errors import EntryNotFoundError

        assert name == "h94/IP-Adapter" and not local_files_only
        if not (hub / file).is_file():
            raise EntryNotFoundError(file)
        return held(file)

    def list_repo_files(name: str) -> list[str]:
        return [path.relative_to(hub).as_posix() for path in hub.rglob("*") if path.is_file()]

    def snapshot_download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        for file in list_repo_files(name):
            if any(fnmatchcase(file, pattern) for pattern in allow_patterns):
                held(file)
        return str(cache)

    for function in (hf_hub_download, list_repo_files, snapshot_download):
        monkeypatch.setattr(huggingface_hub, function.__name__, function)
    source = "h94/IP-Adapter/sdxl_models/ip.safetensors"
    assert drawn(model, ImagePrompt(source, RED)) != drawn(model)
    assert "models/image_encoder/model.safetensors" in fetched
    assert "sdxl_models/image_encoder/model.safetensors" not in fetched
    named = "h94/IP-Adapter/models/image_encoder"
    assert drawn(model, ImagePrompt(source, RED, encoder=named)) == drawn(model, ImagePrompt(source, RED))
    with pytest.raises(SourceNotFound, match="the hub model h94/IP-Adapter has no file models/nothing.bin"):
        model.load_image_prompt("h94/IP-Adapter/models/nothing.bin")
    with pytest.raises(SourceNotFound, match="has no folder nothing"):
        model.load_image_prompt(source, "h94/IP-Adapter/nothing")


@pytest.mark.parametrize(
    "source", ["a/b", "ip.bin", "/a/b/c.bin", "./a/b/c.bin", "a/../b/c.bin", "a/b/", "C:/a/b/c.bin"]
)
def test_a_path_is_no_file_on_the_hub(source: str) -> None:
    assert file_on_hub(source) is None
    assert file_on_hub("org/name/folder/c.bin") == ("org/name", "folder/c.bin")


@pytest.mark.parametrize("name", ["sd1-ip-adapter", "sd1-ip-adapter-plus", "sdxl-ip-adapter-plus-vit-h"])
def test_shapes_tell_the_configuration_of_published_adapters(tmp_path: Path, name: str) -> None:
    found = adapter_in(Weights.of(name, [header_only(tmp_path / "x.safetensors", dict(manifest(name)))]))
    assert found is not None
    whole = next(each for family in FAMILIES for each in family.manifests if each.name == name)
    assert found.config() == whole.parts[0].config


@pytest.mark.parametrize(("name", "config"), [("h", VIT_H), ("bigg", BIG_G)])
def test_shapes_tell_the_configuration_of_published_encoders(tmp_path: Path, name: str, config: VisionConfig) -> None:
    path = header_only(tmp_path / "x.safetensors", dict(manifest(f"clip-vit-{name}-image-encoder")))
    found = found_in(Weights.of(name, [path]), {}, VISION)
    assert found is not None
    assert found.config() == config


@pytest.mark.parametrize(
    "asked", [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"storage": {"unet": "int8"}}, {"memory": "stream"}], ids=str
)
def test_whatever_the_weights_are_kept_in(model: Model[Any], tmp_path: Path, asked: dict[str, Any]) -> None:
    encoder(tmp_path / "image_encoder")
    prompt = ImagePrompt(adapter(tmp_path / "ip.safetensors"), RED)
    other = load(tmp_path / "sd1.safetensors", *stable.tokenizers(tmp_path), device="cpu", **asked)
    wanted, got = drawn(model, prompt), drawn(other, prompt)
    difference = [abs(a - b) for a, b in zip(wanted, got, strict=True)]
    assert max(difference) <= (0 if "memory" in asked else 24)
    assert sum(difference) / len(difference) < 4
    assert got != drawn(other)


def test_with_a_lora(model: Model[Any], tmp_path: Path) -> None:
    """Of the queries that text and picture share: as with its change in the weights."""
    encoder(tmp_path / "image_encoder")
    prompt = ImagePrompt(adapter(tmp_path / "ip.safetensors"), RED)
    rng = torch.Generator().manual_seed(3)
    up, down = torch.randn(32, 4, generator=rng), torch.randn(4, 32, generator=rng)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q"
    tiny.save(tmp_path / "ink.safetensors", {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down})
    state = stable.sd1()
    state["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_q.weight"] += up @ down
    changed = load(tiny.save(tmp_path / "inked.safetensors", state), *stable.tokenizers(tmp_path), device="cpu")
    plain = drawn(model, prompt)
    model.attach(tmp_path / "ink.safetensors")
    assert max(abs(a - b) for a, b in zip(drawn(model, prompt), drawn(changed, prompt), strict=True)) <= 1
    assert drawn(model, prompt) != plain
    model.detach("ink")
    assert drawn(model, prompt) == plain


def test_a_configuration_beside_the_weights_is_followed(model: Model[Any], tmp_path: Path) -> None:
    file, place = adapter(tmp_path / "ip.safetensors"), encoder(tmp_path / "image_encoder")
    (place / "config.json").write_text(json.dumps({"hidden_act": "tanh"}))
    with pytest.raises(UnsupportedModel, match="hidden_act = 'tanh'"):
        model.load_image_prompt(file)
