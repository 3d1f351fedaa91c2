"""Hunyuan-DiT's files by their headers, what is prepared once a job, and what its sizes come to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from strangers import Shapes, header_only, under
from torch import Tensor

import calotype
from calotype.errors import LoadError, MissingKeys, MissingPart, NotAModel, RequestError, UnexpectedKeys, WrongShape
from calotype.families.hunyuan_dit import DEFAULTS, told_sizes
from calotype.families.hunyuan_dit.config import DIFFUSION, HunyuanConfig
from calotype.families.hunyuan_dit.family import FAMILY
from calotype.families.hunyuan_dit.keys import diffusers_settings
from calotype.families.hunyuan_dit.network import HunyuanNetwork, Prepared, positions
from calotype.loading import describe, load, manifest
from calotype.request import Request

QUICK = 1.0  # seconds of this process for one header
TINY = HunyuanConfig(
    channels_in=4,
    channels_out=8,
    patch=2,
    width=48,
    heads=2,
    mlp_width=80,
    blocks=6,
    text_width=24,
    text_tokens=5,
    t5_width=32,
    t5_tokens=7,
    pooled_width=40,
    styled=True,
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def known(name: str) -> Shapes:
    return dict(manifest(name))


# ---- files

NEEDS = "to run, it needs also: bert, t5, vae"
FILES: dict[str, tuple[str | None, str | None, str, str, str]] = {  # family, variant, layout, part, note
    "hunyuan-dit-1.1": ("hunyuan_dit", "1.1", "original", "transformer", NEEDS),
    "hunyuan-dit-1.2": ("hunyuan_dit", "1.2", "original", "transformer", NEEDS),
    "hunyuan-dit-1.1-diffusers": ("hunyuan_dit", "1.1", "diffusers", "transformer", NEEDS),
    "hunyuan-dit-1.2-diffusers": ("hunyuan_dit", "1.2", "diffusers", "transformer", NEEDS),
    "hunyuan-dit-clip": (None, None, "original", "bert", "families with such a part: hunyuan_dit"),
    "hunyuan-dit-mt5": (None, None, "transformers", "t5", "t5 alone; families with such a part: "),
    "hunyuan-dit-text-encoder": (None, None, "transformers", "bert", "families with such a part: hunyuan_dit"),
    "hunyuan-dit-text-encoder-2": (None, None, "transformers", "t5", "hunyuan_dit"),
    "hunyuan-dit-vae": (None, None, "diffusers", "vae", "hunyuan_dit"),
}


def test_every_manifest_is_here() -> None:
    assert set(FILES) == {item.name for item in FAMILY.manifests}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", FILES)
def test_a_known_file_is_recognised_at_once(tmp_path: Path, name: str, prefix: str) -> None:
    family, variant, layout, part, note = FILES[name]
    if name == "hunyuan-dit-clip" and prefix:
        pytest.skip("Tencent's CLIP holds two models, which no file has under one prefix")
    path = header_only(tmp_path / "x.safetensors", under(prefix, known(name)))
    start = time.process_time()
    seen = describe(path)
    assert time.process_time() - start < QUICK
    assert (seen.family, seen.variant, seen.layout, seen.kind) == (family, variant, layout, "part")
    assert [(found.name, found.tensors) for found in seen.parts] == [(part, len(known(name)))]
    assert note in seen.note
    assert seen.supported


def test_one_file_of_everything_is_recognised(tmp_path: Path) -> None:
    """ComfyUI's packing, with the tokenizer among the tensors."""
    shapes = {
        **under("model.diffusion_model.", known("hunyuan-dit-1.2")),
        **under("vae.", known("sdxl-vae-bare")),
        **under("text_encoders.hydit_clip.transformer.bert.", known("hunyuan-dit-text-encoder")),
        **under("text_encoders.mt5xl.transformer.", known("hunyuan-dit-text-encoder-2")),
        "text_encoders.mt5xl.logit_scale": (),
        "text_encoders.mt5xl.spiece_model": (4309802,),
    }
    seen = describe(header_only(tmp_path / "x.safetensors", shapes))
    assert (seen.family, seen.variant, seen.kind, seen.note) == ("hunyuan_dit", "1.2", "model", "complete")
    assert {part.name for part in seen.parts} == {"transformer", "vae", "bert", "t5", "other"}


