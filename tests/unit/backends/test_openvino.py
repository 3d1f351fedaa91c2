"""OpenVINO's answers are torch's, for every input that a UNet and a decoder take."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints
import tiny_stable
import torch
import torch.nn.functional as F
from tiny import scattered
from torch import Tensor, nn

from calotype.backends import openvino
from calotype.backends.openvino import OpenVinoAutoencoder, OpenVinoUNet, Recent, accelerate, require
from calotype.backends.openvino_cache import Cache
from calotype.errors import RequestError
from calotype.loading import load
from calotype.nn.autoencoder import Autoencoder, AutoencoderConfig
from calotype.nn.conv import Conv2d
from calotype.nn.unet import Prepared, UNet, UNetConfig

needed = pytest.mark.skipif(not openvino.available(), reason="the extra `openvino` is not installed")
made_for_int8 = pytest.mark.skipif(
    not (openvino.available() and torch.cpu._is_vnni_supported()), reason="needs openvino and a CPU with VNNI"
)

SD1 = UNetConfig(
    channels_in=4,
    channels_out=4,
    widths=(32, 64, 64),
    blocks=2,
    depths=(1, 1, 0),
    middle_depth=1,
    heads=(4, 4, 4),
    text_width=24,
    text_width_in=None,
    vector_width=None,
    size_width=8,
    convolved=True,
)
SDXL = replace(SD1, depths=(0, 1, 2), middle_depth=2, heads=(2, 4, 4), vector_width=40, convolved=False)
KOLORS = replace(SDXL, text_width_in=36)
INPAINTING = replace(SD1, channels_in=9)
SMALL = replace(SD1, widths=(32, 64), blocks=1, depths=(1, 0), heads=(4, 4))  # int8 graphs take long to compile
VAE = AutoencoderConfig(latent_channels=4, widths=(32, 32, 64), blocks=1, quant_convs=True, scale=0.18215, shift=0.0)
SHIFTED = replace(VAE, latent_channels=16, quant_convs=False, scale=0.36, shift=0.12, blocks=2)


def unet(config: UNetConfig = SD1, seed: int = 0) -> UNet:
    net = scattered(UNet(config), seed)
    assert isinstance(net, UNet)
    return net


def autoencoder(config: AutoencoderConfig = VAE) -> Autoencoder:
    net = scattered(Autoencoder(config), 1)
    assert isinstance(net, Autoencoder)
    return net


def noise(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prepared(net: UNet | OpenVinoUNet, *groups: tuple[int, int], seed: int = 7) -> Prepared:
    """Two levels, with texts of (rows, tokens) for each group."""
    config = net.config
    width = config.text_width_in or config.text_width
    texts = [noise(rows, tokens, width, seed=seed + rows + tokens) for rows, tokens in groups]
    rows = sum(rows for rows, _ in groups)
    vector = noise(rows, config.vector_width, seed=seed) if config.vector_width else None
    return net.prepare(texts, vector, torch.tensor([981.0, 421.0]))


def assert_near(made: Tensor, wanted: Tensor) -> None:
    assert made.shape == wanted.shape and made.dtype == torch.float32
    assert wanted.std() > 0.01, "a flat answer would prove nothing"
    assert (made - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@needed
@torch.inference_mode()
@pytest.mark.parametrize("config", [SD1, SDXL, KOLORS, INPAINTING], ids=["sd1", "sdxl", "kolors", "inpainting"])
@pytest.mark.parametrize(
    ("rows", "groups"),
    [(1, [(1, 6)]), (1, [(2, 6)]), (1, [(1, 6), (1, 11)]), (2, [(2, 6)]), (1, [(2, 6), (1, 3)])],
    ids=["one", "both sides", "sides of two lengths", "two pictures", "three"],
)
def test_unet_answers_as_torch(config: UNetConfig, rows: int, groups: list[tuple[int, int]]) -> None:
    net = unet(config)
    fast = OpenVinoUNet(net)
    given = prepared(net, *groups)
    for level in (0, 1):
        x = noise(rows, config.channels_in, 8, 12, seed=level)
        assert_near(fast(x, *given.at(level)), net(x, *given.at(level)))


@needed
@torch.inference_mode()
def test_sides_need_not_be_even() -> None:
    net = unet()
    x, given = noise(1, 4, 7, 9), prepared(net, (2, 6))
    assert_near(OpenVinoUNet(net)(x, *given.at(0)), net(x, *given.at(0)))


@needed
@torch.inference_mode()
def test_new_text_is_taken_and_earlier_answers_stay() -> None:
    net = unet()
    fast = OpenVinoUNet(net)
    x, first, second = noise(1, 4, 8, 8), prepared(net, (2, 6)), prepared(net, (2, 6), seed=70)
    answers = [fast(x, *given.at(0)) for given in (first, second, first)]
    assert_near(answers[0], net(x, *first.at(0)))
    assert_near(answers[1], net(x, *second.at(0)))
    assert torch.equal(answers[0], answers[2]) and not torch.allclose(answers[0], answers[1])


@needed
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_computed_with_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "native", lambda dtype: False)
    half = unet().to(dtype)
    exact = unet().to(dtype).float()
    x, given = noise(1, 4, 8, 8), prepared(exact, (2, 6))
    assert_near(OpenVinoUNet(half)(x, *given.at(0)), exact(x, *given.at(0)))
    rounded = prepared(half, (2, 6))  # inputs in half precision are taken as they are
    made = OpenVinoUNet(half)(x, *rounded.at(0))
    assert (made - exact(x, *given.at(0))).abs().max() < 0.1 * made.abs().max()


@needed
@torch.inference_mode()
@pytest.mark.parametrize("config", [VAE, SHIFTED])
def test_decoder_answers_as_torch(config: AutoencoderConfig) -> None:
    net = autoencoder(config)
    latent = noise(2, config.latent_channels, 6, 9)
    fast = OpenVinoAutoencoder(net)
    assert_near(fast.decode(latent), net.decode(latent))
    picture = noise(1, 3, 16, 24).sigmoid()
    assert torch.equal(fast.encode(picture), net.encode(picture))


@needed
@torch.inference_mode()
def test_wide_attention_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from calotype.backends import openvino_graph

    monkeypatch.setattr(openvino_graph, "SCORES", 1000)  # 54 positions: in 3 parts
    net, latent = autoencoder(), noise(1, 4, 6, 9)
    assert_near(OpenVinoAutoencoder(net).decode(latent), net.decode(latent))


@needed
def test_changed_weights_are_noticed() -> None:
    net = unet()
    fast = OpenVinoUNet(net)
    x, given = noise(1, 4, 8, 8), prepared(net, (2, 6))
    before = fast(x, *given.at(0))
    net.conv_in.weight.mul_(2)
    after = fast(x, *given.at(0))
    assert_near(after, net(x, *given.at(0)))
    assert not torch.allclose(before, after)
    net.conv_out.weight = nn.Parameter(net.conv_out.weight * -1, requires_grad=False)
    assert_near(fast(x, *given.at(0)), net(x, *given.at(0)))
    with torch.inference_mode():
        net.conv_in.weight.mul_(3)  # torch does not count it here
        fast.forget()
        assert_near(fast(x, *given.at(0)), net(x, *given.at(0)))


@needed
@torch.inference_mode()
def test_a_layer_of_another_kind_is_refused() -> None:
    """An adapter in a layer's place would otherwise be left out in silence."""

    class Adapted(nn.Linear):
        pass

    net = unet()
    x, given = noise(1, 4, 8, 8), prepared(net, (2, 6))
    assert net.middle.transformer is not None
    net.middle.transformer.inward = Adapted(64, 64)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RequestError, match="Adapted stands for Linear"):
        OpenVinoUNet(net)(x, *given.at(0))


