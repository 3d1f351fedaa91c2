"""Tiny random Hunyuan-DiT pipelines, saved by diffusers: the same layers, conditioning and pictures here.

Off the square, diffusers 0.42 departs from the authors twice: it ends its grid of positions a little early where the
grid does not begin at 0 (their numpy.linspace without its end, spelt out wrongly), and it tells 1.1 heights first. The
grid is mended here for such pictures, and sizes are handed to it in the authors' order.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HunyuanDiTPipeline,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed_from_grid
from diffusers.pipelines.hunyuandit import pipeline_hunyuandit
from PIL import Image
from test_tokenizers import PROMPTS, published
from test_unets import assert_near, assert_same
from tiny_hunyuan import SCHEDULE, hunyuan
from torch import Tensor
from transformers import BertTokenizer, T5Tokenizer

import calotype
from calotype.checkpoint.tokenizer_files import prompt_tokenizer, read_tokenizer, sentencepiece_tokenizer
from calotype.families.hunyuan_dit import DEFAULTS, HunyuanModel
from calotype.families.hunyuan_dit.config import HunyuanConfig
from calotype.families.hunyuan_dit.keys import TRANSFORMER
from calotype.families.hunyuan_dit.network import THETA, HunyuanNetwork, positions
from calotype.loading import convert, describe
from calotype.nn import quantized
from calotype.nn.rope import rope_table

PROMPT, NEGATIVE = "a red fox in the snow", "blue dog"
CHINESE = "一只红色的狐狸在雪地里, a red fox in the snow"
SQUARE: dict[str, Any] = {"width": 64, "height": 64}
WIDE: dict[str, Any] = {"width": 96, "height": 64}
JOB = calotype.Request(prompt="").complete(DEFAULTS, seed=0)  # conditioning asks nothing of it
SCHEDULERS: dict[str, Any] = {
    "ddpm": None,
    "ddpm-trailing-zero-snr": DDPMScheduler(
        **SCHEDULE, clip_sample=False, timestep_spacing="trailing", rescale_betas_zero_snr=True
    ),
    "ddim": DDIMScheduler(**SCHEDULE, clip_sample=False, steps_offset=1),
    "euler": EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing"),
    "dpmpp-2m": DPMSolverMultistepScheduler(**SCHEDULE),
}


def load(folder: Path) -> HunyuanModel:
    model = calotype.load(folder, device="cpu").family
    assert isinstance(model, HunyuanModel)
    return model


def draw(pipeline: Any, prompt: str = PROMPT, **settings: Any) -> Image.Image:
    generator = torch.Generator().manual_seed(5)
    return pipeline(prompt, generator=generator, use_resolution_binning=False, **settings).images[0]


@pytest.mark.parametrize("styled", [True, False], ids=["1.1", "1.2"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_hunyuan_draws_diffusers_picture(name: str, styled: bool, tmp_path: Path) -> None:
    pipeline = hunyuan(tmp_path, styled=styled, scheduler=SCHEDULERS[name])
    settings: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 4.0, "negative_prompt": NEGATIVE}
    reference = draw(pipeline, **SQUARE, **settings)
    model = calotype.load(tmp_path, device="cpu")
    picture = model.generate(PROMPT, seed=5, **SQUARE, steps=6, cfg_scale=4.0, negative_prompt=NEGATIVE)
    assert_same(picture, reference)
    assert model.name == ("hunyuan_dit/1.1" if styled else "hunyuan_dit/1.2")


def rotations(width: int, corners: Any, tokens: tuple[int, int], **_: object) -> tuple[Tensor, Tensor]:
    """diffusers' table on the authors' grid."""
    (top, left), (bottom, right) = corners
    rows = np.linspace(top, bottom, tokens[0], endpoint=False, dtype=np.float32)
    columns = np.linspace(left, right, tokens[1], endpoint=False, dtype=np.float32)
    grid = torch.from_numpy(np.stack(np.meshgrid(columns, rows)))
    table = get_2d_rotary_pos_embed_from_grid(width, grid[:, None], use_real=True)
    assert isinstance(table, tuple)
    return table


@pytest.mark.parametrize("size", [WIDE, {"width": 64, "height": 112}], ids=["wide", "tall"])
def test_off_the_square(size: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_hunyuandit, "get_2d_rotary_pos_embed", rotations)
    pipeline = hunyuan(tmp_path, styled=True)
    model = calotype.load(tmp_path, device="cpu")
    seen = (size["width"], size["height"])
    reference = draw(pipeline, **size, num_inference_steps=3, guidance_scale=5.0, target_size=seen)
    assert_same(model.generate(PROMPT, seed=5, **size, steps=3, cfg_scale=5.0), reference)
    told = {"original_size": (300, 200), "crops_coords_top_left": (8, 16), "target_size": (128, 80)}
    reference = draw(pipeline, **size, num_inference_steps=3, guidance_scale=5.0, **told)
    mine = {"original_width": 300, "original_height": 200, "crop_left": 8, "crop_top": 16}
    mine |= {"target_width": 128, "target_height": 80}
    assert_same(model.generate(PROMPT, seed=5, **size, steps=3, cfg_scale=5.0, **mine), reference)


@pytest.mark.parametrize(
    ("rows", "columns"), [(64, 64), (80, 80), (48, 64), (64, 48), (48, 80), (3, 64), (5, 7), (1, 1)]
)
def test_positions_are_the_authors(rows: int, columns: int) -> None:
    corners = pipeline_hunyuandit.get_resize_crop_region_for_grid((rows, columns), 32)
    cos, sin = rotations(88, corners, (rows, columns))
    table = rope_table(positions(rows, columns), (44, 44), THETA)
    # They hold each angle twice, for both channels of a pair.
    assert (table[0] - cos[:, ::2]).abs().max() < 1e-5
    assert (table[1] - sin[:, ::2]).abs().max() < 1e-5


def test_one_step_without_guidance(tmp_path: Path) -> None:
    pipeline = hunyuan(tmp_path, styled=False)
    reference = draw(pipeline, **SQUARE, num_inference_steps=2, guidance_scale=1.0)
    assert_same(calotype.load(tmp_path).generate(PROMPT, seed=5, **SQUARE, steps=2, cfg_scale=1.0), reference)


@pytest.mark.parametrize("styled", [True, False], ids=["1.1", "1.2"])
def test_networks(styled: bool, tmp_path: Path) -> None:
    """The transformer at several levels with prompts of different lengths, and the autoencoder."""
    pipeline, model = hunyuan(tmp_path, styled=styled), load(tmp_path)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 8, 8, generator=rng)
    text, t5 = torch.randn(2, 77, 32, generator=rng), torch.randn(2, 256, 48, generator=rng)
    mask = torch.arange(77 + 256)[None] % 77 < torch.tensor([[9], [40]])
    sizes = torch.tensor([[1024.0, 900.0, 64.0, 48.0, 3.0, 5.0], [512.0, 512.0, 64.0, 64.0, 0.0, 0.0]])
    times = (981.0, 401.0, 1.0)
    with torch.inference_mode():
        prepared = model.transformer.prepare(text, t5, mask, sizes if styled else None, torch.tensor(times), 4, 4)
        answers: list[Tensor] = []
        for number, time in enumerate(times):
            reference = pipeline.transformer(
                x.expand(2, -1, -1, -1),
                torch.tensor([time, time]),
                encoder_hidden_states=text,
                text_embedding_mask=mask[:, :77],
                encoder_hidden_states_t5=t5,
                text_embedding_mask_t5=mask[:, 77:],
                image_meta_size=sizes,
                style=torch.zeros(2, dtype=torch.long),
                image_rotary_emb=rotations(24, ((0, 0), (32, 32)), (4, 4)),
            ).sample
            answers.append(model.transformer(x, prepared, number))
            assert_near(answers[-1], reference)
        # All that was prepared counts.
        assert (answers[0] - answers[1]).abs().max() > 0.01 * answers[0].abs().max()
        assert (answers[0][0] - answers[0][1]).abs().max() > 0.01 * answers[0].abs().max()

        picture = torch.rand(1, 3, 64, 64, generator=rng)
        encoded = pipeline.vae.encode(picture * 2 - 1).latent_dist.mode() * pipeline.vae.config.scaling_factor
        assert_near(model.encode(picture), encoded)
        decoded = pipeline.vae.decode(encoded / pipeline.vae.config.scaling_factor).sample / 2 + 0.5
        assert_near(model.decode(encoded), decoded)


def assert_conditioning(pipeline: Any, model: HunyuanModel, prompt: str) -> None:
    with torch.inference_mode():
        text, _, mask, _ = pipeline.encode_prompt(prompt, text_encoder_index=0)
        t5, _, t5_mask, _ = pipeline.encode_prompt(prompt, text_encoder_index=1)
        ours = model.condition(prompt, JOB, negative=False)
    assert_near(ours.text, text)
    assert_near(ours.t5, t5)
    assert torch.equal(ours.mask, torch.cat([mask, t5_mask], dim=1).bool())
    assert 0 < ours.mask.sum() <= ours.mask.numel()


@pytest.mark.parametrize("prompt", ["", PROMPT, "a red apple, " * 60])
def test_conditioning(prompt: str, tmp_path: Path) -> None:
    assert_conditioning(hunyuan(tmp_path, styled=False), load(tmp_path), prompt)


def test_a_chinese_prompt_with_the_real_tokenizers(tmp_path: Path) -> None:
    """Among them files as the authors have them: vocab.txt and spiece.model."""
    words, pieces = published("hunyuan_dit", "tokenizer"), published("hunyuan_dit", "tokenizer_t5")
    tokenizers = BertTokenizer.from_pretrained(words), T5Tokenizer.from_pretrained(pieces)
    pipeline = hunyuan(tmp_path, styled=True, tokenizers=tokenizers)
    model = load(tmp_path)
    assert_conditioning(pipeline, model, CHINESE)
    reference = draw(pipeline, CHINESE, **SQUARE, num_inference_steps=3, guidance_scale=4.0, negative_prompt="模糊")
    settings: dict[str, Any] = {"seed": 5, **SQUARE, "steps": 3, "cfg_scale": 4.0, "negative_prompt": "模糊"}
    assert_same(calotype.load(tmp_path).generate(CHINESE, **settings), reference)

    for folder, source, names in (("tokenizer", words, ("vocab.txt",)), ("tokenizer_2", pieces, ("spiece.model",))):
        for file in (tmp_path / folder).iterdir():
            file.unlink()
        for name in names:
            (tmp_path / folder / name).write_bytes((source / name).read_bytes())
    model = load(tmp_path)
    assert (model.bert_tokenizer.words("狐狸"), model.t5_tokenizer.words("狐狸")) == (
        [4316, 4329],
        [259, 82791, 220520],
    )
    assert_conditioning(pipeline, model, CHINESE)


def test_bert_equals_transformers_on_500_prompts() -> None:
    folder = published("hunyuan_dit", "tokenizer")
    found = read_tokenizer(folder)
    assert found is not None
    mine, theirs = prompt_tokenizer(found, folder, "bert", 47020, {}), BertTokenizer.from_pretrained(folder)
    assert (mine.start, mine.end, mine.padding) == (101, 102, 0)
    assert len(PROMPTS) >= 500
    wanted = theirs(PROMPTS, padding="max_length", max_length=77, truncation=True)
    for prompt, ids, seen in zip(PROMPTS, wanted.input_ids, wanted.attention_mask, strict=True):
        made, mask = mine.masked(prompt, 77)
        assert made.tolist() == [ids], prompt
        assert mask.int().tolist() == [seen], prompt


def test_mt5_equals_transformers_on_400_prompts() -> None:
    """But for control characters, at which transformers 5 cuts words, marks in a prompt, which sentencepiece does not
    know, marks combining with what stands apart or with marks, and long rows of one character, cut at another place.
    """
    folder = published("hunyuan_dit", "tokenizer_t5")
    mine = sentencepiece_tokenizer(folder, "t5", 250112)
    assert mine is not None
    assert (mine.start, mine.end, mine.padding) == (None, 1, 0)
    theirs = T5Tokenizer.from_pretrained(folder)
    controls = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u200e\u202e\u2028\u2029\ufeff]")
    plain = [prompt for prompt in PROMPTS if not controls.search(prompt)]
    assert len(plain) > 400
    wanted = theirs(plain, padding="max_length", max_length=256, truncation=True)
    wrong: list[str] = []
    for prompt, ids, seen in zip(plain, wanted.input_ids, wanted.attention_mask, strict=True):
        made, mask = mine.masked(prompt, 256)
        if made.tolist() != [ids] or mask.int().tolist() != [seen]:
            wrong.append(prompt)
    assert all(re.search(r"<pad>|!{200}|[\u0301\u0308\u0327\u3099\u309a]", prompt) for prompt in wrong)
    assert len(wrong) < 8


def originals(state: dict[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """diffusers' transformer under Tencent's names."""

    def stacked(prefix: str, names: str, leaf: str) -> Tensor:
        return torch.cat([state[f"{prefix}to_{name}.{leaf}"] for name in names])

    found = {"text_embedding_padding": state["text_embedding_padding"]}
    plain = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out": "final_layer.linear",
        "text_embedder.linear_1": "mlp_t5.0",
        "text_embedder.linear_2": "mlp_t5.2",
    }
    for name in ("timestep_embedder.linear_", "extra_embedder.linear_"):
        for theirs, number in ((1, 0), (2, 2)):
            tencents = "t_embedder.mlp." if name.startswith("time") else "extra_embedder."
            plain[f"time_extra_emb.{name}{theirs}"] = f"{tencents}{number}"
    plain |= {f"time_extra_emb.pooler.{x}_proj": f"pooler.{x}_proj" for x in "kqvc"}
    for number in range(blocks):
        block = f"blocks.{number}."
        for theirs, tencents in (
            ("norm1.norm", "norm1"),
            ("norm1.linear", "default_modulation.1"),
            ("norm2", "norm3"),
            ("norm3", "norm2"),
            ("attn1.norm_q", "attn1.q_norm"),
            ("attn1.norm_k", "attn1.k_norm"),
            ("attn1.to_out.0", "attn1.out_proj"),
            ("attn2.to_q", "attn2.q_proj"),
            ("attn2.norm_q", "attn2.q_norm"),
            ("attn2.norm_k", "attn2.k_norm"),
            ("attn2.to_out.0", "attn2.out_proj"),
            ("ff.net.0.proj", "mlp.fc1"),
            ("ff.net.2", "mlp.fc2"),
            ("skip_norm", "skip_norm"),
            ("skip_linear", "skip_linear"),
        ):
            if f"{block}{theirs}.weight" in state:
                plain[block + theirs] = block + tencents
        for leaf in ("weight", "bias"):
            found[f"{block}attn1.Wqkv.{leaf}"] = stacked(f"{block}attn1.", "qkv", leaf)
            found[f"{block}attn2.kv_proj.{leaf}"] = stacked(f"{block}attn2.", "kv", leaf)
    for theirs, tencents in plain.items():
        found |= {f"{tencents}.{leaf}": state[f"{theirs}.{leaf}"] for leaf in ("weight", "bias")}
    for leaf in ("weight", "bias"):
        scale, shift = state[f"norm_out.linear.{leaf}"].chunk(2)
        found[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat([shift, scale])
    found["pooler.positional_embedding"] = state["time_extra_emb.pooler.positional_embedding"]
    if "time_extra_emb.style_embedder.weight" in state:
        found["style_embedder.weight"] = state["time_extra_emb.style_embedder.weight"]
    return found


def save_as_tencent(pipeline: Any, source: Path, root: Path, *, weights: str = "ema", wrapped: bool = False) -> Path:
    """A tree as the authors' t2i/: their pickles, each encoder under the names that it has there."""
    for folder in ("model", "clip_text_encoder", "mt5", "sdxl-vae-fp16-fix", "tokenizer"):
        (root / folder).mkdir(parents=True)
    state: Any = originals(dict(pipeline.transformer.state_dict()), pipeline.transformer.config.num_layers)
    assert sum(tensor.numel() for tensor in state.values()) == pipeline.transformer.num_parameters()
    torch.save({weights: state} if wrapped else state, root / "model" / f"pytorch_model_{weights}.pt")
    bert = {f"bert.{key}": value for key, value in pipeline.text_encoder.state_dict().items() if "pooler" not in key}
    bert |= {"logit_scale": torch.tensor(2.0), "text_projection": torch.zeros(32, 32)}
    bert |= {"visual.class_embedding": torch.zeros(8), "visual.transformer.resblocks.0.ln_1.weight": torch.zeros(8)}
    torch.save(bert, root / "clip_text_encoder" / "pytorch_model.bin")
    mt5 = dict(pipeline.text_encoder_2.state_dict())
    mt5["encoder.embed_tokens.weight"] = mt5["shared.weight"]
    mt5 |= {"lm_head.weight": torch.zeros(32, 48), "decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(3)}
    torch.save(mt5, root / "mt5" / "pytorch_model.bin")
    torch.save(dict(pipeline.vae.state_dict()), root / "sdxl-vae-fp16-fix" / "diffusion_pytorch_model.bin")
    for place, here in (("text_encoder", "clip_text_encoder"), ("text_encoder_2", "mt5"), ("vae", "sdxl-vae-fp16-fix")):
        (root / here / "config.json").write_bytes((source / place / "config.json").read_bytes())
    for place, here in (("tokenizer", "tokenizer"), ("tokenizer_2", "mt5")):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (root / here / name).write_bytes((source / place / name).read_bytes())
    return root


def assert_equal(a: Any, b: Any) -> None:
    """The same networks, bit for bit."""
    for name in ("transformer", "bert", "t5", "vae"):
        one, other = (getattr(model, name).state_dict() for model in (a, b))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


@pytest.mark.parametrize("styled", [True, False], ids=["1.1", "1.2"])
def test_tencents_own_files(styled: bool, tmp_path: Path) -> None:
    """The same weights, bit for bit, as from the diffusers folder, and its picture: the schedule is its version's."""
    last = 0.03 if styled else 0.018
    scheduler = DDPMScheduler(**{**SCHEDULE, "beta_end": last}, steps_offset=1, clip_sample=False)
    pipeline = hunyuan(tmp_path / "diffusers", styled=styled, scheduler=scheduler)
    settings: dict[str, Any] = {"seed": 3, **WIDE, "steps": 3}
    model = calotype.load(tmp_path / "diffusers")
    same, wanted = model.family, model.generate(PROMPT, **settings)
    for name, options in (("plain", {}), ("trained", {"weights": "module", "wrapped": True})):
        root = save_as_tencent(pipeline, tmp_path / "diffusers", tmp_path / name, **options)
        model = calotype.load(root)
        assert model.name == ("hunyuan_dit/1.1" if styled else "hunyuan_dit/1.2")
        assert_equal(model.family, same)
        assert_same(model.generate(PROMPT, **settings), wanted)
    # All of it as a diffusers folder, with mT5's tokenizer and the version's own schedule.
    convert(tmp_path / "plain", tmp_path / "converted", "diffusers")
    assert_equal(load(tmp_path / "converted"), same)
    assert_same(calotype.load(tmp_path / "converted").generate(PROMPT, **settings), wanted)
    again = HunyuanDiTPipeline.from_pretrained(tmp_path / "converted")
    assert again.scheduler.config.beta_end == last
    assert again.transformer.config.use_style_cond_and_image_meta_size == styled
    # Both copies beside one another: the averaged one is taken, as by the authors.
    (tmp_path / "plain" / "model" / "pytorch_model_module.pt").write_bytes(
        (tmp_path / "trained" / "model" / "pytorch_model_module.pt").read_bytes()
    )
    assert "ema" in str(describe(tmp_path / "plain").parts)
    assert_equal(load(tmp_path / "plain"), same)


def test_conversion_there_and_back(tmp_path: Path) -> None:
    hunyuan(tmp_path / "a", styled=True)
    convert(tmp_path / "a", tmp_path / "b", "original")
    convert(tmp_path / "b", tmp_path / "c", "diffusers")
    a, b, c = (load(tmp_path / name) for name in "abc")
    assert_equal(a, b)
    assert_equal(a, c)
    assert a.diffusion.process == c.diffusion.process
    texts = [model.condition(PROMPT, JOB, negative=False).text for model in (a, b, c)]
    assert_near(texts[1], texts[0])
    assert_near(texts[2], texts[0])


def test_a_picture_to_start_from(tmp_path: Path) -> None:
    """diffusers has no such pipeline for Hunyuan-DiT: its networks, the same noise and DDIM's formula, spelt out."""
    pipeline = hunyuan(tmp_path, styled=False)
    model = calotype.load(tmp_path)
    begun = draw(pipeline, **SQUARE, num_inference_steps=4, guidance_scale=3.0)
    settings: dict[str, Any] = {"sampler": "ddim", "schedule": "trailing", "steps": 4, "cfg_scale": 1.0, **SQUARE}
    picture = model.generate("a blue dog", seed=7, input_image=begun, denoising_strength=0.6, **settings)

    bars = pipeline.scheduler.alphas_cumprod.double()
    visited = [599, 449, 299, 149]
    with torch.inference_mode():
        text, _, mask, _ = pipeline.encode_prompt("a blue dog", text_encoder_index=0)
        t5, _, t5_mask, _ = pipeline.encode_prompt("a blue dog", text_encoder_index=1)
        pixels = torch.from_numpy(np.array(begun)).permute(2, 0, 1)[None].float() / 127.5 - 1
        x = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
        x = pipeline.scheduler.add_noise(x, noise, torch.tensor([visited[0]]))
        for time, then in zip(visited, [*visited[1:], None], strict=True):
            v, _ = pipeline.transformer(
                x,
                torch.tensor([float(time)]),
                encoder_hidden_states=text,
                text_embedding_mask=mask,
                encoder_hidden_states_t5=t5,
                text_embedding_mask_t5=t5_mask,
                image_rotary_emb=rotations(24, ((0, 0), (32, 32)), (4, 4)),
            ).sample.chunk(2, dim=1)
            bar, after = float(bars[time]), 1.0 if then is None else float(bars[then])
            clean = bar**0.5 * x - (1 - bar) ** 0.5 * v
            rest = bar**0.5 * v + (1 - bar) ** 0.5 * x
            x = after**0.5 * clean + (1 - after) ** 0.5 * rest
        decoded = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample
        images: Any = pipeline.image_processor.postprocess(decoded)
    assert_same(picture, images[0])
    assert np.abs(np.asarray(picture, dtype=int) - np.asarray(begun, dtype=int)).mean() > 3


def diffsynth_network(**settings: int) -> Any:  # noqa: ANN401
    """DiffSynth-Studio's own transformer, which reads Tencent's names. Its package does not import with transformers 5:
    the two files needed are loaded alone.
    """
    spec = importlib.util.find_spec("diffsynth")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs diffsynth: pip install --no-deps diffsynth==1.1.9")
    folder = Path(next(iter(spec.submodule_search_locations))) / "models"
    stand_in = ModuleType("diffsynth_alone")
    stand_in.__path__ = [str(folder)]
    sys.modules["diffsynth_alone"] = stand_in
    try:
        own: Any = importlib.import_module("diffsynth_alone.hunyuan_dit")
    finally:
        for name in [name for name in sys.modules if name.startswith("diffsynth_alone")]:
            del sys.modules[name]
    return own.HunyuanDiT(**settings)


def test_the_original_layout_is_what_diffsynth_reads() -> None:
    """At the published width (theirs cannot be narrower), with four blocks."""
    theirs = diffsynth_network(num_layers_down=3, num_layers_up=1, t5_dim=64)
    config = HunyuanConfig(
        channels_in=4,
        channels_out=8,
        patch=2,
        width=1408,
        heads=16,
        mlp_width=6144,
        blocks=4,
        text_width=1024,
        text_tokens=77,
        t5_width=64,
        t5_tokens=256,
        pooled_width=1024,
        styled=True,
    )
    layout = TRANSFORMER.layout("original")
    assert layout is not None
    network, binding = TRANSFORMER.bind(layout, config)
    assert isinstance(network, HunyuanNetwork)
    rng = torch.Generator().manual_seed(0)
    state = {key: torch.empty(shape).normal_(0, 0.03, generator=rng) for key, shape in binding.shapes.items()}
    with torch.no_grad():
        for key, tensor in state.items():
            if key.endswith("norm.weight") or re.search(r"norm\d\.weight", key):
                tensor += 1
    theirs.load_state_dict(theirs.state_dict_converter().from_civitai(state), assign=True)
    pieces = {item.ours: [state[source.key] for source in item.sources] for item in binding.bound}
    network.load_state_dict({key: torch.cat(parts) for key, parts in pieces.items()}, assign=True)
    x, text = torch.randn(1, 4, 8, 8, generator=rng), torch.randn(1, 77, 1024, generator=rng)
    t5, sizes = torch.randn(1, 256, 64, generator=rng), torch.tensor([[1024.0, 800.0, 64.0, 48.0, 7.0, 3.0]])
    mask = torch.arange(77 + 256)[None] % 77 < 30
    with torch.inference_mode():
        prepared = network.prepare(text, t5, mask, sizes, torch.tensor([700.0]), 4, 4)
        reference = theirs(
            x,
            text,
            t5,
            mask[:, :77],
            mask[:, 77:],
            torch.tensor([700.0]),
            sizes,
            rotations(88, ((0, 0), (32, 32)), (4, 4)),
        )
        assert_near(network(x, prepared, 0)[:, :4], reference)


@pytest.mark.parametrize("memory", ["components", "stream"])
def test_lower_rungs_of_memory_draw_the_same_picture(memory: str, tmp_path: Path) -> None:
    hunyuan(tmp_path, styled=True)
    settings: dict[str, Any] = {"seed": 3, **SQUARE, "steps": 2}
    wanted = calotype.load(tmp_path, memory="resident").generate(PROMPT, **settings)
    assert np.array_equal(calotype.load(tmp_path, memory=memory).generate(PROMPT, **settings), np.asarray(wanted))


@pytest.mark.parametrize(("bits", "error"), [("int8", 0.01), ("int4", 0.1)])
def test_storage_in_fewer_bits(bits: str, error: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transformer's answer and T5's states are off by no more than their matrices, a few layers on."""
    hunyuan(tmp_path, styled=True)
    monkeypatch.setattr(quantized, "LEAST", 256)
    exact, kept = calotype.load(tmp_path), calotype.load(tmp_path, storage={"transformer": bits, "t5": bits})
    assert set(kept.storage_errors) == {"transformer", "t5"}
    assert all(0 < found < error for found in kept.storage_errors.values())
    with torch.inference_mode():
        x, answers = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), list[Tensor]()
        for model in (exact.family, kept.family):
            assert isinstance(model, HunyuanModel)
            made = model.condition(PROMPT, JOB, negative=False)
            told = torch.tensor([[64, 64, 64, 64, 0, 0]])
            prepared = model.transformer.prepare(made.text, made.t5, made.mask, told, torch.tensor([400.0]), 4, 4)
            answers.append(model.transformer(x, prepared, 0))
    assert 0 < float((answers[0] - answers[1]).norm() / answers[0].norm()) < 20 * error
