"""ControlNets of tiny random UNets, saved by diffusers: the same residuals and pictures here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
)
from PIL import Image
from safetensors.torch import save_file
from test_unets import NEGATIVE, PROMPT, SIZE, assert_near, assert_same
from tiny_flux import randomised
from tiny_unets import sd1, sdxl, unet

import calotype
from calotype.checkpoint.controlnets import CONTROLNET
from calotype.control.annotators import ANNOTATORS, annotate
from calotype.control.hints import Hint
from calotype.errors import RequestError, WrongShape
from calotype.families.unets import UNetModel, together, with_sizes
from calotype.generate.denoisers import seen_by
from calotype.generate.prompts import PromptCache
from calotype.generate.stages import planned
from calotype.image import opened as pictures_of
from calotype.image import to_tensor
from calotype.nn.controlnet import ControlNet
from calotype.nn.unet import UNet
from calotype.request import Control, HighRes, Region

HINTS = (8, 12, 16, 24)


def made(model: Any, seed: int, folder: Path) -> Any:  # noqa: ANN401
    randomised(model, seed, spread=0.12)
    model.save_pretrained(folder)
    return model


def controlnet(folder: Path, *, sdxl: bool, seed: int = 7, **more: Any) -> Any:  # noqa: ANN401
    net = unet(sdxl=sdxl, **more)
    return made(ControlNetModel.from_unet(net, conditioning_embedding_out_channels=HINTS), seed, folder)


def union(folder: Path, kinds: int = 8, **more: Any) -> Any:  # noqa: ANN401
    chosen: dict[str, Any] = {
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 32 + 48,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 40,
        "conditioning_embedding_out_channels": HINTS,
        "num_control_type": kinds,
        "num_trans_head": 8,
        **more,
    }
    width = chosen["block_out_channels"][0]
    chosen |= {"num_trans_channel": width, "num_proj_channel": width}
    return made(ControlNetUnionModel(**chosen), 9, folder)


def picture(seed: int) -> Image.Image:
    rng = torch.Generator().manual_seed(seed)
    noise = (torch.rand(8, 12, 3, generator=rng) * 255).byte().numpy()
    return Image.fromarray(noise).resize((SIZE["width"], SIZE["height"]), Image.Resampling.NEAREST)


def theirs(pipeline: Any, images: Any, **settings: Any) -> Image.Image:  # noqa: ANN401
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    fields = {"num_inference_steps": 6, "guidance_scale": 4.0, "negative_prompt": NEGATIVE, **SIZE, **settings}
    return pipeline(PROMPT, generator=generator, **fields, **images).images[0]


def ours(folder: Path, controls: list[Control], memory: str = "auto", **fields: Any) -> Image.Image:  # noqa: ANN401
    asked = {"steps": 6, "cfg_scale": 4.0, "negative_prompt": NEGATIVE, **SIZE, **fields}
    model = calotype.load(folder, device="cpu", memory=memory)
    drawn = model.generate(PROMPT, seed=5, controls=controls, **asked)
    assert isinstance(drawn, Image.Image)
    return drawn


def control(folder: Path, seed: int, kind: str = "none", **more: Any) -> Control:  # noqa: ANN401
    return Control(kind=kind, model=str(folder), image=picture(seed), **more)


def test_sd1_with_one_and_two(tmp_path: Path) -> None:
    parts = sd1(tmp_path / "sd1").components
    a, b = controlnet(tmp_path / "a", sdxl=False), controlnet(tmp_path / "b", sdxl=False, seed=8)
    one = StableDiffusionControlNetPipeline(**parts, controlnet=a, requires_safety_checker=False)
    reference = theirs(one, {"image": picture(1)}, controlnet_conditioning_scale=0.7)
    first = control(tmp_path / "a", 1, scale=0.7)
    for memory in ("resident", "components", "stream"):
        assert_same(ours(tmp_path / "sd1", [first], memory), reference)
    plain = ours(tmp_path / "sd1", [])
    with pytest.raises(AssertionError):
        assert_same(plain, reference)  # it does count
    both = StableDiffusionControlNetPipeline(
        **parts, controlnet=MultiControlNetModel([a, b]), requires_safety_checker=False
    )
    reference = theirs(
        both,
        {"image": [picture(1), picture(2)]},
        controlnet_conditioning_scale=[0.7, 0.4],
        control_guidance_start=[0.0, 0.3],
        control_guidance_end=[0.5, 1.0],
    )
    first, second = control(tmp_path / "a", 1, scale=0.7, end=0.5), control(tmp_path / "b", 2, scale=0.4, start=0.3)
    assert_same(ours(tmp_path / "sd1", [first, second]), reference)
    reference = theirs(one, {"image": picture(1)}, guidance_scale=1.0)
    assert_same(ours(tmp_path / "sd1", [control(tmp_path / "a", 1)], cfg_scale=1.0), reference)


@pytest.mark.parametrize("how", ["a setting", "a name"])
def test_one_for_shuffled_pictures(how: str, tmp_path: Path) -> None:
    """Its additions' means are added, and to the positive side alone."""
    heads: dict[str, Any] = {"attention_head_dim": 8, "block_out_channels": (64, 64, 64)}
    parts = sd1(tmp_path / "sd1", **heads).components
    net = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=HINTS)
    net.register_to_config(global_pool_conditions=True)
    made(net, 7, tmp_path / "a")
    source = tmp_path / "a"
    if how == "a name":  # as its authors publish it, with nothing else that tells
        source = as_published(tmp_path / "a", tmp_path / "control_v11e_sd15_Shuffle.pth")
    pipeline = StableDiffusionControlNetPipeline(**parts, controlnet=net, requires_safety_checker=False)
    reference = theirs(pipeline, {"image": picture(1)}, controlnet_conditioning_scale=0.7)
    led = [control(source, 1, scale=0.7)]
    for memory in ("resident", "stream"):
        assert_same(ours(tmp_path / "sd1", led, memory), reference)
    plain = ours(tmp_path / "sd1", [])
    with pytest.raises(AssertionError):
        assert_same(plain, reference)
    region = Region(prompt=PROMPT, mask=Image.new("L", (8, 8), 255))
    assert_same(ours(tmp_path / "sd1", led, regions=[region]), reference)
    assert_same(ours(tmp_path / "sd1", led, tiled=True, tile_size=96), reference)
    reference = theirs(pipeline, {"image": picture(1)}, guidance_scale=1.0)
    assert_same(ours(tmp_path / "sd1", [control(source, 1)], cfg_scale=1.0), reference)