@needed
@torch.inference_mode()
def test_a_graph_is_compiled_once_for_its_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    built = graphs(monkeypatch)
    net = unet()
    fast = OpenVinoUNet(net, room=2)
    given = prepared(net, (2, 6))
    for side in (8, 10, 8, 10, 12, 10, 8):
        for level in (0, 1):
            x = noise(1, 4, side, 8)
            assert_near(fast(x, *given.at(level)), net(x, *given.at(level)))
    assert built == [(1, 4, 8, 8), (1, 4, 10, 8), (1, 4, 12, 8), (1, 4, 8, 8)]


@needed
def test_they_stand_where_the_torch_modules_stood() -> None:
    net, vae = unet(), autoencoder()
    fast, decoder = accelerate(net, vae)
    assert fast.config is net.config and decoder.config is vae.config and decoder.decoder is vae.decoder
    assert [id(weight) for weight in fast.parameters()] == [id(weight) for weight in net.parameters()]
    assert [id(weight) for weight in decoder.parameters()] == [id(weight) for weight in vae.parameters()]


def test_without_openvino_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not openvino.available()
    with pytest.raises(RequestError, match=r'pip install "calotype\[openvino\]".*2025\.2 or newer') as caught:
        accelerate(unet(), autoencoder())
    assert caught.value.field == "backend" and caught.value.value == "openvino"


