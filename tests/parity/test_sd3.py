"""Tiny random Stable Diffusion 3 pipelines, saved by diffusers: the same layers and pictures here, in float32."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from PIL import Image
from safetensors.torch import save_file
from tiny_sd3 import CLIP_G, CLIP_L, LENGTH, POSITIONS, TEXT, VOCABULARY, build, clip
from torch import Tensor

import calotype
from calotype.checkpoint.autoencoders import AUTOENCODER
from calotype.checkpoint.detect import detect
from calotype.checkpoint.files import Weights
from calotype.cli.main import main
from calotype.families.sd3 import Sd3Model
from calotype.families.sd3.keys import TRANSFORMER
from calotype.request import Request
from calotype.sampling.levels import shifted

PROMPT, NEGATIVE = "a red fox on the table, two cats in snow", "blue dog"
WIDTH, HEIGHT, TOKENS = 96, 64, 24


class Pair(NamedTuple):
    theirs: StableDiffusion3Pipeline
    ours: calotype.Model  # type: ignore[type-arg]

    @property
    def family(self) -> Sd3Model:
        assert isinstance(self.ours.family, Sd3Model)
        return self.ours.family


def loaded(folder: Path, **form: object) -> Pair:
    return Pair(build(folder, **form), calotype.load(folder, device="cpu"))


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return loaded(tmp_path_factory.mktemp("medium"))


@pytest.fixture(scope="module")
def without_t5(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return loaded(tmp_path_factory.mktemp("without_t5"), with_t5=False)


@pytest.fixture(scope="module")
def medium_3_5(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return loaded(tmp_path_factory.mktemp("medium_3_5"), norms=True, dual=(0, 1))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return loaded(tmp_path_factory.mktemp("large"), norms=True)


FORMS = ("medium", "without_t5", "medium_3_5", "large")


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.getfixturevalue(request.param)


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-4 of the reference's largest value."""
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


def theirs_picture(pair: Pair, prompt: str = PROMPT, **settings: object) -> Image.Image:
    fixed = {"height": HEIGHT, "width": WIDTH, "max_sequence_length": TOKENS}
    made = pair.theirs(prompt, **{**fixed, **settings}, generator=torch.Generator().manual_seed(3))
    return made.images[0]


def ours_picture(pair: Pair, prompt: str = PROMPT, **fields: object) -> Image.Image:
    fixed = {"height": HEIGHT, "width": WIDTH, "text_tokens": TOKENS}
    made = pair.ours.generate(prompt, **{**fixed, **fields}, seed=3)
    assert isinstance(made, Image.Image)
    return made


def pixels(picture: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.int_]]:
    return np.asarray(picture.convert("RGB"), dtype=int)


def assert_same_picture(ours: Image.Image, theirs: Image.Image) -> None:
    a, b = pixels(ours), pixels(theirs)
    assert b.std() > 10, "the reference picture is flat: the test would prove nothing"
    assert abs(a - b).max() <= 1


@pytest.mark.parametrize("pair", FORMS, indirect=True)
def test_the_same_picture_with_guidance(pair: Pair) -> None:
    theirs = theirs_picture(pair, num_inference_steps=4, guidance_scale=4.0, negative_prompt=NEGATIVE)
    ours = ours_picture(pair, steps=4, cfg_scale=4.0, negative_prompt=NEGATIVE)
    assert_same_picture(ours, theirs)
    other = theirs_picture(pair, "two dogs", num_inference_steps=4, guidance_scale=4.0, negative_prompt=NEGATIVE)
    assert abs(pixels(other) - pixels(theirs)).max() > 10, "the prompt does not count: the test would prove little"


@pytest.mark.parametrize("pair", FORMS, indirect=True)
def test_the_same_picture_without_guidance(pair: Pair) -> None:
    for steps in (1, 4):
        theirs = theirs_picture(pair, num_inference_steps=steps, guidance_scale=0.0)
        assert_same_picture(ours_picture(pair, steps=steps, cfg_scale=1.0), theirs)


def test_t5_reads_256_tokens_unless_asked_otherwise(medium: Pair) -> None:
    """And CLIP's layers are chosen as elsewhere: diffusers counts from the last but one."""
    theirs = theirs_picture(medium, num_inference_steps=2, guidance_scale=1.0, max_sequence_length=256, clip_skip=1)
    assert_same_picture(ours_picture(medium, steps=2, cfg_scale=1.0, text_tokens=None, clip_skip=3), theirs)
    assert abs(pixels(theirs) - pixels(ours_picture(medium, steps=2, cfg_scale=1.0))).max() > 1


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_a_folder_s_shift_is_honoured(shift: float, tmp_path: Path) -> None:
    pair = loaded(tmp_path, scheduler=FlowMatchEulerDiscreteScheduler(shift=shift))
    theirs = theirs_picture(pair, num_inference_steps=3, guidance_scale=1.0)
    assert_same_picture(ours_picture(pair, steps=3, cfg_scale=1.0), theirs)


