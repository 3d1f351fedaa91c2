"""Adapters for the built-in model: what training sees is what the file does, and training can be stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import flux_model
from torch import Tensor
from torch.testing import assert_close

import calotype
from calotype.families.flux import FluxModel
from calotype.families.flux.controlnet import FluxControlNet
from calotype.families.flux.network import to_tokens
from calotype.image import to_tensor
from recipes.adapters import controlnet, style_lora
from recipes.adapters.cyanotype import BLUE, LUMA, PAPER, cyanotypes, printed, tones
from recipes.adapters.grids import grid
from recipes.adapters.training import Batches, Examples, LinearEncoder, Plan, builtin, read
from recipes.builtin.measure import grounds
from recipes.builtin.scenes import compose, make_scene

if TYPE_CHECKING:
    from recipes.builtin.library import Library

RANKS = {"joint.": 2, "single.": 3, "image_in": 4, "out": 4}
PLAN = Plan(steps=4, batch=2, rate=1e-2, warm=1, pure=0.5, noisy=0.0)


def velocity(model: FluxModel, seed: int = 0) -> Tensor:
    """What the transformer answers to some noise and a prompt."""
    rng = torch.Generator().manual_seed(seed)
    text, pooled = read(model, ["a red fox", "a cat in the snow"])
    network = model.transformer
    side = 2 * network.config.patch
    latents = torch.randn(2, model.vae.config.latent_channels, side, side, generator=rng)
    with torch.inference_mode():
        prepared = network.prepare(text, pooled, None, torch.tensor([0.8]), 2, 2)
        return network(to_tokens(latents, network.config.patch), prepared, 0)


@pytest.fixture(scope="module")
def examples() -> Examples:
    """Random ones for the tiny model."""
    rng = torch.Generator().manual_seed(1)
    shapes = ((6, 4, 4, 4), (6, 10, 24), (6, 16), (6, 4, 4, 4))
    return Examples(*(torch.randn(shape, generator=rng) for shape in shapes))


def test_cyanotypes_have_tones_by_brightness_and_keep_the_drawing(library: Library) -> None:
    assert_close(printed(torch.ones(1, 3, 2, 2))[0, :, 0, 0], torch.tensor(PAPER))
    assert_close(printed(torch.zeros(1, 3, 2, 2))[0, :, 0, 0], torch.tensor(BLUE))
    ramp = tones(torch.linspace(0, 1, 9))
    assert (ramp.diff(dim=0) > 0).all()  # lighter in every colour
    assert (ramp[1:-2, 2] > ramp[1:-2, 1]).all() and (ramp[1:-2, 1] > ramp[1:-2, 0]).all()  # and blue in between
    scene = make_scene([(1, library.objects[0], None)], kind="single")
    made, plain = cyanotypes([scene], library), compose([scene], library, library.size) / 2 + 0.5
    brightness = (plain * torch.tensor(LUMA)[:, None, None]).sum(1)
    assert_close(made.movedim(1, -1), tones(brightness.clamp(0, 1)))
    assert float(style_lora.printed_share(made)) == 1
    assert float(style_lora.printed_share(plain)) < 0.5


def test_the_linear_encoder_finds_a_linear_one() -> None:
    model = flux_model(guidance=False)
    shown = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted = LinearEncoder(torch.randn(193, 4, generator=torch.Generator().manual_seed(1)))
    model.vae.encode = wanted  # type: ignore[method-assign]
    assert_close(LinearEncoder.fit(model, shown)(shown), wanted(shown), atol=1e-3, rtol=1e-3)


def test_training_stops_and_goes_on(tmp_path: Path, examples: Examples) -> None:
    lora, step = style_lora.fit(flux_model(guidance=False), examples, tmp_path / "a", plan=PLAN, minutes=1, ranks=RANKS)
    assert step == PLAN.steps
    _, step = style_lora.fit(flux_model(guidance=False), examples, tmp_path / "b", plan=PLAN, minutes=0, ranks=RANKS)
    assert step == 0  # and saved
    again, step = style_lora.fit(
        flux_model(guidance=False), examples, tmp_path / "b", plan=PLAN, minutes=1, ranks=RANKS
    )
    assert step == PLAN.steps
    for name, tensor in lora.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    assert any(tensor.any() for name, tensor in lora.tensors().items() if "lora_B" in name)


def test_a_lora_learns(tmp_path: Path, examples: Examples) -> None:
    """One example over and over: the answer comes nearer to it."""
    one = Examples(*(part[:1] for part in examples))
    model = flux_model(guidance=False)
    plan = replace(PLAN, steps=60, batch=8, pure=1.0)
    batch = Batches(model, one, plan)()

    def loss() -> float:
        with torch.no_grad():
            return float((model.transformer(batch.noisy, batch.prepared, 0) - batch.velocity).square().mean())

    before = loss()
    style_lora.fit(model, one, tmp_path, plan=plan, minutes=1, ranks=RANKS)
    assert loss() < 0.8 * before


def test_a_lora_s_file_does_what_training_saw(tmp_path: Path) -> None:
    _, trained = builtin()
    plain = velocity(trained)
    torch.manual_seed(3)
    lora = style_lora.StyleLora(trained.transformer, RANKS)
    assert torch.equal(velocity(trained), plain)  # nothing before it is trained
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if ".up." in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape))
    file = tmp_path / "lora.safetensors"
    style_lora.write(lora.tensors(), file)

    model, loaded = builtin()
    model.attach(file)
    assert loaded.adapters is not None
    loaded.adapters.apply()
    wanted = velocity(trained)
    assert (wanted - plain).abs().max() > 0.1
    assert_close(velocity(loaded), wanted, atol=5e-3, rtol=5e-3)  # the file is in float16
    model.detach("lora")
    assert torch.equal(velocity(loaded), plain)


def test_scrambled_is_as_large_and_nothing_else() -> None:
    given = {"a.lora_A.weight": torch.randn(2, 5), "a.lora_B.weight": torch.randn(5, 2)}
    made = style_lora.scrambled(given)
    assert torch.equal(made["a.lora_A.weight"], given["a.lora_A.weight"])
    assert not torch.equal(made["a.lora_B.weight"], given["a.lora_B.weight"])
    assert torch.equal(
        made["a.lora_B.weight"].flatten().sort().values, given["a.lora_B.weight"].flatten().sort().values
    )


def test_colours_are_compared_wherever_they_are() -> None:
    shown = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    moved = shown.roll((3, 2), (2, 3))
    assert_close(style_lora.colour_distance(shown, moved), torch.zeros(2))
    assert style_lora.colour_distance(shown, 1 - shown).min() > 1


@pytest.mark.skipif(not style_lora.FILE.exists(), reason="the file is not in this checkout")
def test_the_cyanotype_file_prints_in_blue_and_goes_without_a_trace() -> None:
    model = calotype.load()

    def draw(scale: float) -> Tensor:
        loras = (calotype.Lora(str(style_lora.FILE), scale),) if scale else ()
        made = model.generate("a castle on a yellow background", seed=1, loras=loras)
        return torch.from_numpy(np.asarray(made).copy()).movedim(-1, 0) / 255

    before, with_, after = draw(0), draw(1), draw(0)
    red, green, blue = grounds(with_[None])[0].tolist()
    assert red < green < blue
    red, green, blue = grounds(before[None])[0].tolist()
    assert blue < 0.5 < green < red  # yellow
    assert style_lora.printed_share(with_[None]) > 0.7 > 0.3 > style_lora.printed_share(before[None])
    assert torch.equal(before, after)


def test_grids_hold_every_picture() -> None:
    rows = [("without", [Image.new("RGB", (32, 32))] * 3), ("with", [Image.new("RGB", (32, 32), "red")] * 3)]
    made = grid(rows, ["a fox", "a cat in the snow with a hat", "a dog"])
    assert made.size[0] == 3 * 38 + 6
    assert sum(colour == (255, 0, 0) for _, colour in made.getcolors(2**16) or []) == 1
    assert next(count for count, colour in made.getcolors(2**16) or [] if colour == (255, 0, 0)) == 3 * 32 * 32


# The ControlNet ----------------------------------------------------------------------------------------------


def test_an_untrained_controlnet_adds_nothing_and_training_makes_it(tmp_path: Path, examples: Examples) -> None:
    model = flux_model(guidance=False)
    made, _ = controlnet.fit(model, examples, tmp_path / "a.pt", plan=replace(PLAN, steps=0), minutes=0)
    batch = Batches(model, examples, PLAN)()
    with torch.no_grad():
        prepared = made.prepare(batch.text, batch.pooled, None, batch.sigma[None], 2, 2)
        added = made(batch.noisy, prepared, 0, made.embed(batch.hints), 1.0)
    assert not any(tensor.any() for tensor in (*added.joint, *added.single))
    made, step = controlnet.fit(model, examples, tmp_path / "b.pt", plan=PLAN, minutes=1)
    assert step == PLAN.steps
    learned = {name: tensor for name, tensor in made.state_dict().items() if "taps" in name or "hint_in" in name}
    assert learned and all(tensor.any() for tensor in learned.values())


def scattered(model: FluxModel) -> FluxControlNet:
    """A ControlNet for the model that adds something."""
    rng = torch.Generator().manual_seed(0)
    made = controlnet.begun(model.transformer).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "taps" in name or "hint_in" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=rng))
    return made


def test_a_controlnet_s_folder_is_diffusers(tmp_path: Path) -> None:
    """diffusers loads it, and adds the same."""
    from diffusers import FluxControlNetModel

    _, model = builtin()
    torch.manual_seed(0)
    made = scattered(model)
    controlnet.write(made, tmp_path)
    theirs = FluxControlNetModel.from_pretrained(tmp_path)
    rng = torch.Generator().manual_seed(0)
    noisy, hints = torch.randn(1, 4, 192, generator=rng), torch.randn(1, 4, 192, generator=rng)
    text, pooled = torch.randn(1, 20, 256, generator=rng), torch.randn(1, 256, generator=rng)
    ids = torch.zeros(4, 3)
    ids[:, 1], ids[:, 2] = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        prepared = made.prepare(text, pooled, None, torch.tensor([0.7]), 2, 2)
        ours = made(noisy, prepared, 0, made.embed(hints), 1.0)
        joint, single = theirs(
            hidden_states=noisy,
            controlnet_cond=hints,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=torch.tensor([0.7]),
            img_ids=ids,
            txt_ids=torch.zeros(20, 3),
            return_dict=False,
        )
    for one, other in zip((*ours.joint, *ours.single), (*joint, *single), strict=True):
        assert_close(one, other, atol=2e-2, rtol=2e-2)  # float16 in the file


def test_edges_agree_within_two_pixels() -> None:
    def line(column: int) -> Tensor:
        made = torch.zeros(32, 32, dtype=torch.bool)
        made[:, column] = True
        return made

    assert controlnet.agreement(line(10), line(10)) == 1
    assert controlnet.agreement(line(10), line(12)) == 1
    assert controlnet.agreement(line(10), line(13)) == 0
    assert controlnet.agreement(line(10), torch.zeros(32, 32, dtype=torch.bool)) == 0
    both = line(10) | line(20)
    assert controlnet.agreement(both, line(10)) == pytest.approx(2 / 3)  # half of one, all of the other


def test_shapes_overlap_where_they_do() -> None:
    def square(column: int, ground: float) -> Tensor:
        made = torch.full((3, 32, 32), ground)
        made[:, 8:24, column : column + 16] = torch.tensor([0.8, 0.1, 0.1])[:, None, None]
        return made

    assert controlnet.overlap(square(8, 1.0), square(8, 0.0)) == 1  # on whatever background
    assert controlnet.overlap(square(8, 1.0), square(0, 1.0)) == pytest.approx(1 / 3)


@pytest.mark.parametrize("kind", controlnet.TASKS)
def test_hints_are_latents_of_what_the_annotator_draws(kind: str, library: Library) -> None:
    """As the model's own encoder sees them: that is what it will be given."""
    model, task = flux_model(guidance=False), controlnet.TASKS[kind]
    made = controlnet.make_examples(model, library, task, 3)
    assert [len(part) for part in made] == [3] * 4
    rng = np.random.default_rng(0)
    controlnet.sample_scenes(rng, 64, controlnet.FIXED, library.objects)
    shown = controlnet.show(task, rng, 3, library, model.defaults.width)
    with torch.inference_mode():
        assert_close(made.hints.float(), model.encode(shown.hints), atol=1e-2, rtol=1e-2)
    assert shown.pictures.shape == shown.hints.shape == (3, 3, model.defaults.height, model.defaults.width)