@needed
def test_an_old_openvino_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino as installed

    monkeypatch.setattr(installed, "__version__", "2025.1.0-1")
    with pytest.raises(RequestError, match="openvino 2025.1.0-1 is too old"):
        require()


def test_what_gives_way_leaves_first() -> None:
    held = Recent[str](2)
    assert [held.get(key, lambda key=key: key) for key in "abac"] == ["a", "b", "a", "c"]
    assert held.get("a", lambda: "new") == "a" and held.get("b", lambda: "new") == "new"
    held.clear()
    assert held.get("a", lambda: "new") == "new"


# ---- int8


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "openvino", 2**30)


def difference(made: Tensor, wanted: Tensor) -> float:
    return float((made - wanted).norm() / wanted.norm())


def graphs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The pictures' shapes of the graphs that are built from now on."""
    from calotype.backends import openvino_graph

    built: list[object] = []
    build = openvino_graph.unet_graph
    monkeypatch.setattr(
        openvino_graph, "unet_graph", lambda *given, **how: (built.append(given[1]), build(*given, **how))[1]
    )
    return built


@made_for_int8
@torch.inference_mode()
@pytest.mark.parametrize("config", [SMALL, replace(SMALL, vector_width=40)], ids=["sd1", "sdxl"])
@pytest.mark.parametrize("groups", [[(2, 6)], [(1, 6), (1, 11)]], ids=["both sides", "sides of two lengths"])
def test_int8_is_near(config: UNetConfig, groups: list[tuple[int, int]], cache: Cache) -> None:
    net = unet(config)
    fast = OpenVinoUNet(net, eight_bits=True, cache=cache)
    given = prepared(net, *groups)
    for level in (0, 1):
        x = noise(1, 4, 8, 12, seed=level)
        made, wanted = fast(x, *given.at(level)), net(x, *given.at(level))
        assert made.dtype == torch.float32
        assert 1e-4 < difference(made, wanted) < 0.06


@made_for_int8
@torch.inference_mode()
def test_a_convolution_is_rounded_as_it_is_said() -> None:
    """Weights with a scale for each output, what comes in with one for each picture; nothing is added at the edges."""
    import openvino as ov

    from calotype.backends.openvino_layers import EightBits

    norm, layer = nn.GroupNorm(4, 32), Conv2d(32, 48, 3, padding=1)
    norm.weight.data, norm.bias.data = noise(32), noise(32, seed=6)
    layer.weight.data, layer.bias.data = noise(48, 32, 3, 3, seed=7), noise(48, seed=8)  # pyright: ignore
    x = noise(2, 32, 6, 7) * torch.tensor([1.0, 3.0])[:, None, None, None]
    given = ov.opset13.parameter([2, 32, 6, 7])
    answer = EightBits().activated_conv(norm, layer, given.output(0))
    graph = ov.Model([ov.opset13.result(answer)], [given])  # pyright: ignore[reportGeneralTypeIssues]
    made = torch.from_numpy(ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0])

    y = F.silu(norm(x))
    step = torch.maximum(y.amax((1, 2, 3), keepdim=True) / 239, torch.tensor(0.2785 / 16))
    scale = layer.weight.abs().amax((1, 2, 3), keepdim=True) / 127
    rounded = F.conv2d((y / step).round().clamp(-16, 239), (layer.weight / scale).round(), padding=1)
    assert layer.bias is not None
    wanted = rounded * step * scale[None, :, 0] + layer.bias[:, None, None]
    assert difference(made, wanted) < 2e-3  # where a value lies between two steps, rounding may go either way
    assert difference(made, layer(y)) > 4e-3


