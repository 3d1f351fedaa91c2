"""Stable Diffusion 3's files by their headers, encoders left out, what is prepared once a job, and sizes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from strangers import Shapes, header_only, under
from torch import Tensor

from calotype.errors import (
    LoadError,
    MissingKeys,
    MissingPart,
    NotAModel,
    RequestError,
    UnexpectedKeys,
    UnsupportedModel,
    WrongShape,
)
from calotype.families.family import Clues
from calotype.families.sd3 import DEFAULTS, Sd3Model
from calotype.families.sd3.conditioning import ClipReader, Sd3Conditioning, T5Reader
from calotype.families.sd3.config import LARGE, MEDIUM, MEDIUM_3_5, SAMPLING, Sd3Config
from calotype.families.sd3.family import FAMILY, variant
from calotype.families.sd3.network import PositionTable, Prepared, Sd3Network
from calotype.generate import Picture, stream
from calotype.loading import describe, load, manifest
from calotype.nn.autoencoder import Autoencoder, AutoencoderConfig
from calotype.nn.quantized import Bits, quantize_linears
from calotype.request import Request
from calotype.text.clip import ClipEncoder
from calotype.text.clip_prompts import encode
from calotype.text.t5 import T5Encoder
from calotype.text.tokenizers import PromptTokenizer

QUICK = 1.0  # seconds of this process for one header
TINY = Sd3Config(
    channels_in=4,
    channels_out=4,
    patch=2,
    text_width=48,
    pooled_width=40,
    width=32,
    heads=2,
    mlp_width=64,
    blocks=3,
    positions=8,
    dual=(0,),
    norms=True,
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def known(name: str) -> Shapes:
    return dict(manifest(name))


# ---- files

NEEDS_TEXT = "to run, it needs also: clip_l, clip_g, t5"
NEEDS = NEEDS_TEXT + ", vae"
WITHOUT_T5 = "runs; without t5 long prompts"
CLIPS, CLIPS_G = "families with such a part: flux, sd1, sdxl, sd3", "families with such a part: sdxl, sd3"
T5S, VAES = "families with such a part: flux, sd3", "families with such a part: flux, sd3"
HALF = "is in another file: give that too"
# manifest: family, variant, layout, parts, note
FILES: dict[str, tuple[str | None, str | None, str, str, str]] = {
    "sd3-medium": ("sd3", "medium", "original", "transformer vae", NEEDS_TEXT),
    "sd3-medium-incl-clips": ("sd3", "medium", "original", "transformer vae clip clip", WITHOUT_T5),
    "sd3-medium-incl-clips-t5xxl": ("sd3", "medium", "original", "transformer vae clip clip t5", "complete"),
    "sd3.5-medium": ("sd3", "3.5-medium", "original", "transformer vae", NEEDS_TEXT),
    "sd3.5-large": ("sd3", "3.5-large", "original", "transformer vae", NEEDS_TEXT),
    "sd3-clip-l": (None, None, "transformers", "clip", CLIPS),
    "sd3-clip-l-openai": (None, None, "transformers", "clip", CLIPS),
    "sd3-clip-g": (None, None, "transformers", "clip", CLIPS_G),
    "sd3-t5xxl": (None, None, "transformers", "t5", T5S),
    "sd3-transformer-diffusers-medium": ("sd3", "medium", "diffusers", "transformer", NEEDS),
    "sd3-transformer-diffusers-3.5-medium": ("sd3", "3.5-medium", "diffusers", "transformer", NEEDS),
    "sd3-transformer-diffusers-3.5-large": ("sd3", "3.5-large", "diffusers", "transformer", NEEDS),
    "sd3-text-encoder": (None, None, "transformers", "clip", CLIPS),
    "sd3-text-encoder-2": (None, None, "transformers", "clip", CLIPS_G),
    "sd3-text-encoder-3": (None, None, "transformers", "t5", T5S),
    "sd3-vae-diffusers": (None, None, "diffusers", "vae", VAES),
    "taesd3-encoder": (None, None, "taesd", "vae", HALF),
    "taesd3-decoder": (None, None, "taesd", "vae", HALF),
    "taesd3-diffusers": (None, None, "diffusers-tiny", "vae", VAES),
}


def test_every_manifest_is_here() -> None:
    assert set(FILES) == {item.name for item in FAMILY.manifests}


@pytest.mark.parametrize("name", FILES)
def test_a_known_file_is_recognised_at_once(tmp_path: Path, name: str) -> None:
    family, variant, layout, parts, note = FILES[name]
    path = header_only(tmp_path / "x.safetensors", known(name))
    describe(path)  # the first may also import something
    start = time.process_time()
    seen = describe(path)
    assert time.process_time() - start < QUICK
    assert (seen.family, seen.variant, seen.layout) == (family, variant, layout)
    assert sorted(part.name for part in seen.parts) == sorted(parts.split())
    assert sum(part.tensors for part in seen.parts) == len(known(name))
    assert note in seen.note
    assert seen.supported == (note != HALF)


@pytest.mark.parametrize("layout", ["", "-diffusers"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "transformer."])
def test_a_transformer_is_found_under_any_prefix(tmp_path: Path, prefix: str, layout: str) -> None:
    shapes = known("sd3-transformer-diffusers-3.5-medium") if layout else transformer("sd3.5-medium")
    seen = describe(header_only(tmp_path / "x.safetensors", under(prefix, shapes)))
    assert (seen.family, seen.variant, seen.note) == ("sd3", "3.5-medium", NEEDS)
    assert [(part.name, part.prefix, part.tensors) for part in seen.parts] == [("transformer", prefix, len(shapes))]


def test_what_comfyui_adds_does_no_harm(tmp_path: Path) -> None:
    """The encoders' scales, position ids, a projection for CLIP-L, T5's tokenizer."""
    shapes = {
        **known("sd3-medium-incl-clips-t5xxl"),
        "text_encoders.clip_l.logit_scale": (),
        "text_encoders.clip_l.transformer.text_projection.weight": (768, 768),
        "text_encoders.clip_l.transformer.text_model.embeddings.position_ids": (1, 77),
        "text_encoders.clip_g.logit_scale": (),
        "text_encoders.t5xxl.logit_scale": (),
        "text_encoders.t5xxl.spiece_model": (791656,),
    }
    seen = describe(header_only(tmp_path / "x.safetensors", shapes))
    assert (seen.family, seen.variant, seen.note) == ("sd3", "medium", "complete")


def test_variants_are_told_by_the_network_and_turbo_by_its_name(tmp_path: Path) -> None:
    def named(config: Sd3Config, name: str = "") -> str:
        return variant(config, Clues(markers=frozenset(), settings={}, scheduler=None, name=name))

    assert named(MEDIUM, "turbo") == "medium"
    assert named(MEDIUM_3_5) == "3.5-medium"
    assert named(LARGE) == named(LARGE, "turbot-finetune") == "3.5-large"
    for name in ("sd3.5_large_turbo.safetensors", "stable-diffusion-3.5-large-turbo", "SD35LargeTurbo-Turbo"):
        assert named(LARGE, name) == "3.5-large-turbo"
    (tmp_path / "turbo").mkdir()
    for path, wanted in (("sd3.5_large_turbo", "3.5-large-turbo"), ("turbo/sd3.5_large", "3.5-large")):
        file = header_only(tmp_path / f"{path}.safetensors", known("sd3.5-large"))
        assert describe(file).variant == wanted
    assert (DEFAULTS["3.5-large-turbo"].steps, DEFAULTS["3.5-large-turbo"].cfg_scale) == (4, 1.0)


def without(shapes: Shapes, *pieces: str) -> Shapes:
    return {key: shape for key, shape in shapes.items() if not any(piece in key for piece in pieces)}


def transformer(name: str) -> Shapes:
    prefix = "model.diffusion_model."
    return {key.removeprefix(prefix): shape for key, shape in known(name).items() if key.startswith(prefix)}


MISSES: dict[str, tuple[Callable[[], Shapes], type[LoadError], str]] = {
    "a ControlNet for diffusers": (
        lambda: {**known("sd3-transformer-diffusers-medium"), "controlnet_blocks.0.weight": (1536, 1536)},
        NotAModel,
        r"a ControlNet \(diffusers\) for sd3",
    ),
    "a LoRA": (
        lambda: {"transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight": (4, 1536)},
        NotAModel,
        r"a LoRA \(diffusers\) for sd3",
    ),
    "no text encoder": (
        lambda: known("sd3.5-large"),
        MissingPart,
        r"a Stable Diffusion 3 model without its clip_l and its clip_g and its t5; give also .* clip_l\.safetensors",
    ),
    "the transformer alone": (
        lambda: transformer("sd3.5-large"),
        MissingPart,
        "without its clip_l and its clip_g and its t5 and its vae",
    ),
    "no autoencoder": (
        lambda: without(known("sd3-medium-incl-clips"), "first_stage_model."),
        MissingPart,
        r"without its vae; give also the same file, or vae/ of a diffusers folder",
    ),
    "half a file": (
        lambda: without(known("sd3-medium-incl-clips"), *(f"joint_blocks.{i}.x_block.mlp" for i in range(9))),
        MissingKeys,
        "36 tensors of the layout",
    ),
    "a renamed key": (
        lambda: {key.replace("pos_embed", "pos_table"): s for key, s in known("sd3-medium-incl-clips").items()},
        MissingKeys,
        "pos_embed",
    ),
    "a key too many": (
        lambda: {**known("sd3-medium-incl-clips"), "model.diffusion_model.joint_blocks.0.x_block.norm": (1536,)},
        UnexpectedKeys,
        r"joint_blocks\.0\.x_block\.norm",
    ),
    "positions of no square": (
        lambda: {**known("sd3-medium-incl-clips"), "model.diffusion_model.pos_embed": (1, 36863, 1536)},
        LoadError,
        "36863 positions are no square",
    ),
    "a condition beside the picture": (
        lambda: {
            **known("sd3-medium-incl-clips"),
            "model.diffusion_model.x_embedder.proj.weight": (1536, 33, 2, 2),
        },
        UnsupportedModel,
        "its transformer takes 33 channels for the 16 that it predicts",
    ),
}


@pytest.mark.parametrize("name", MISSES)
def test_what_nearly_is_one_gets_its_own_answer(tmp_path: Path, name: str) -> None:
    shapes, error, said = MISSES[name]
    with pytest.raises(error, match=said):
        load(header_only(tmp_path / "x.safetensors", shapes()))


MISFITS: dict[str, tuple[str, Callable[[], Shapes], str]] = {
    "mT5": ("t5", lambda: known("hunyuan-dit-mt5"), "a T5 encoder of width 2048, but .* takes 4096"),
    "SDXL's autoencoder": ("vae", lambda: known("sdxl-vae-diffusers"), "latent channels: 4, but .* takes 16"),
    "a smaller second CLIP": (
        "clip_g",
        lambda: {key: tuple(1024 if s == 1280 else s for s in shape) for key, shape in known("sd3-clip-g").items()},
        "pooled states of width 1792 from both CLIPs, but .* takes 2048",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_parts_that_do_not_go_together_are_told_apart(tmp_path: Path, name: str) -> None:
    part, shapes, said = MISFITS[name]
    files = {
        "transformer": transformer("sd3.5-large"),
        "clip_l": known("sd3-clip-l"),
        "clip_g": known("sd3-clip-g"),
        "t5": known("sd3-t5xxl"),
        "vae": known("sd3-vae-diffusers"),
        part: shapes(),
    }
    with pytest.raises(WrongShape, match=said):
        load(*(header_only(tmp_path / f"{role}.safetensors", shapes) for role, shapes in files.items()))


# ---- the network


def network(config: Sd3Config = TINY) -> Sd3Network:
    made = Sd3Network(config)
    tiny.scattered(made, 0)
    return made


def prepared(made: Sd3Network, rows: int = 2, times: tuple[float, ...] = (1.0, 0.6, 0.1)) -> Prepared:
    rng = torch.Generator().manual_seed(1)
    text = torch.randn(2, 5, made.config.text_width, generator=rng)[-rows:]
    pooled = torch.randn(2, made.config.pooled_width, generator=rng)[-rows:]
    return made.prepare(text, pooled, torch.tensor(times), 3, 4)


X = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(2))


def test_all_that_is_prepared_is_needed_no_more() -> None:
    """After `prepare`, the steps run without the modules that it says are for it alone; those are a third."""
    made = network()
    ready = prepared(made)
    wanted = [made(X, ready, level) for level in range(3)]
    for module in made.only_for_preparing():
        module.to("meta")
    assert all(torch.equal(made(X, ready, level), answer) for level, answer in enumerate(wanted))
    for config in (MEDIUM, LARGE):
        with torch.device("meta"):
            whole = Sd3Network(config)
        once = sum(p.numel() for module in whole.only_for_preparing() for p in module.parameters())
        assert 0.3 < once / sum(p.numel() for p in whole.parameters()) < 0.4


def test_levels_and_rows_are_what_they_are_alone() -> None:
    made = network()
    ready = prepared(made)
    assert (made(X, ready, 1) - made(X, prepared(made, times=(0.6,)), 0)).abs().max() < 1e-5
    assert (made(X, ready, 1)[1:] - made(X, prepared(made, rows=1), 1)).abs().max() < 1e-5


def test_a_time_for_each_picture() -> None:
    """As in training: times (t b)."""
    made = network()
    each = prepared(made, times=((1.0, 0.6),))  # pyright: ignore[reportArgumentType]
    both = prepared(made)
    x = X.expand(2, -1, -1, -1)
    assert (made(x, each, 0)[0] - made(x, both, 0)[0]).abs().max() < 1e-5
    assert (made(x, each, 0)[1] - made(x, both, 1)[1]).abs().max() < 1e-5


@pytest.mark.parametrize(("bits", "error"), [(8, 0.02), (4, 0.3)])
def test_matrices_in_fewer_bits_answer_nearly_the_same(bits: Bits, error: float) -> None:
    made = network()
    wanted = made(X, prepared(made), 1)
    quantize_linears(made, bits, least=256)
    found = made(X, prepared(made), 1)
    assert 0 < float((found - wanted).norm() / wanted.norm()) < error


def test_a_picture_takes_the_middle_of_the_positions() -> None:
    table = PositionTable(TINY)
    table.table.data = torch.arange(64.0).reshape(1, 64, 1)
    assert table(2, 4).flatten().tolist() == [26, 27, 28, 29, 34, 35, 36, 37]
    assert table(8, 8).flatten().tolist() == list(range(64))
    assert table(3, 1).flatten().tolist() == [2 * 8 + 3, 3 * 8 + 3, 4 * 8 + 3]  # of two middles the upper left


# ---- the model

CLIP_L = replace(tiny.CLIP, width=16, projection=16)
CLIP_G = replace(tiny.CLIP, width=24, projection=24, heads=3)
T5 = replace(tiny.T5, width=48)


def model(*roles: str) -> Sd3Model:
    """A tiny model with these encoders: clip_l, clip_g, t5."""

    def clip(seed: int, role: str) -> ClipReader | None:
        encoder = ClipEncoder(CLIP_L if role == "clip_l" else CLIP_G)
        tiny.scattered(encoder, seed)
        reader = PromptTokenizer(tiny.tokenizer(), start=3, end=1, padding=0)
        return ClipReader(encoder, reader, {}) if role in roles else None

    t5 = T5Encoder(T5)
    tiny.scattered(t5, 3)
    vae = Autoencoder(
        AutoencoderConfig(
            latent_channels=4, widths=(32, 32, 32, 32), blocks=1, quant_convs=False, scale=1.5305, shift=0.0609
        )
    )
    tiny.scattered(vae, 4)
    return Sd3Model(
        transformer=network(),
        clip_l=clip(1, "clip_l"),
        clip_g=clip(2, "clip_g"),
        t5=T5Reader(t5, PromptTokenizer(tiny.tokenizer(), start=None, end=1, padding=0)) if "t5" in roles else None,
        vae=vae,
        sampling=SAMPLING,
        defaults=replace(DEFAULTS["3.5-large"], width=64, height=64, steps=2, text_tokens=7),
        variant="tiny",
        source="tiny",
        device=torch.device("cpu"),
    )


ALL = ("clip_l", "clip_g", "t5")
PROMPT = "a red fox in the snow"
CLIP_TOKENS = tiny.CLIP.positions


def conditioned(given: Sd3Model, prompt: str = PROMPT) -> Sd3Conditioning:
    job = Request(prompt=prompt).complete(given.defaults, seed=0)
    with torch.inference_mode():
        return given.condition(prompt, job, negative=False)


def where(text: Tensor) -> dict[str, Tensor]:
    """What each encoder has in the sequence, and the padding beside the CLIPs."""
    clips, t5 = text[:, :CLIP_TOKENS], text[:, CLIP_TOKENS:]
    return {"clip_l": clips[..., :16], "clip_g": clips[..., 16:40], "t5": t5, "beside": clips[..., 40:]}


@pytest.mark.parametrize("left_out", [("clip_l",), ("clip_g",), ("t5",), ("clip_l", "t5"), ("clip_g", "t5")])
def test_an_encoder_that_is_left_out_gives_zeros_in_its_place(left_out: tuple[str, ...]) -> None:
    whole, part = conditioned(model(*ALL)), conditioned(model(*(role for role in ALL if role not in left_out)))
    assert part.text.shape == whole.text.shape == (1, CLIP_TOKENS + 7, 48)
    assert not where(whole.text)["beside"].any()
    for name, states in where(part.text).items():
        wanted = where(whole.text)[name]
        assert torch.equal(states, torch.zeros_like(wanted) if name in left_out else wanted), name
    for name, here in (("clip_l", slice(0, 16)), ("clip_g", slice(16, 40))):
        wanted = whole.pooled[:, here]
        assert torch.equal(part.pooled[:, here], torch.zeros_like(wanted) if name in left_out else wanted)


def test_t5_alone_stands_behind_what_both_clips_would_give() -> None:
    """Of the published ones' 77 tokens: what is not there cannot say how many it has."""
    alone, whole = conditioned(model("t5")), conditioned(model(*ALL))
    assert alone.text.shape == (1, 77 + 7, 48)
    assert not alone.text[:, :77].any()
    assert not alone.pooled.any()
    assert torch.equal(alone.text[:, 77:], where(whole.text)["t5"])
    assert alone.pooled.shape == whole.pooled.shape