def test_a_folder_s_growing_shift_is_honoured(tmp_path: Path) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)
    pair = loaded(tmp_path, scheduler=scheduler)
    theirs = theirs_picture(pair, num_inference_steps=3, guidance_scale=1.0)
    assert_same_picture(ours_picture(pair, steps=3, cfg_scale=1.0), theirs)


@pytest.mark.parametrize("pair", ["medium", "without_t5"], indirect=True)
def test_conditioning(pair: Pair) -> None:
    job = Request(prompt=PROMPT, text_tokens=TOKENS).complete(pair.family.defaults, seed=0)
    with torch.inference_mode():
        text, _, pooled, _ = pair.theirs.encode_prompt(
            PROMPT, PROMPT, PROMPT, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
        ours = pair.family.condition(PROMPT, job, negative=False)
    assert ours.text.shape == (1, LENGTH + TOKENS, TEXT)
    assert_near(ours.text, text)
    assert_near(ours.pooled, pooled)


def test_encoders(medium: Pair) -> None:
    rng = torch.Generator().manual_seed(0)
    end = VOCABULARY - 1
    ids = torch.randint(0, end, (3, LENGTH), generator=rng)
    ids[0, 5:] = end  # and padding with the same piece
    ids[1, -1] = end
    ids[2, 9] = end
    family = medium.family
    assert family.clip_l is not None
    assert family.clip_g is not None
    assert family.t5 is not None
    with torch.inference_mode():
        for ours, theirs in (
            (family.clip_l.encoder, medium.theirs.text_encoder),
            (family.clip_g.encoder, medium.theirs.text_encoder_2),
        ):
            mine, reference = ours(ids), theirs(ids, output_hidden_states=True)
            assert_near(mine.pooled, reference.text_embeds)
            for state, wanted in zip(mine.hidden[:-1], reference.hidden_states[:-1], strict=True):
                assert_near(state, wanted)
        assert_near(family.t5.encoder(ids), medium.theirs.text_encoder_3(ids).last_hidden_state)


@pytest.mark.parametrize("pair", FORMS, indirect=True)
@pytest.mark.parametrize(("rows", "columns"), [(5, 7), (POSITIONS, 3), (POSITIONS, POSITIONS)])
def test_transformer(pair: Pair, rows: int, columns: int) -> None:
    """At sizes whose crop of the position table is off its middle by a half, too."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16, 2 * rows, 2 * columns, generator=rng)
    text = torch.randn(2, 11, TEXT, generator=rng)
    pooled = torch.randn(2, CLIP_L + CLIP_G, generator=rng)
    with torch.inference_mode():
        theirs = pair.theirs.transformer(
            hidden_states=x,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=torch.full((2,), 630.0),
        ).sample
        network = pair.family.transformer
        prepared = network.prepare(text, pooled, torch.tensor([1.0, 0.63, 0.2]), rows, columns)
        assert_near(network(x, prepared, 1), theirs)
        # One row of latents for two prompts gives two answers.
        alone = network(x[:1], prepared, 1)
        again = pair.theirs.transformer(
            hidden_states=x[:1].expand(2, -1, -1, -1),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=torch.full((2,), 630.0),
        ).sample
        assert_near(alone, again)


def test_autoencoder(medium: Pair) -> None:
    rng = torch.Generator().manual_seed(2)
    picture, latent = torch.rand(2, 3, 48, 64, generator=rng), torch.randn(2, 16, 6, 8, generator=rng)
    theirs, ours = medium.theirs.vae, medium.family.vae
    scale, shift = theirs.config.scaling_factor, theirs.config.shift_factor
    with torch.inference_mode():
        mean = theirs.encode(picture * 2 - 1).latent_dist.mean
        assert_near(ours.encode(picture), (mean - shift) * scale)
        assert_near(ours.decode(latent), theirs.decode(latent / scale + shift).sample / 2 + 0.5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near(dtype: str, tmp_path: Path) -> None:
    """The same picture but for rounding: random networks magnify it, so the mean difference is what counts."""
    build(tmp_path, norms=True, dual=(0, 1))
    exact, half = (Pair(None, calotype.load(tmp_path, dtype=kind)) for kind in ("float32", dtype))  # type: ignore[arg-type]
    a, b = (pixels(ours_picture(pair, steps=2, cfg_scale=3.0)) for pair in (exact, half))
    assert abs(a - b).mean() < 8
    assert (a != b).any()


def test_what_a_model_does_without_is_said(
    without_t5: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = without_t5.family.source
    assert without_t5.ours.left_out.keys() == {"t5"}
    assert calotype.describe(source).note.startswith("runs; without t5 long prompts and written words are followed")
    words = ["generate", "a fox", "--model", source, "--steps", "1", "--width", "32", "--height", "32"]
    assert main([*words, "--out", str(tmp_path / "fox.png")]) == 0
    assert "calotype: note: without t5 long prompts and written words are followed" in capsys.readouterr().err


# ---- original files

PREFIXES = {
    "transformer": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}
LAYOUTS = {"transformer": (TRANSFORMER, "original"), "vae": (AUTOENCODER, "original")}
PACKED: dict[str, dict[str, tuple[str, ...]]] = {  # files, and the parts that each holds
    "separate encoders": {
        "sd3_medium": ("transformer", "vae"),
        "clip_l": ("text_encoder",),
        "clip_g": ("text_encoder_2",),
        "t5xxl_fp16": ("text_encoder_3",),
    },
    "with clips": {"sd3_medium_incl_clips": ("transformer", "vae", "text_encoder", "text_encoder_2")},
    "with clips, t5 apart": {
        "sd3_medium_incl_clips": ("transformer", "vae", "text_encoder", "text_encoder_2"),
        "t5xxl_fp16": ("text_encoder_3",),
    },
    "everything": {"sd3_medium_incl_clips_t5xxlfp16": tuple(PREFIXES)},
}


class Originals(NamedTuple):
    """A pipeline whose parts say no more of themselves than original files do, and those parts' tensors."""

    theirs: StableDiffusion3Pipeline
    folder: Path
    tensors: dict[str, dict[str, Tensor]]  # by component, without prefix

    def pack(self, folder: Path, packing: str) -> list[Path]:
        sources = [self.folder / name for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
        for name, parts in PACKED[packing].items():
            prefixes = {part: PREFIXES[part] if len(parts) > 1 else "" for part in parts}
            state = {prefixes[part] + key: value for part in parts for key, value in self.tensors[part].items()}
            save_file(state, folder / f"{name}.safetensors")
            sources.append(folder / f"{name}.safetensors")
        return sources


def originals(folder: Path, *, projected: bool, **more: object) -> Originals:
    theirs = build(folder, clip_l=clip(CLIP_L, seed=1, projected=projected), **more)
    tensors: dict[str, dict[str, Tensor]] = {}
    for component in PREFIXES:
        model = getattr(theirs, component)
        state = {key: value.clone() for key, value in model.state_dict().items()}  # T5's words under both names
        if component in LAYOUTS:
            part, name = LAYOUTS[component]
            weights = Weights.of(component, [folder / component / "diffusion_pytorch_model.safetensors"])
            (found,) = detect(weights, [part], (), dict(model.config)).found
            config = found.config()
            _, read = found.bind(config)
            layout = part.layout(name)
            assert layout is not None
            state = {key: value.contiguous() for key, value in part.bind(layout, config)[1].save(read.load(weights))}
        if component == "text_encoder" and not projected:
            del state["text_projection.weight"]
        tensors[component] = state
    return Originals(theirs, folder, tensors)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    """Of the form of SD3 medium: without norms, heads of 64; CLIP-L without projection, as published."""
    return originals(tmp_path_factory.mktemp("bare"), projected=False, head=64)


@pytest.fixture(scope="module")
def normed(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    """Of the form of SD3.5 medium, and with a projection that CLIP-L's file has."""
    return originals(tmp_path_factory.mktemp("normed"), projected=True, norms=True, dual=(0, 1))


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("form", ["bare", "normed"])
def test_original_files(form: str, packing: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """In every packing; a projection that a file lacks is the identity, one that it has is applied."""
    packed: Originals = request.getfixturevalue(form)
    ours = calotype.load(*packed.pack(tmp_path, packing), device="cpu")
    assert isinstance(ours.family, Sd3Model)
    assert ours.family.variant == ("medium" if form == "bare" else "3.5-medium")
    held = {part for parts in PACKED[packing].values() for part in parts}
    assert set(ours.left_out) == (set() if "text_encoder_3" in held else {"t5"})
    t5 = packed.theirs.text_encoder_3
    try:
        packed.theirs.text_encoder_3 = t5 if "text_encoder_3" in held else None
        pair = Pair(packed.theirs, ours)
        theirs = theirs_picture(pair, num_inference_steps=3, guidance_scale=4.0, negative_prompt=NEGATIVE)
    finally:
        packed.theirs.text_encoder_3 = t5
    assert_same_picture(ours_picture(pair, steps=3, cfg_scale=4.0, negative_prompt=NEGATIVE), theirs)


@pytest.mark.parametrize("form", ["bare", "normed"])
def test_original_names_are_those_that_diffusers_converts(form: str, request: pytest.FixtureRequest) -> None:
    """Its converter, made for Stability AI's files, gives back the tensors that it was."""
    packed: Originals = request.getfixturevalue(form)
    converted = convert_sd3_transformer_checkpoint_to_diffusers(dict(packed.tensors["transformer"]))
    wanted = packed.theirs.transformer.state_dict()
    assert converted.keys() == wanted.keys()
    assert all(torch.equal(converted[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("part", ["text_encoder_3", "transformer"])
def test_matrices_in_float8_are_widened(part: str, bare: Originals, tmp_path: Path) -> None:
    """As in sd3_medium_incl_clips_t5xxlfp8, T5's in one byte; or the transformer's, positions and norms too."""
    eighths = {
        key: value.to(torch.float8_e4m3fn) if value.ndim == 2 or part == "transformer" else value
        for key, value in bare.tensors[part].items()
    }
    sources = bare._replace(tensors={**bare.tensors, part: eighths}).pack(tmp_path, "everything")
    exact = bare._replace(tensors={**bare.tensors, part: {key: value.float() for key, value in eighths.items()}})
    (tmp_path / "exact").mkdir()
    wanted = calotype.load(*exact.pack(tmp_path / "exact", "everything"), dtype="float32")
    for dtype in ("float32", None):
        ours = calotype.load(*sources, dtype=dtype)
        assert isinstance(ours.family, Sd3Model)
        assert ours.family.t5 is not None
        encoder = ours.family.t5.encoder
        computes = ours.family.transformer.dtype if part == "transformer" else encoder.norm_out.weight.dtype
        assert computes == (torch.float32 if dtype else torch.bfloat16)
        pictures = (pixels(ours_picture(Pair(bare.theirs, each), steps=2, cfg_scale=1.0)) for each in (ours, wanted))
        a, b = pictures
        assert abs(a - b).max() <= 1 if dtype else abs(a - b).mean() < 8


# ---- a start from a picture


def test_a_start_from_a_picture(medium: Pair) -> None:
    """From latents, as the references draw from the autoencoder's spread and we take its middle; steps all taken."""
    rng = np.random.default_rng(5)
    small = Image.fromarray(rng.integers(0, 255, (4, 6, 3), dtype=np.uint8))
    picture = small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    steps, strength = 4, 0.6
    least = shifted(1 / 1000, 3.0)
    with torch.inference_mode():
        latents = medium.family.encode(calotype.image.to_tensor(picture)[None])
    pipeline = StableDiffusion3Img2ImgPipeline(**medium.theirs.components)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPT,
        image=latents,
        height=HEIGHT,
        width=WIDTH,
        strength=1.0,  # of the times given
        sigmas=np.linspace(least + (1 - least) * strength, least, steps).tolist(),
        guidance_scale=3.0,
        max_sequence_length=TOKENS,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    ours = ours_picture(medium, steps=steps, cfg_scale=3.0, input_image=picture, denoising_strength=strength)
    assert_same_picture(ours, theirs)


# ---- conversion


def test_there_and_back(medium_3_5: Pair, tmp_path: Path) -> None:
    calotype.loading.convert(medium_3_5.family.source, tmp_path / "original", "original")
    calotype.loading.convert(tmp_path / "original", tmp_path / "folder", "diffusers")
    wanted = pixels(ours_picture(medium_3_5, steps=2))
    for folder in ("original", "folder"):
        converted = Pair(medium_3_5.theirs, calotype.load(tmp_path / folder))
        assert np.array_equal(pixels(ours_picture(converted, steps=2)), wanted)
    again = StableDiffusion3Pipeline.from_pretrained(tmp_path / "folder")
    again.set_progress_bar_config(disable=True)
    theirs = (theirs_picture(Pair(each, medium_3_5.ours), num_inference_steps=2) for each in (again, medium_3_5.theirs))
    assert next(theirs) == next(theirs)


def test_a_single_file_becomes_a_folder_for_diffusers(bare: Originals, tmp_path: Path) -> None:
    """With the projection that CLIP-L's file leaves out, and without T5."""
    *tokenizers, file = bare.pack(tmp_path, "with clips")
    for folder in tokenizers:
        shutil.copytree(folder, tmp_path / "model" / folder.name)
    file.rename(tmp_path / "model" / file.name)
    calotype.loading.convert(tmp_path / "model", tmp_path / "folder", "diffusers")
    # The index says that these are not there; diffusers wants to hear it again.
    theirs = StableDiffusion3Pipeline.from_pretrained(tmp_path / "folder", text_encoder_3=None, tokenizer_3=None)
    theirs.set_progress_bar_config(disable=True)
    pair = Pair(theirs, calotype.load(tmp_path / "folder"))
    reference = theirs_picture(pair, num_inference_steps=2, guidance_scale=1.0)
    assert_same_picture(ours_picture(pair, steps=2, cfg_scale=1.0), reference)