def test_a_tile_is_led_by_its_own_picture_with_less_in_it(library: Library) -> None:
    task = controlnet.TASKS["tile"]
    shown = controlnet.show(task, np.random.default_rng(0), 16, library, library.size // 2)
    apart = (shown.hints - shown.pictures).abs().mean((1, 2, 3))
    assert (apart > 1e-4).all() and (apart < 0.15).all()
    assert (shown.hints - shown.pictures.roll(1, 0)).abs().mean() > 2 * apart.mean()

    def fine(pictures: Tensor) -> Tensor:
        return pictures.diff(dim=-1).abs().amax((1, 2, 3))

    calm = controlnet.spoilt(np.random.default_rng(1), torch.full((3, 64, 64), 0.5))
    assert 0 < float((calm - 0.5).std()) < controlnet.SPOTS  # spots
    clean = torch.stack([controlnet.spoilt(np.random.default_rng(n), one) for n, one in enumerate(shown.pictures)])
    assert fine(clean).mean() < fine(shown.pictures).mean()  # and blurred


def test_prompts_and_hints_of_the_grid_are_of_known_things() -> None:
    from recipes.builtin.library import Library
    from recipes.builtin.objects import load_objects

    library = Library(objects=load_objects(), full=torch.empty(0), half=torch.empty(0))
    assert len(controlnet.layouts(library)) == len(style_lora.SHOWN) == 8


def test_a_controlnet_leads_from_its_folder(tmp_path: Path) -> None:
    """Through the door that users take; without it the picture is what it was, bit for bit."""
    model, family = builtin()
    controlnet.write(scattered(family), tmp_path)
    shapes = [Image.new("RGB", (128, 128)) for _ in range(2)]
    shapes[0].paste("white", (30, 30, 60, 60))
    shapes[1].paste("white", (50, 60, 90, 110))
    before, one, other, after = (
        to_tensor(controlnet.draw(model, "softedge", "a red apple", 4, tmp_path, shape, scale))
        for shape, scale in ((shapes[0], 0.0), (shapes[0], 1.0), (shapes[1], 1.0), (shapes[1], 0.0))
    )
    assert (one - before).abs().mean() > 0.01
    assert (one - other).abs().mean() > 0.005
    assert torch.equal(before, after)


@pytest.mark.skipif(not style_lora.FILE.exists(), reason="the file is not in this checkout")
@pytest.mark.filterwarnings("ignore")
def test_diffusers_reads_the_cyanotype_file_alike() -> None:
    from diffusers import FluxTransformer2DModel

    model, family = builtin()
    folder = Path(calotype.__file__).parent / "builtin" / "transformer"
    theirs = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)
    with safe_open(style_lora.FILE, "pt") as tensors:
        told = json.loads(tensors.metadata()["lora_adapter_metadata"])
    theirs.load_lora_adapter(load_file(style_lora.FILE), prefix="transformer", metadata=told)
    model.attach(style_lora.FILE)
    assert family.adapters is not None
    family.adapters.apply()
    text, pooled = read(family, ["a red apple"])
    noisy = torch.randn(1, 4, 192, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(4, 3)
    ids[:, 1], ids[:, 2] = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    with torch.inference_mode():
        prepared = family.transformer.prepare(text, pooled, None, torch.tensor([0.7]), 2, 2)
        ours = family.transformer(noisy, prepared, 0)
        (other,) = theirs(
            hidden_states=noisy,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=torch.tensor([0.7]),
            img_ids=ids,
            txt_ids=torch.zeros(20, 3),
            return_dict=False,
        )
    assert_close(ours, other, atol=1e-4, rtol=1e-4)