def as_published(folder: Path, file: Path) -> Path:
    """A ControlNet for Stable Diffusion 1.x that diffusers saved, under its authors' names."""
    mine, layout = opened(folder), CONTROLNET.layout("original")
    assert layout is not None
    _, binding = CONTROLNET.bind(layout, mine.settings)
    torch.save(dict(binding.save(mine.state_dict())), file)
    return file


@pytest.mark.parametrize("memory", ["auto", "resident"])
def test_its_weights_are_views_of_its_file_where_the_models_are(memory: str, tmp_path: Path) -> None:
    sd1(tmp_path / "sd1")
    controlnet(tmp_path / "a", sdxl=False)
    model = calotype.load(tmp_path / "sd1", device="cpu", memory=memory)
    network = model.load_control(tmp_path / "a")
    assert isinstance(network, ControlNet)
    weight = network.conv_in.weight
    before = weight.clone()
    file = next((tmp_path / "a").glob("*.safetensors"))
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert torch.equal(weight, before) == (memory == "resident")


def test_a_pass_at_a_higher_resolution_is_led_by_the_picture_that_is_there(tmp_path: Path) -> None:
    """As two requests, the second of which starts from what the first drew; each picture by its own."""
    sd1(tmp_path / "sd1")
    controlnet(tmp_path / "a", sdxl=False)
    model: Any = calotype.load(tmp_path / "sd1", device="cpu")
    large: Any = {"width": 2 * SIZE["width"], "height": 2 * SIZE["height"], "tiled": True, "tile_size": 64}
    led = [Control(kind="none", model=str(tmp_path / "a"), scale=0.7)]
    fields: Any = {"steps": 3, "cfg_scale": 4.0, "count": 2, "seed": 5}
    asked = HighRes(**large, strength=0.6, steps=4, controls=tuple(led))
    for kind in ("none", "canny"):
        led = [replace(led[0], kind=kind)]
        passes = (replace(asked, controls=tuple(led)),)
        at_once = model.generate(PROMPT, high_res=passes, **SIZE, **fields)
        small = model.generate(PROMPT, **SIZE, **fields)
        for k in range(2):
            again = model.generate(
                PROMPT,
                **large,
                **fields | {"steps": 4, "count": 1, "seed": 5 + k},
                input_image=small[k],
                denoising_strength=0.6,
                controls=led,
            )
            assert np.array_equal(np.asarray(at_once[k]), np.asarray(again))
    plain = model.generate(PROMPT, high_res=(replace(asked, controls=()),), **SIZE, **fields)
    assert not np.array_equal(np.asarray(plain[0]), np.asarray(at_once[0]))
    with pytest.raises(RequestError, match=r"high_res\[0\].controls\[0\].kind: got 'cany'; allowed: one of canny"):
        model.generate(PROMPT, high_res=[{**large, "controls": [{"kind": "cany", "model": str(tmp_path / "a")}]}])