def without(shapes: Shapes, *beginnings: str) -> Shapes:
    return {key: shape for key, shape in shapes.items() if not key.startswith(beginnings)}


def controlnet() -> Shapes:
    """Tencent's: the first half of the blocks, and what joins them to the model's."""
    shapes = without(known("hunyuan-dit-1.2"), "final_layer.", *(f"blocks.{i}." for i in range(19, 40)))
    joints = {f"after_proj_list.{i}.weight": (1408, 1408) for i in range(19)}
    return {**shapes, **joints, "before_proj.weight": (1408, 1408)}


def controlnet_diffusers() -> Shapes:
    shapes = without(known("hunyuan-dit-1.2-diffusers"), "norm_out.", "proj_out.")
    return {**shapes, "controlnet_blocks.0.weight": (1408, 1408), "input_block.weight": (1408, 1408)}


def image_prompts() -> Shapes:
    return {**known("hunyuan-dit-1.2"), "blocks.0.attn2.kv_proj_ip_adapter.weight": (2816, 1024)}


MISSES: dict[str, tuple[Callable[[], Shapes], type[LoadError], str]] = {
    "a ControlNet": (controlnet, NotAModel, r"a ControlNet \(original\) for hunyuan_dit"),
    "a ControlNet for diffusers": (controlnet_diffusers, NotAModel, r"a ControlNet \(diffusers\) for hunyuan_dit"),
    "image prompts": (image_prompts, NotAModel, r"an IP-Adapter \(original\) for hunyuan_dit"),
    "the encoders' absence": (
        lambda: known("hunyuan-dit-1.2"),
        MissingPart,
        "Hunyuan-DiT model without its bert and its t5 and its vae",
    ),
    "an encoder alone": (
        lambda: known("hunyuan-dit-clip"),
        MissingPart,
        "only the bert of Hunyuan-DiT to make a model of",
    ),
    "a LoRA": (lambda: {"blocks.0.attn1.Wqkv.lora_A.weight": (4, 1408)}, NotAModel, r"a LoRA \(peft\) for hunyuan_dit"),
}


@pytest.mark.parametrize("name", MISSES)
def test_what_nearly_is_one_gets_its_own_answer(tmp_path: Path, name: str) -> None:
    shapes, error, said = MISSES[name]
    with pytest.raises(error, match=said):
        load(header_only(tmp_path / "x.safetensors", shapes()))


def parts(folder: Path, **changed: Shapes) -> list[Path]:
    """A file of each part, only headers; `changed` instead of a published one."""
    names = {
        "transformer": "hunyuan-dit-1.2",
        "bert": "hunyuan-dit-clip",
        "t5": "hunyuan-dit-mt5",
        "vae": "hunyuan-dit-vae",
    }
    return [
        header_only(folder / f"{part}.safetensors", changed.get(part) or known(name)) for part, name in names.items()
    ]


MISFITS: dict[str, tuple[str, Callable[[], Shapes], type[LoadError], str]] = {
    "T5-XXL": ("t5", lambda: known("t5xxl-fp16"), WrongShape, "a T5 of width 4096, but this Hunyuan-DiT takes 2048"),
    "FLUX's autoencoder": ("vae", lambda: known("flux-ae"), WrongShape, "channels: 16, but this Hunyuan-DiT takes 4"),
    "another BERT": (
        "bert",
        lambda: {key: tuple(768 if side == 1024 else side for side in shape) for key, shape in bert().items()},
        WrongShape,
        "a BERT of width 768, but this Hunyuan-DiT takes 1024",
    ),
    "its tokenizer's absence": ("vae", lambda: known("hunyuan-dit-vae"), MissingPart, "with its tokenizer.json or voc"),
    "half a file": (
        "transformer",
        lambda: without(known("hunyuan-dit-1.2"), *(f"blocks.{i}.mlp" for i in range(1, 40))),
        MissingKeys,
        r"156 tensors of the layout transformer/original",
    ),
    "a renamed key": (
        "transformer",
        lambda: {key.replace("skip_linear.b", "skip_lin.b"): s for key, s in known("hunyuan-dit-1.2").items()},
        MissingKeys,
        r"blocks\.\d+\.skip_linear\.bias",
    ),
    "a key too many": (
        "transformer",
        lambda: {**known("hunyuan-dit-1.2"), "blocks.0.norm4.weight": (1408,)},
        UnexpectedKeys,
        r"blocks\.0\.norm4\.weight",
    ),
    "a strange vector": (
        "transformer",
        lambda: {**known("hunyuan-dit-1.2"), "extra_embedder.0.weight": (5632, 1500)},
        LoadError,
        "a conditioning vector of 1500 channels is not supported",
    ),
}