def test_emphasis_is_for_the_clips_and_t5_reads_the_prompt_as_it_stands() -> None:
    made, weighted = model(*ALL), "a (red:1.5) fox in the snow"
    plain, emphasised = where(conditioned(made).text), where(conditioned(made, weighted).text)
    assert made.clip_l is not None
    assert made.t5 is not None
    for name, reader in (("clip_l", made.clip_l), ("clip_g", made.clip_g)):
        assert reader is not None
        with torch.inference_mode():
            wanted = encode(weighted, reader.encoder, reader.tokenizer, lambda states: states.hidden[-2]).text
        assert torch.equal(emphasised[name], wanted)
        changed = (plain[name] != emphasised[name]).any(dim=-1)[0]
        assert changed.nonzero().flatten().tolist() == [2]  # red, after the start and "a"
    with torch.inference_mode():
        ids = made.t5.tokenizer(weighted, 7)
        assert torch.equal(emphasised["t5"], made.t5.encoder(ids))
    assert not torch.equal(plain["t5"], emphasised["t5"])


def drawn(given: Sd3Model, prompt: str = PROMPT, *, batched: bool = True, **fields: object) -> Image.Image:
    request = Request.from_dict({"prompt": prompt, "seed": 1, "cfg_scale": 3.0, **fields})
    *_, picture = stream(given, request, batched_guidance=batched)
    assert isinstance(picture, Picture)
    return picture.image