def test_what_counts_for_nothing_is_neither_drawn_nor_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sd1(tmp_path / "sd1")
    controlnet(tmp_path / "a", sdxl=False)
    plain = ours(tmp_path / "sd1", [], steps=2)

    def never(*given: object) -> None:
        raise AssertionError(given)

    monkeypatch.setattr(ControlNet, "embed", never)
    monkeypatch.setattr(ANNOTATORS["canny"], "draw", never)
    assert_same(ours(tmp_path / "sd1", [control(tmp_path / "a", 1, "canny", scale=0)], steps=2), plain)
    with pytest.raises(RequestError, match=r"controls\[0\].settings.low: got -1"):
        ours(tmp_path / "sd1", [control(tmp_path / "a", 1, "canny", scale=0, settings={"low": -1})])


def test_a_control_leads_some_step(tmp_path: Path) -> None:
    """Those that a pass has from the request need not: it has fewer steps."""
    sd1(tmp_path / "sd1")
    controlnet(tmp_path / "a", sdxl=False)
    led = control(tmp_path / "a", 1, start=0.3, end=0.5)
    with pytest.raises(RequestError, match=r"controls\[0\].end: got 0.5; .*none of 4 steps lies between start 0.3 and"):
        ours(tmp_path / "sd1", [led], steps=4)
    larger = HighRes(width=2 * SIZE["width"], height=2 * SIZE["height"], steps=2)
    ours(tmp_path / "sd1", [led], steps=6, high_res=[larger])
    with pytest.raises(RequestError, match=r"high_res\[0\].controls\[0\].end.*none of 2 steps"):
        ours(tmp_path / "sd1", [led], steps=6, high_res=[replace(larger, controls=(led,))])