def bert() -> Shapes:
    return without(known("hunyuan-dit-clip"), "visual.", "text_projection", "logit_scale")


@pytest.mark.parametrize("name", MISFITS)
def test_parts_that_do_not_go_together_are_told_apart(tmp_path: Path, name: str) -> None:
    part, shapes, error, said = MISFITS[name]
    with pytest.raises(error, match=said):
        load(*parts(tmp_path, **{part: shapes()}))


@pytest.mark.parametrize("styled", [True, False])
def test_a_written_configuration_is_read_back(styled: bool) -> None:
    """mlp_ratio above all, which diffusers multiplies and cuts off."""
    for width, mlp in ((1408, 6144), (48, 80), (48, 209), (2816, 12288), (1152, 4608)):
        settings = diffusers_settings(replace(TINY, width=width, mlp_width=mlp, styled=styled))
        assert int(settings["hidden_size"] * settings["mlp_ratio"]) == mlp
        assert settings["use_style_cond_and_image_meta_size"] == styled


# ---- the network


def network(config: HunyuanConfig = TINY) -> HunyuanNetwork:
    torch.manual_seed(0)
    made = HunyuanNetwork(config)
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made.requires_grad_(False).eval()


def prepared(made: HunyuanNetwork, rows: int = 2, times: tuple[float, ...] = (900.0, 400.0, 1.0)) -> Prepared:
    config = made.config
    rng = torch.Generator().manual_seed(1)
    return made.prepare(
        torch.randn(rows, config.text_tokens, config.text_width, generator=rng),
        torch.randn(rows, config.t5_tokens, config.t5_width, generator=rng),
        torch.arange(config.text_tokens + config.t5_tokens) % config.text_tokens < torch.arange(2, 2 + rows)[:, None],
        torch.randint(1, 2000, (rows, 6), generator=rng) if config.styled else None,
        torch.tensor(times),
        3,
        4,
    )


X = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(2))


def test_all_that_is_prepared_is_needed_no_more() -> None:
    """After `prepare`, the steps run without the modules that it says are for it alone; those are a sixth."""
    made = network()
    ready = prepared(made)
    wanted = [made(X, ready, level) for level in range(3)]
    for module in made.only_for_preparing():
        module.to("meta")
    assert all(torch.equal(made(X, ready, level), answer) for level, answer in enumerate(wanted))
    assert len(ready.text) == len(ready.shifts) == TINY.blocks
    with torch.device("meta"):
        whole = HunyuanNetwork(replace(TINY, **published()))
    counts = [sum(p.numel() for p in part.parameters()) for part in (whole, *whole.only_for_preparing())]
    assert 1 / 7 < counts[1] / counts[0] < 1 / 5


def published() -> dict[str, int]:
    return {
        "width": 1408,
        "heads": 16,
        "mlp_width": 6144,
        "blocks": 40,
        "text_width": 1024,
        "text_tokens": 77,
        "t5_width": 2048,
        "t5_tokens": 256,
        "pooled_width": 1024,
    }