@made_for_int8
@torch.inference_mode()
def test_an_int8_graph_is_found_again(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    built, net = graphs(monkeypatch), unet(SMALL)
    x, given = noise(1, 4, 8, 8), prepared(net, (2, 6))
    first = OpenVinoUNet(net, eight_bits=True, cache=cache)(x, *given.at(0))
    again = OpenVinoUNet(unet(SMALL), eight_bits=True, cache=cache)(x, *given.at(0))
    assert torch.equal(again, first) and len(built) == 1

    (file,) = cache.folder.iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)
    with pytest.warns(RuntimeWarning, match="damaged"):
        mended = OpenVinoUNet(net, eight_bits=True, cache=cache)(x, *given.at(0))
    assert torch.equal(mended, first) and len(built) == 2

    cache.put(file.stem, b"no graph, though whole")
    with pytest.warns(RuntimeWarning, match="damaged"):
        mended = OpenVinoUNet(net, eight_bits=True, cache=cache)(x, *given.at(0))
    assert torch.equal(mended, first) and len(built) == 3

    OpenVinoUNet(unet(SMALL, seed=1), eight_bits=True, cache=cache)(x, *given.at(0))
    assert len(built) == 4 and len(list(cache.folder.iterdir())) == 2


@made_for_int8
def test_changed_weights_are_not_kept_on_disk(cache: Cache) -> None:
    net = unet(SMALL)
    fast = OpenVinoUNet(net, eight_bits=True, cache=cache)
    x, given = noise(1, 4, 8, 8), prepared(net, (2, 6))
    net.conv_out.weight.mul_(2)
    assert difference(fast(x, *given.at(0)), net(x, *given.at(0))) < 0.06
    assert not cache.folder.exists()


@made_for_int8
@torch.inference_mode()
def test_the_error_is_measured_on_a_job_and_remembered(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    built, net = graphs(monkeypatch), unet(SMALL)
    fast = OpenVinoUNet(net, eight_bits=True, cache=cache)
    given = prepared(net, (2, 6))
    answers: list[Tensor] = []

    def job() -> None:
        answers.extend(fast(noise(1, 4, 8, 8, seed=level), *given.at(level)) for level in (0, 1))

    error = fast.error(job)
    wanted = [net(noise(1, 4, 8, 8, seed=level), *given.at(level)) for level in (0, 1)]
    assert all(torch.equal(*pair) for pair in zip(answers, wanted, strict=True))
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) < 100  # of the size that was tried, no graph

    made = [fast(noise(1, 4, 8, 8, seed=level), *given.at(level)) for level in (0, 1)]
    assert error == pytest.approx(max(difference(*pair) for pair in zip(made, wanted, strict=True)), rel=1e-3)
    assert OpenVinoUNet(net, eight_bits=True, cache=cache).error(lambda: pytest.fail("run again")) == error
    assert len(built) == 2


@made_for_int8
@torch.inference_mode()
def test_without_a_cache_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALOTYPE_HOME", str(tmp_path))
    monkeypatch.setenv("CALOTYPE_OPENVINO_CACHE", "0")
    net = unet(SMALL)
    fast, given = OpenVinoUNet(net, eight_bits=True), prepared(net, (1, 6))
    assert fast.error(lambda: fast(noise(1, 4, 8, 8), *given.at(0))) > 0
    assert list(tmp_path.iterdir()) == []


@made_for_int8
def test_a_model_is_loaded_in_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALOTYPE_HOME", str(tmp_path / "home"))
    files = tiny_checkpoints.save(tmp_path / "tiny.safetensors", tiny_stable.sd1()), *tiny_stable.tokenizers(tmp_path)
    how: dict[str, Any] = {"backend": "openvino", "storage": {"unet": "int8"}}
    model = load(*files, **how)
    assert 0 < model.storage_errors["unet"] < 0.2
    picture = model.generate("a fox", width=64, height=64, steps=2, seed=3)
    exact = load(*files, backend="openvino")
    assert not exact.storage_errors
    assert picture != exact.generate("a fox", width=64, height=64, steps=2, seed=3)
    again = load(*files, **how)
    assert again.storage_errors == model.storage_errors
    assert picture == again.generate("a fox", width=64, height=64, steps=2, seed=3)


@needed
def test_int4_is_for_torch() -> None:
    with pytest.raises(RequestError, match="storage: got 'unet=int4'; allowed: int8 for the UNet"):
        load(backend="openvino", storage={"unet": "int4"})


@needed
def test_int8_is_refused_where_it_would_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(RequestError, match=r"unet=int8.*VNNI.*the backend torch takes int8"):
        OpenVinoUNet(unet(SMALL), eight_bits=True)