def test_an_annotator_has_the_controls_settings(tmp_path: Path) -> None:
    """Which are kept with the picture, and checked before its network is loaded."""
    sd1(tmp_path / "sd1")
    controlnet(tmp_path / "a", sdxl=False)
    model = calotype.load(tmp_path / "sd1", device="cpu")
    led = Control(kind="canny", model=tmp_path / "a", image=picture(1), settings={"low": 10, "high": 20.5, "blur": 1})
    edges = annotate("canny", picture(1), low=10, high=20.5, blur=1)
    fields: Any = {"seed": 5, "steps": 2, **SIZE}
    drawn = model.generate(PROMPT, controls=[led], **fields)
    assert isinstance(drawn, Image.Image)
    ready = model.generate(PROMPT, controls=[replace(led, kind="none", image=edges, settings=None)], **fields)
    usual = model.generate(PROMPT, controls=[replace(led, settings={})], **fields)
    assert isinstance(ready, Image.Image)
    assert isinstance(usual, Image.Image)
    assert ready.tobytes() == drawn.tobytes() != usual.tobytes()
    picture(1).save(tmp_path / "shown.png")
    led = replace(led, image=tmp_path / "shown.png")
    again = model.generate(PROMPT, controls=[led], **fields)
    assert isinstance(again, Image.Image)
    calotype.save(again, tmp_path / "drawn.png")
    request, _ = calotype.read_metadata(tmp_path / "drawn.png")
    assert request.controls == (replace(led, image=str(tmp_path / "shown.png")),)
    repeated = model.generate(request)
    assert isinstance(repeated, Image.Image)
    assert repeated.tobytes() == drawn.tobytes()
    large = {"width": 2 * SIZE["width"], "height": 2 * SIZE["height"]}
    for wrong, said in (
        ({"kind": "cany"}, "kind: got 'cany'; allowed: one of canny"),
        ({"settings": {"lov": 3}}, "settings.lov: got 3; allowed: for canny, low, high, blur"),
        ({"settings": {"kind": "tile"}}, "settings.kind: got 'tile'; allowed: for canny"),
        ({"settings": {"low": 300}}, "settings.low: got 300; allowed: at most high, 200"),
        ({"kind": "none"}, "settings: got .*; allowed: None: a picture of the kind none is not drawn"),
    ):
        bad = replace(led, model="no such file", **wrong)
        with pytest.raises(RequestError, match=r"^controls\[0\]." + said):
            model.generate(PROMPT, controls=[bad])
        with pytest.raises(RequestError, match=r"^high_res\[0\].controls\[0\]." + said):
            model.generate(PROMPT, high_res=[{**large, "controls": [bad]}])


def test_sdxl(tmp_path: Path) -> None:
    parts = sdxl(tmp_path / "sdxl").components
    pipeline = StableDiffusionXLControlNetPipeline(
        **parts, controlnet=controlnet(tmp_path / "a", sdxl=True), add_watermarker=False
    )
    reference = theirs(pipeline, {"image": picture(1)}, controlnet_conditioning_scale=0.6)
    assert_same(ours(tmp_path / "sdxl", [control(tmp_path / "a", 1, scale=0.6)]), reference)


@pytest.mark.parametrize("size", ["small", "mid"])
def test_smaller_ones_of_sdxl(size: str, tmp_path: Path) -> None:
    """As diffusers/controlnet-depth-sdxl-1.0-small and -mid: without attention, or with less of it."""
    parts = sdxl(tmp_path / "sdxl").components
    whole = dict(ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=HINTS).config)
    own: dict[str, Any] = {"down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D"}
    if size == "mid":
        own = {"transformer_layers_per_block": (1,) * 3}
    network = made(ControlNetModel.from_config({**whole, **own}), 7, tmp_path / "a")
    pipeline = StableDiffusionXLControlNetPipeline(**parts, controlnet=network, add_watermarker=False)
    reference = theirs(pipeline, {"image": picture(1)}, controlnet_conditioning_scale=0.6)
    assert_same(ours(tmp_path / "sdxl", [control(tmp_path / "a", 1, scale=0.6)]), reference)


KINDS = ("openpose", "depth", "softedge", "canny", "normal", "segment", "tile", "inpaint")