@pytest.mark.parametrize("styled", [True, False])
def test_levels_and_rows_are_what_they_are_alone(styled: bool) -> None:
    made = network(replace(TINY, styled=styled))
    ready = prepared(made)
    alone = prepared(made, times=(400.0,))
    assert (made(X, ready, 1) - made(X, alone, 0)).abs().max() < 1e-5
    one = Prepared(
        shifts=tuple(shift[:, 1:] for shift in ready.shifts),
        out=(ready.out[0][:, 1:], ready.out[1][:, 1:]),
        text=tuple((k[1:], v[1:]) for k, v in ready.text),
        rope=ready.rope,
    )
    assert (made(X, ready, 1)[1:] - made(X, one, 1)).abs().max() < 1e-5


def test_a_time_for_each_picture() -> None:
    """As in training: times (t b)."""
    made = network()
    each = prepared(made, times=((900.0, 400.0),))  # pyright: ignore[reportArgumentType]
    both = prepared(made)
    x = X.expand(2, -1, -1, -1)
    assert (made(x, each, 0)[0] - made(x, both, 0)[0]).abs().max() < 1e-5
    assert (made(x, each, 0)[1] - made(x, both, 1)[1]).abs().max() < 1e-5


def test_padding_says_nothing_but_to_the_pool() -> None:
    """What BERT's padding holds changes nothing; of T5's, the pooled vector takes notice, as in training."""
    made = network()
    config = made.config
    rng = torch.Generator().manual_seed(3)
    text = torch.randn(1, config.text_tokens, config.text_width, generator=rng)
    t5 = torch.randn(1, config.t5_tokens, config.t5_width, generator=rng)
    mask = torch.arange(config.text_tokens + config.t5_tokens)[None] < 2
    sizes, times = torch.ones(1, 6), torch.tensor([400.0])

    def answer(text: Tensor, t5: Tensor) -> Prepared:
        return made.prepare(text, t5, mask, sizes, times, 3, 4)

    wanted = answer(text, t5)
    other = answer(torch.where(mask[:, :5, None], text, 7.0), t5)
    assert torch.equal(made(X, wanted, 0), made(X, other, 0))
    pooled = answer(text, t5 + 1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(wanted.text, pooled.text, strict=True))
    assert not torch.allclose(wanted.shifts[0], pooled.shifts[0])


def test_positions_fill_the_middle_of_their_square() -> None:
    for rows, columns in ((64, 64), (48, 80), (80, 48)):
        places = positions(rows, columns)
        step = 32 / max(rows, columns)
        across, down = places[:, 0], places[:, 1]
        for side, count in ((across, columns), (down, rows)):
            assert len(side.unique()) == count
            assert abs(float(side.min()) - (32 - count * step) / 2) <= 1  # whole tokens
            assert float(side.max()) < 32
        assert (across[1] - across[0], down[columns] - down[0]) != (0, 0)


# ---- requests


def test_sizes_are_told_widths_first_and_an_original_of_1024() -> None:
    styled = replace(DEFAULTS, sizes=True)
    job = Request(prompt="", width=1280, height=768).complete(styled, seed=0)
    assert told_sizes(job) == (1024, 1024, 1280, 768, 0, 0)
    asked = Request(prompt="", width=768, height=1280, original_width=900, crop_top=5, target_height=640)
    assert told_sizes(asked.complete(styled, seed=0)) == (900, 1024, 768, 640, 0, 5)
    plain = Request(prompt="").complete(DEFAULTS, seed=0)
    assert told_sizes(plain) == ()
    with pytest.raises(RequestError, match="this model is not told sizes"):
        Request(prompt="", crop_top=5).complete(DEFAULTS, seed=0)


def test_sides_are_multiples_of_sixteen() -> None:
    with pytest.raises(RequestError, match=r"multiples of 16; the nearest valid size is 1024x1008"):
        calotype.Request(prompt="", height=1000).complete(DEFAULTS, seed=0)


def test_each_version_has_its_process() -> None:
    assert DIFFUSION["1.1"].process.alpha_bars[-1] == pytest.approx(5.672e-6, rel=1e-3)
    assert DIFFUSION["1.2"].process.alpha_bars[-1] == pytest.approx(4.8528e-4, rel=1e-3)
    levels = DIFFUSION["1.2"].levels("leading", 50, 1.0)
    assert [level.time for level in levels.path[:2]] == [981.0, 961.0]