def test_a_prompt_longer_than_clip_reads_is_guided_against_a_short_one() -> None:
    """Their sequences differ in length; neither is cut."""
    long = "a red fox in the snow on the blue snow in the red snow " * 2
    made = model(*ALL)
    assert conditioned(made, long).text.shape[1] > conditioned(made).text.shape[1]
    for prompt in (long, PROMPT):
        at_once, apart = (
            drawn(made, prompt, negative_prompt="a cat"),
            drawn(model(*ALL), prompt, negative_prompt="a cat", batched=False),
        )
        assert abs(np.asarray(at_once, dtype=int) - np.asarray(apart, dtype=int)).max() <= 1
    assert drawn(made, long) != drawn(made)


def test_sides_end_where_the_positions_do() -> None:
    made = model(*ALL)
    assert made.defaults.largest == 8 * 16
    with pytest.raises(
        RequestError, match="width: got 144; allowed: at most 128: this model knows no positions beyond"
    ):
        drawn(made, width=144)
    with pytest.raises(RequestError, match="height: got 72; allowed: multiples of 16"):
        drawn(made, height=72)
    assert drawn(made, width=128, height=16).size == (128, 16)
    for config, largest in ((MEDIUM, 3072), (MEDIUM_3_5, 6144), (LARGE, 3072)):
        assert config.positions * 16 == largest


def test_clip_skip_counts_from_the_end() -> None:
    made = model(*ALL)
    assert drawn(made, clip_skip=1) != drawn(made)
    assert drawn(made, clip_skip=2) == drawn(made)
    with pytest.raises(RequestError, match="1 to 2, the number of layers"):
        drawn(made, clip_skip=3)


def test_the_shift_is_the_checkpoint_s_unless_a_request_says_otherwise() -> None:
    made = model(*ALL)
    for given, shift in ((None, 3.0), (1.0, 1.0)):
        job = Request(prompt="", shift=given, steps=4, schedule="linear").complete(made.defaults, seed=0)
        times = [level.time for level in made.levels(job).path]
        assert times == pytest.approx([shift * t / (1 + (shift - 1) * t) for t in (1.0, 0.75, 0.5, 0.25, 0.0)])


def test_without_any_encoder_there_is_no_model() -> None:
    present = {"transformer", "vae"}
    assert [role.name for role in FAMILY.lacking(present)] == list(ALL)
    assert not FAMILY.lacking(present | {"clip_g"})
    assert [role.name for role in FAMILY.lacking({"t5"})] == ["transformer", "vae"]
    assert [role.name for role in FAMILY.left_out(present | {"clip_g"})] == ["clip_l", "t5"]