def test_union(tmp_path: Path) -> None:
    parts = sdxl(tmp_path / "sdxl").components
    pipeline = StableDiffusionXLControlNetUnionPipeline(
        **parts, controlnet=union(tmp_path / "u"), add_watermarker=False
    )
    for number, kind in enumerate(KINDS):
        images = {"control_image": [picture(1)], "control_mode": [number]}
        reference = theirs(pipeline, images, controlnet_conditioning_scale=0.6, num_inference_steps=3)
        assert_same(
            ours(tmp_path / "sdxl", [control(tmp_path / "u", 1, f"none:{kind}", scale=0.6)], steps=3), reference
        )
    with pytest.raises(RequestError, match="a union ControlNet must be told"):
        ours(tmp_path / "sdxl", [control(tmp_path / "u", 1)])


@pytest.mark.parametrize(("of_union", "blank"), [(True, 0.0), (False, -1.0)])
def test_what_a_mask_takes_away_for_inpainting(of_union: bool, blank: float, tmp_path: Path) -> None:
    """It is black to a union, -1 to ControlNet 1.1's: as the pictures that diffusers' pipelines are given for them."""
    sdxl(tmp_path / "model") if of_union else sd1(tmp_path / "model")
    union(tmp_path / "net") if of_union else controlnet(tmp_path / "net", sdxl=False)
    model = calotype.load(tmp_path / "model", device="cpu")
    box = Image.new("L", (SIZE["width"], SIZE["height"]))
    box.paste(255, (8, 8, 40, 40))
    led = Control(kind="inpaint", model=tmp_path / "net", image=picture(1))
    request = calotype.Request(prompt=PROMPT, **SIZE, steps=2, input_image=picture(3), mask_image=box, controls=(led,))
    job = request.complete(model.family.defaults, 1, pictures_of(request))
    network = model.load_control(tmp_path / "net")
    (stage,) = planned(model.family, job, {led.source: network}, {}, PromptCache())
    (seen,) = seen_by(model.family, stage, job.input_image)
    wanted = to_tensor(picture(1))[None].clone()
    wanted[:, :, 8:40, 8:40] = blank
    assert torch.equal(seen, wanted)


def test_a_union_sees_several_pictures_in_one_pass(tmp_path: Path) -> None:
    """Each weighed before the network; in the steps of one alone, as if it were the only one."""
    parts = sdxl(tmp_path / "sdxl").components
    net = union(tmp_path / "u")
    pipeline = StableDiffusionXLControlNetUnionPipeline(**parts, controlnet=net, add_watermarker=False)
    images = {"control_image": [picture(1), picture(2)], "control_mode": [1, 3]}
    reference = theirs(pipeline, images, controlnet_conditioning_scale=[0.6, 0.9])
    one, two = (
        control(tmp_path / "u", k, kind, scale=scale)
        for k, kind, scale in ((1, "none:depth", 0.6), (2, "none:canny", 0.9))
    )
    for memory in ("resident", "stream"):
        assert_same(ours(tmp_path / "sdxl", [one, two], memory), reference)
    assert_same(ours(tmp_path / "sdxl", [one, replace(two, scale=0)]), ours(tmp_path / "sdxl", [one]))
    halves = [replace(one, end=0.5), replace(two, start=0.5)]
    with pytest.raises(AssertionError):
        assert_same(ours(tmp_path / "sdxl", halves), reference)


def test_what_a_union_makes_of_several_pictures_is_summed_up_before_it(tmp_path: Path) -> None:
    """In steps that are both's; in those of one alone, its answer is weighed."""
    sdxl(tmp_path / "sdxl")
    union(tmp_path / "u")
    model = calotype.load(tmp_path / "sdxl", device="cpu")
    network, family = model.load_control(tmp_path / "u"), model.family
    assert isinstance(network, ControlNet)
    assert isinstance(family, UNetModel)
    assert isinstance(family.unet, UNet)
    one, two = (
        Hint(network=network, picture=to_tensor(picture(k))[None], scale=scale, start=start, end=end, kind=kind)
        for k, scale, start, end, kind in ((1, 0.6, 0.0, 0.5, 1), (2, 0.9, 0.25, 1.0, 3))
    )
    assert together([one, two]) == [(one, two)]
    job = calotype.Request(prompt=PROMPT, steps=4, **SIZE).complete(family.defaults, 1, {})
    x = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    times = torch.tensor([801.0, 601.0, 401.0, 201.0])
    with torch.inference_mode():
        words = family.condition(PROMPT, job, negative=False)
        assert words.vector is not None
        words = words._replace(vector=with_sizes(words.vector, [job], family.unet.config.size_width))
        found = family._additions(words, times, [one, two])
        for step, leading in enumerate(([one], [one, two], [two], [two])):
            kinds = [hint.kind for hint in leading if hint.kind is not None]
            scales = [hint.scale if len(leading) > 1 else 1.0 for hint in leading]
            own = network.prepare_hinted(words.texts, words.vector, times, kinds, None)
            seen = [network.embed(hint.picture, hint.kind, scale) for hint, scale in zip(leading, scales, strict=True)]
            made = network(x, *own.at(step), torch.stack(seen).sum(dim=0))
            after = 1.0 if len(leading) > 1 else leading[0].scale
            for got, wanted in zip(found(x, step)[0], made, strict=True):
                torch.testing.assert_close(got, after * wanted)


def test_kolors_own_residuals_with_their_projection_of_text(tmp_path: Path) -> None:
    net = controlnet(
        tmp_path,
        sdxl=True,
        encoder_hid_dim=32,
        encoder_hid_dim_type="text_proj",
        cross_attention_dim=40,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    mine = opened(tmp_path)
    rng = torch.Generator().manual_seed(1)
    x, text, pooled = (torch.randn(shape, generator=rng) for shape in ((1, 4, 8, 12), (1, 7, 32), (1, 32)))
    sizes = torch.tensor([[64.0, 96.0, 0.0, 0.0, 64.0, 96.0]])
    hint = to_tensor(picture(1))[None]
    with torch.inference_mode():
        down, middle = net(
            x,
            torch.tensor([401.0]),
            encoder_hidden_states=net.encoder_hid_proj(text),  # which Kolors' pipeline does
            controlnet_cond=hint,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
            return_dict=False,
        )
        from calotype.nn.embeddings import sinusoid

        vector = torch.cat([pooled, sinusoid(sizes, 8).flatten(1)], dim=1)
        prepared = mine.prepare_hinted([text], vector, torch.tensor([401.0]), [], None)
        for got, wanted in zip(mine(x, *prepared.at(0), mine.embed(hint, None)), [*down, middle], strict=True):
            assert_near(got, wanted)


def opened(folder: Path) -> ControlNet:
    from calotype.loading.controls import _found

    found = _found(str(folder))
    network, binding = found.bind(found.config())
    network.load_state_dict(binding.load(found.weights, torch.float32, mapped=False), assign=True)
    assert isinstance(network, ControlNet)
    return network


def test_a_controlnet_of_another_family_is_told_apart(tmp_path: Path) -> None:
    sd1(tmp_path / "sd1")
    controlnet(tmp_path / "a", sdxl=True)
    with pytest.raises(WrongShape, match="a ControlNet for"):
        calotype.load(tmp_path / "sd1").load_control(tmp_path / "a")


def test_the_authors_names_give_the_same_network(tmp_path: Path) -> None:
    controlnet(tmp_path / "a", sdxl=False, attention_head_dim=8, block_out_channels=(64, 64, 64))
    mine = opened(tmp_path / "a")
    layout = CONTROLNET.layout("original")
    assert layout is not None
    _, binding = CONTROLNET.bind(layout, mine.settings)
    save_file({f"control_model.{k}": v for k, v in binding.save(mine.state_dict())}, tmp_path / "b.safetensors")
    theirs = opened(tmp_path / "b.safetensors")
    assert theirs.settings == mine.settings
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, mine.state_dict()[name])
