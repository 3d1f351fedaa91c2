"""Files with real keys and shapes, and no weights: what is ours is recognised, what nearly is gets its own answer."""

from __future__ import annotations

import hashlib
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import strangers as s
from strangers import Shapes, header_only

from calotype.errors import (
    CalotypeError,
    DamagedFile,
    LoadError,
    MissingKeys,
    MissingPart,
    NotAModel,
    UnexpectedKeys,
    UnsupportedModel,
    WrongShape,
)
from calotype.families.kolors.family import FAMILY as KOLORS
from calotype.families.sd1.family import FAMILY as SD1
from calotype.families.sdxl.config import UNET as SDXL_UNET
from calotype.families.sdxl.family import FAMILY as SDXL
from calotype.loading import describe, load, manifest

QUICK = 1.0  # seconds of this process for one header; about 0.5 for the largest on a slow machine
LONGEST = 700  # characters of an answer: what a person reads


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched to answer."""
    import huggingface_hub.constants

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def known(name: str) -> Shapes:
    return dict(manifest(name))


# ---- what is ours

RUNS = "complete"
NEEDS_SD1, NEEDS_SDXL = "to run, it needs also: clip, vae", "to run, it needs also: clip_l, clip_g, vae"
ALONE = "alone; families with such a part: "
CLIPS, CLIPS_G, VAES, CHATGLMS = "clip " + ALONE, " clip " + ALONE, "vae " + ALONE, "chatglm " + ALONE
# Families that a part alone goes into, and those that it does not.
TAKERS = {
    CLIPS: ({"flux", "sd1", "sdxl"}, {"kolors"}),
    CLIPS_G: ({"sdxl"}, {"flux", "sd1", "kolors"}),
    VAES: ({"sd1", "sdxl", "kolors"}, {"flux"}),
    CHATGLMS: ({"kolors"}, {"flux", "sd1", "sdxl"}),
}
EIGHT = "its UNet takes 8 channels, the picture to edit"
SD1_PARTS, SDXL_PARTS = "unet clip vae", "unet clip clip vae"
# manifest: family, variant, layout, parts, note
OURS: dict[str, tuple[str | None, str | None, str, str, str]] = {
    "sd1": ("sd1", "1.x", "original", SD1_PARTS, RUNS),
    "sd1-without-position-ids": ("sd1", "1.x", "original", SD1_PARTS, RUNS),
    "sd1-training": ("sd1", "1.x", "original", SD1_PARTS + " other", RUNS),
    "sd1-emaonly": ("sd1", "1.x", "original", SD1_PARTS + " other", RUNS),
    "sd1-buffers": ("sd1", "1.x", "original", SD1_PARTS + " other", RUNS),
    "sd1-zero-snr": ("sd1", "1.x-v-zsnr", "original", SD1_PARTS + " other", RUNS),
    "sd1-inpainting": ("sd1", "inpainting", "original", SD1_PARTS, RUNS),
    "sd1-inpainting-training": ("sd1", "inpainting", "original", SD1_PARTS + " other", RUNS),
    "sd1-instruct-pix2pix": ("sd1", "instruct-pix2pix", "original", SD1_PARTS + " other", EIGHT),
    "sd1-original-unet": ("sd1", "1.x", "original", "unet", NEEDS_SD1),
    "sd1-original-vae": (None, None, "original", "vae", VAES),
    "sd1-original-text-encoder": (None, None, "transformers", "clip", CLIPS),
    "sd1-vae-bare": (None, None, "original", "vae", VAES),
    "sd1-unet-diffusers": ("sd1", "1.x", "diffusers", "unet", NEEDS_SD1),
    "sd1-unet-diffusers-inpainting": ("sd1", "inpainting", "diffusers", "unet", NEEDS_SD1),
    "sd1-unet-diffusers-instruct-pix2pix": ("sd1", "instruct-pix2pix", "diffusers", "unet", EIGHT),
    "sd1-text-encoder": (None, None, "transformers", "clip", CLIPS),
    "sd1-text-encoder-without-position-ids": (None, None, "transformers", "clip", CLIPS),
    "sd1-vae-diffusers": (None, None, "diffusers", "vae", VAES),
    "sd1-vae-diffusers-old": (None, None, "diffusers", "vae", VAES),
    "taesd-encoder": (None, None, "taesd", "vae", "its decoder is in another file: give that too"),
    "taesd-decoder": (None, None, "taesd", "vae", "its encoder is in another file: give that too"),
    "taesd-diffusers": (None, None, "diffusers-tiny", "vae", VAES),
    "sdxl-base": ("sdxl", "base", "original", SDXL_PARTS, RUNS),
    "sdxl-with-both-position-ids": ("sdxl", "base", "original", SDXL_PARTS, RUNS),
    "sdxl-without-position-ids": ("sdxl", "base", "original", SDXL_PARTS, RUNS),
    "sdxl-zero-snr": ("sdxl", "base-v-zsnr", "original", SDXL_PARTS + " other", RUNS),
    "sdxl-turbo": ("sdxl", "turbo", "original", SDXL_PARTS + " other", RUNS),
    "sdxl-inpainting": ("sdxl", "inpainting", "original", SDXL_PARTS, RUNS),
    "sdxl-original-unet": ("sdxl", "base", "original", "unet", NEEDS_SDXL),
    "sdxl-original-vae": (None, None, "original", "vae", VAES),
    "sdxl-original-text-encoders": (None, None, "transformers", "clip clip", CLIPS_G),
    "sdxl-unet-diffusers": ("sdxl", "base", "diffusers", "unet", NEEDS_SDXL),
    "sdxl-unet-diffusers-inpainting": ("sdxl", "inpainting", "diffusers", "unet", NEEDS_SDXL),
    "sdxl-text-encoder": (None, None, "transformers", "clip", CLIPS),
    "sdxl-text-encoder-2": (None, None, "transformers", "clip", CLIPS_G),
    "sdxl-vae-diffusers": (None, None, "diffusers", "vae", VAES),
    "sdxl-vae-bare": (None, None, "original", "vae", VAES),
    "kolors-unet": ("kolors", "base", "diffusers", "unet", "to run, it needs also: chatglm, vae"),
    "kolors-unet-inpainting": ("kolors", "inpainting", "diffusers", "unet", "to run, it needs also: chatglm, vae"),
    "kolors-text-encoder": (None, None, "transformers", "chatglm", CHATGLMS),
    "kolors-text-encoder-diffusers": (None, None, "diffusers", "chatglm", CHATGLMS),
    "kolors-vae": (None, None, "diffusers", "vae", VAES),
}

# manifest of a ControlNet: the family that it is told of, and what else is said
CONTROLS: dict[str, tuple[str, str]] = {
    "sd1-controlnet": ("sd1", "for Stable Diffusion 1.x;"),
    "sd1-controlnet-diffusers": ("sd1", "for Stable Diffusion 1.x;"),
    "sdxl-controlnet-diffusers": ("sdxl", "for SDXL and Kolors;"),
    "sdxl-controlnet-union": ("sdxl", "a union, which must be told one of openpose, pose, depth"),
    "sdxl-controlnet-union-promax": ("sdxl", "a union, which must be told one of openpose, pose, depth"),
    "kolors-controlnet": ("kolors", "for Kolors;"),
    "flux-controlnet-union": ("flux", "a union, which must be told one of canny, tile, depth"),
    "flux-controlnet-jasperai": ("flux", "for FLUX.1;"),
    "flux-controlnet-liblib": ("flux", "for FLUX.1;"),
    "flux-controlnet-shakker-depth": ("flux", "for FLUX.1;"),
    "flux-controlnet-inpainting": ("flux", "for inpainting, with a mask_image; for FLUX.1;"),
}


IMAGE_PROMPTS: dict[str, tuple[str, str | None, str]] = {
    "sd1-ip-adapter": ("ip_adapter", "sd1", "base, for Stable Diffusion 1.x; goes with a model"),
    "sd1-ip-adapter-plus": ("ip_adapter", "sd1", "plus, for Stable Diffusion 1.x; goes with a model"),
    "sd1-ip-adapter-full-face": ("ip_adapter", "sd1", "full, for Stable Diffusion 1.x; goes with a model"),
    "sdxl-ip-adapter": ("ip_adapter", "sdxl", "base, for SDXL and Kolors; goes with a model"),
    "sdxl-ip-adapter-vit-h": ("ip_adapter", "sdxl", "base, for SDXL and Kolors; goes with a model"),
    "sdxl-ip-adapter-plus-vit-h": ("ip_adapter", "sdxl", "plus, for SDXL and Kolors; goes with a model"),
    "clip-vit-h-image-encoder": ("image_encoder", None, "goes with a model"),
    "clip-vit-bigg-image-encoder": ("image_encoder", None, "goes with a model"),
}


def test_every_manifest_of_these_families_is_here() -> None:
    names = {item.name for family in (SD1, SDXL, KOLORS) for item in family.manifests}
    controls = {name for name in CONTROLS if not name.startswith("flux")}
    assert set(OURS) | controls | set(IMAGE_PROMPTS) == names


@pytest.mark.parametrize("name", IMAGE_PROMPTS)
def test_what_image_prompts_need_is_told_from_a_model(tmp_path: Path, name: str) -> None:
    seen = describe(header_only(tmp_path / "x.safetensors", known(name)))
    kind, family, note = IMAGE_PROMPTS[name]
    assert (seen.kind, seen.family, seen.supported) == (kind, family, False)
    assert seen.note.startswith(note)


def test_an_adapter_of_faces_is_no_lora(tmp_path: Path) -> None:
    """FaceID files have LoRAs among their tensors."""
    shapes = dict(known("sd1-ip-adapter")) | {"ip_adapter.0.to_q_lora.down.weight": (128, 320)}
    shapes = {key: shape for key, shape in shapes.items() if not key.startswith("image_proj.proj.")}
    shapes |= {"image_proj.proj.0.weight": (1024, 512), "image_proj.proj.2.weight": (3072, 1024)}
    seen = describe(header_only(tmp_path / "x.safetensors", shapes))
    assert (seen.kind, seen.family, seen.layout) == ("ip_adapter", "sd1", "faceid")
    assert seen.note.startswith("does not run here yet")


@pytest.mark.parametrize("name", CONTROLS)
def test_a_controlnet_is_told_from_a_model(tmp_path: Path, name: str) -> None:
    path = header_only(tmp_path / "x.safetensors", known(name))
    seen = describe(path)
    family, note = CONTROLS[name]
    assert (seen.kind, seen.family, seen.supported) == ("controlnet", family, False)
    assert note in seen.note
    with pytest.raises(NotAModel, match=r"ControlNet.*give the model itself"):
        load(path)


@pytest.mark.parametrize("name", OURS)
def test_a_known_file_is_recognised_at_once(tmp_path: Path, name: str) -> None:
    family, variant, layout, parts, note = OURS[name]
    path = header_only(tmp_path / "x.safetensors", known(name))
    start = time.process_time()
    seen = describe(path)
    took = time.process_time() - start
    if took > QUICK:  # the first may also have imported something
        start = time.process_time()
        describe(path)
        took = time.process_time() - start
    assert (seen.family, seen.variant, seen.layout) == (family, variant, layout)
    assert sorted(part.name for part in seen.parts) == sorted(parts.split())
    assert note.strip() in seen.note
    into, others = TAKERS.get(note, (set[str](), set[str]()))
    takers = set(seen.note.partition(ALONE)[2].split(", "))
    assert into <= takers
    assert not others & takers
    assert seen.supported == (note != EIGHT and "another file" not in note)
    assert sum(part.tensors for part in seen.parts) == len(known(name))
    assert took < QUICK


def test_extra_tensors_of_training_do_no_harm_in_sdxl(tmp_path: Path) -> None:
    shapes = known("sdxl-base")
    averages = {"model_ema." + key.removeprefix("model.").replace(".", ""): shapes[key] for key in list(shapes)[:99]}
    extra: Shapes = {"alphas_cumprod": (1000,), "betas": (1000,), "model_ema.decay": (), "v_pred": (0,), **averages}
    seen = describe(header_only(tmp_path / "x.safetensors", {**shapes, **extra}))
    assert (seen.variant, seen.note, seen.supported) == ("base-v", "complete", True)


# ---- what nearly is

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CONV = "down_blocks.0.resnets.0.conv1.weight"


def refiner() -> Shapes:
    base = known("sdxl-base")
    texts = {key.replace("embedders.1.", "embedders.0."): base[key] for key in base if "embedders.1." in key}
    return {**s.under(UNET, s.unet("original", s.REFINER)), **only(base, VAE), **texts}


def only(shapes: Shapes, *beginnings: str) -> Shapes:
    return {key: shape for key, shape in shapes.items() if key.startswith(beginnings)}


def without(shapes: Shapes, *beginnings: str) -> Shapes:
    return {key: shape for key, shape in shapes.items() if not key.startswith(beginnings)}


def renamed(shapes: Shapes, old: str, new: str) -> Shapes:
    assert any(old in key for key in shapes)
    return {key.replace(old, new): shape for key, shape in shapes.items()}


def first_half(shapes: Shapes) -> Shapes:
    return {key: shapes[key] for key in sorted(shapes)[: len(shapes) // 2]}


def extra_block() -> Shapes:
    shapes = known("sd1-unet-diffusers")
    return {**shapes, **renamed(only(shapes, "down_blocks.0.attentions.1."), "attentions.1.", "attentions.2.")}


class Miss:
    """A near miss: its keys, what `info` says of it, and what `load` raises."""

    def __init__(
        self,
        shapes: Callable[[], Shapes],
        seen: tuple[str, str | None, str | None],  # kind, family, variant
        note: str,
        error: type[LoadError],
        message: str,
    ) -> None:
        self.shapes, self.seen, self.note, self.error, self.message = shapes, seen, note, error, message


GOES = "goes with a model, and is none itself"
LCM = "takes the guidance by an embedding.*distilled from .the LCM LoRA"


def attachment(shapes: Callable[[], Shapes], kind: str, family: str | None, title: str) -> Miss:
    message = rf"x\.safetensors: {title}, which goes with a model and is none; give the model itself as the source$"
    return Miss(shapes, (kind, family, None), GOES, NotAModel, message)


def unsupported(shapes: Callable[[], Shapes], family: str, variant: str, advice: str) -> Miss:
    message = f"the unet of {family} {re.escape(variant)}: recognised, but not supported yet; .*{advice}"
    return Miss(shapes, ("model", family, variant), f"not supported yet; .*{advice}", UnsupportedModel, message)


def stranger(shapes: Callable[[], Shapes], title: str) -> Miss:
    message = f"{title}: recognised, but not supported yet; supported: .*SDXL"
    return Miss(shapes, ("model", None, None), f"{title}: not supported", UnsupportedModel, message)


def damaged(
    shapes: Callable[[], Shapes], kind: str, family: str | None, variant: str | None, error: type[LoadError], why: str
) -> Miss:
    return Miss(shapes, (kind, family, variant), f"does not load: {why}", error, why)


def alone(shapes: Callable[[], Shapes], note: str, message: str) -> Miss:
    return Miss(shapes, ("part", None, None), note, MissingPart, message)


MISSES: dict[str, Miss] = {
    # Other models with a UNet.
    "the SDXL refiner": unsupported(refiner, "sdxl", "refiner", "give the base model"),
    "the SDXL refiner's UNet": unsupported(
        lambda: s.unet("diffusers", s.REFINER), "sdxl", "refiner", "give the base model"
    ),
    "Stable Diffusion 2": unsupported(
        lambda: {**s.under(UNET, s.unet("original", s.SD2)), **only(known("sd1"), VAE)}, "sd2", "2.x", "give a Stable"
    ),
    "Stable Diffusion 2's UNet": unsupported(lambda: s.unet("diffusers", s.SD2), "sd2", "2.x", "give a Stable"),
    "an LCM": unsupported(
        lambda: {**s.under(UNET, s.lcm("original")), **without(known("sd1"), UNET)}, "sd1", "lcm", LCM
    ),
    "an LCM's UNet": unsupported(lambda: s.lcm("diffusers"), "sd1", "lcm", LCM),
    "an SDXL LCM's UNet": unsupported(lambda: s.lcm("diffusers", SDXL_UNET), "sdxl", "lcm", LCM),
    "an LCM converted": unsupported(
        lambda: renamed(s.under(UNET, s.lcm("original")), "time_embed.cond", "time_embedding.cond"), "sd1", "lcm", LCM
    ),
    "the 4x upscaler": unsupported(lambda: s.under(UNET, s.upscaler("original")), "sd2", "x4-upscaler", "enlarges"),
    "the 4x upscaler's UNet": unsupported(lambda: s.upscaler("diffusers"), "sd2", "x4-upscaler", "enlarges"),
    "InstructPix2Pix": Miss(
        lambda: known("sd1-instruct-pix2pix"),
        ("model", "sd1", "instruct-pix2pix"),
        EIGHT,
        UnsupportedModel,
        "Stable Diffusion instruct-pix2pix: recognised, but its UNet takes 8 channels",
    ),
    # Other models with a transformer, or nothing like ours.
    "PixArt": stranger(s.pixart, "PixArt"),
    "Stable Video Diffusion": stranger(
        lambda: s.under(
            UNET,
            {**s.unet("original", s.SD2), "input_blocks.1.0.time_stack.in_layers.0.weight": (320,)},
        ),
        "Stable Video Diffusion",
    ),
    # What goes with a model.
    "a ControlNet": attachment(s.controlnet, "controlnet", "sd1", r"a ControlNet \(original\) for sd1"),
    "a ControlNet for diffusers": attachment(
        s.controlnet_diffusers, "controlnet", "sd1", r"a ControlNet \(diffusers\) for sd1"
    ),
    "a ControlNet for SDXL": attachment(
        lambda: s.controlnet_diffusers(SDXL_UNET), "controlnet", "sdxl", r"a ControlNet \(diffusers\) for sdxl"
    ),
    "a union ControlNet": attachment(s.controlnet_union, "controlnet", "sdxl", r"a ControlNet \(diffusers\) for sdxl"),
    "a LoRA by kohya": attachment(lambda: s.kohya_lora(s.SD1), "lora", "sd1", r"a LoRA \(kohya\) for sd1"),
    "a LoRA by kohya for SDXL": attachment(
        lambda: s.kohya_lora(SDXL_UNET), "lora", "sdxl", r"a LoRA \(kohya\) for sdxl"
    ),
    "a LoRA by kohya for Stable Diffusion 2": attachment(
        lambda: s.kohya_lora(s.SD2), "lora", "sd2", r"a LoRA \(kohya\) for sd2"
    ),
    "a LoRA by diffusers": attachment(lambda: s.diffusers_lora(s.SD1), "lora", "sd1", r"a LoRA \(diffusers\) for sd1"),
    "a LoRA by diffusers for SDXL": attachment(
        lambda: s.diffusers_lora(SDXL_UNET), "lora", "sdxl", r"a LoRA \(diffusers\) for sdxl"
    ),
    "a T2I-Adapter": attachment(s.t2i_adapter, "t2i_adapter", None, r"a T2I-Adapter \(original\)"),
    "a T2I-Adapter for diffusers": attachment(
        s.t2i_adapter_diffusers, "t2i_adapter", None, r"a T2I-Adapter \(diffusers\)"
    ),
    "an IP-Adapter": attachment(s.ip_adapter, "ip_adapter", "sd1", r"an IP-Adapter \(original\) for sd1"),
    "an IP-Adapter for SDXL": attachment(
        lambda: s.ip_adapter(SDXL_UNET, 1280), "ip_adapter", "sdxl", r"an IP-Adapter \(original\) for sdxl"
    ),
    "an image encoder": attachment(s.image_encoder, "image_encoder", None, r"CLIP's image encoder \(transformers\)"),
    "a motion module": attachment(
        s.motion_module, "motion_module", "sd1", r"an AnimateDiff motion module \(original\) for sd1"
    ),
    "textual inversion alone": Miss(
        lambda: {"emb_params": (4, 768)},
        ("embedding", None, None),
        f"{GOES}; give it beside one, and write its file's name in a prompt",
        NotAModel,
        "a textual inversion embedding, which goes with a model and is none; give the model too, and write 'x'",
    ),
    # Damage.
    "half a file": damaged(
        lambda: first_half(known("sd1")),
        "part",
        "sd1",
        None,
        MissingKeys,
        r"566 tensors of the layout unet/original \(Stable Diffusion 1\.x\) are missing: "
        r"'model\.diffusion_model\.input_blocks\.\d.* and 563 more",
    ),
    "half an SDXL UNet": damaged(
        lambda: first_half(known("sdxl-unet-diffusers")),
        "part",
        "sdxl",
        "base",
        MissingKeys,
        r"840 tensors of the layout unet/diffusers are missing: 'up_blocks\.0.* and 837 more",
    ),
    "a UNet without its way up": damaged(
        lambda: without(known("sd1-unet-diffusers"), "up_blocks."),
        "part",
        "sd1",
        "1.x",
        MissingKeys,
        r"384 tensors of the layout unet/diffusers are missing: 'up_blocks\.0",
    ),
    "a whole file without one tensor": damaged(
        lambda: without(known("sdxl-base"), UNET + "middle_block.0.out_layers.3.bias"),
        "model",
        "sdxl",
        "base",
        MissingKeys,
        r"1 tensor of the layout unet/original .*is missing: 'middle_block\.0\.out_layers\.3\.bias'",
    ),
    "a renamed key": damaged(
        lambda: renamed(known("sd1-unet-diffusers"), CONV, "down_blocks.0.resnets.0.convolution.weight"),
        "part",
        "sd1",
        None,
        MissingKeys,
        r"1 tensor of the layout unet/diffusers .*is missing: 'down_blocks\.0\.resnets\.0\.conv1\.weight'; "
        r"1 that it does not have is there: 'down_blocks\.0\.resnets\.0\.convolution\.weight'",
    ),
    "one of the keys that it is known by renamed": damaged(
        lambda: renamed(known("kolors-unet"), "conv_norm_out.weight", "norm_out.weight"),
        "part",
        "kolors",
        None,
        MissingKeys,
        r"1 tensor of the layout unet/diffusers \(Kolors\) is missing: 'conv_norm_out\.weight'; "
        r"1 that it does not have is there: 'norm_out\.weight'",
    ),
    "a wrong shape": damaged(
        lambda: {**known("sd1"), UNET + "input_blocks.1.0.in_layers.2.weight": (320, 320, 1, 1)},
        "model",
        "sd1",
        "1.x",
        WrongShape,
        r"'input_blocks\.1\.0\.in_layers\.2\.weight' is \(320, 320, 1, 1\), but .* has \(320, 320, 3, 3\) there",
    ),
    "an extra block": damaged(
        extra_block,
        "part",
        "sd1",
        "1.x",
        UnexpectedKeys,
        r"26 tensors do not belong to the layout unet/diffusers: 'down_blocks\.0\.attentions\.2\..* and 23 more",
    ),
    "an unknown tensor beside the parts": damaged(
        lambda: {**known("sd1"), "my_adapter.weight": (4, 4)},
        "model",
        "sd1",
        "1.x",
        UnexpectedKeys,
        r"1 tensor does not belong to the layout sd1: 'my_adapter\.weight'",
    ),
    # Parts.
    "SDXL's second text encoder alone": alone(
        lambda: known("sdxl-text-encoder-2"),
        "clip alone; families with such a part: .*sdxl",
        r"only (the clip_g of SDXL|clip) to make a model of; give also .*the unet of SDXL "
        r"\(.*sd_xl_base_1\.0\.safetensors.*\), the clip_l of SDXL \(.*clip_l\.safetensors\), the vae of SDXL \(",
    ),
    "an autoencoder of 16 channels alone": alone(
        lambda: known("flux-vae-diffusers"),
        "vae alone; families with such a part: flux",
        r"only (the vae of FLUX\.1|vae) to make a model of; give also the transformer of FLUX\.1 \(.*\), the clip of",
    ),
    "CLIP with its vision tower alone": alone(
        s.whole_clip,
        "clip alone; families with such a part: flux, sd1, sdxl",
        "only clip to make a model of; give also .* or the unet of Stable Diffusion 1.x .* or the unet of SDXL",
    ),
    "a UNet alone": Miss(
        lambda: known("sdxl-unet-diffusers"),
        ("part", "sdxl", "base"),
        NEEDS_SDXL,
        MissingPart,
        r"a SDXL model without its clip_l and its clip_g and its vae; give also for the clip_l the folder "
        r"text_encoder/.*; for the clip_g .*; for the vae the folder vae/",
    ),
    "nothing known": Miss(
        lambda: {"thing.weight": (3, 3), "other.bias": (3,)},
        ("unknown", None, None),
        "no known model",
        LoadError,
        r"no known model: its tensors are called thing\.weight, other\.bias.*; supported: FLUX\.1, ",
    ),
}


@pytest.mark.parametrize("name", MISSES)
def test_a_near_miss_gets_its_own_answer(tmp_path: Path, name: str) -> None:
    miss = MISSES[name]
    path = header_only(tmp_path / "x.safetensors", miss.shapes())
    seen = describe(path)
    assert (seen.kind, seen.family, seen.variant) == miss.seen
    assert re.search(miss.note, seen.note), seen.note
    assert seen.supported == (miss.error is MissingPart)  # a sound part is of use with others
    with pytest.raises(miss.error, match=miss.message) as raised:
        load(path)
    assert str(raised.value).startswith(str(path))
    assert len(str(raised.value).replace(str(path), "")) < LONGEST
    assert len(seen.note) < LONGEST


def test_the_near_misses_are_the_published_files(capsys: pytest.CaptureFixture[str]) -> None:
    """As far as hashes of theirs are known; an IP-Adapter's are of its pickle, which holds two tables."""
    published = {
        "091b0e30e77c76626b3ba62acdf95343": fingerprint(s.controlnet()),
        "31d2d9614fba60511fc9bf2604aa01f7": fingerprint(s.controlnet_union()),
        "468625de46d76ccee852e47f38115ed8": fingerprint(s.controlnet_union(6)),
        "d78aa6797382a6d455362358a3295ea9": fingerprint(s.image_encoder()),
        "399c81f2f8de8d1843d0127a00f3c224": fingerprint(s.image_encoder(1664, 48, 1280, 8192)),
        "5da81baee73198a7c19e6d2fe8b5148e": fingerprint(s.whole_clip()),
        "c96a285a6888465f87de22a984d049fb": fingerprint(s.motion_module()),
        "e291636cc15e803186b47404262ef812": fingerprint_of_tables(s.ip_adapter()),
        "a64eac9aa0db4b9602213bc0131281c7": fingerprint_of_tables(s.ip_adapter(SDXL_UNET, 1280)),
    }
    with capsys.disabled():
        same = sum(theirs == ours for theirs, ours in published.items())
        print(f"\nnear misses: {len(MISSES)} files, {len(FILES)} damaged or other ones, {len(TOGETHER)} combinations;")
        print(f"adapters that they are made of: {same} of {len(published)} published hashes reproduced")
    assert list(published.values()) == list(published)


def items(shapes: Shapes) -> list[str]:
    return sorted([f"{key}:{'_'.join(map(str, shape))}" for key, shape in shapes.items()] + list(shapes))


def fingerprint(shapes: Shapes) -> str:
    return hashlib.md5(",".join(items(shapes)).encode()).hexdigest()


def fingerprint_of_tables(shapes: Shapes) -> str:
    tables = [
        f"{name}|" + ",".join(items({key.removeprefix(name + "."): shapes[key] for key in only(shapes, name + ".")}))
        for name in ("image_proj", "ip_adapter")
    ]
    return hashlib.md5(",".join(sorted(tables)).encode()).hexdigest()


# ---- files that are damaged, or something else


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


# name: content (made of a sound file's), what is said
FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty.safetensors": (lambda sound: b"", "0 bytes, too short for a safetensors file; fetch it again"),
    "header.safetensors": (lambda sound: sound[:99], "cut short within its header: 99 bytes .* fetch it again"),
    "weights.safetensors": (cut, r"cut short: [\d,]+ bytes are present, [\d,]+ were expected; fetch it again"),
    "model.onnx": (lambda sound: b"\x08\x07\x12\x07pytorch" + bytes(99), "an ONNX graph; take the model's safeten"),
    "page.safetensors": (lambda sound: b"<!DOCTYPE html><html>" * 9, "a page of a web site.*fetch it again"),
    "page.ckpt": (lambda sound: b"<html><body>Sign in</body></html>" * 9, "a page of a web site.*fetch it again"),
    "pointer.safetensors": (
        lambda sound: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265146304\n",
        "a Git LFS pointer.*git lfs pull",
    ),
    "config.json": (lambda sound: b'{"_class_name": "UNet2DConditionModel"}', "JSON text; give the folder"),
    "notes.txt": (lambda sound: b"Trigger words: pixel art. Use at 0.8.", "text; give a file of weights"),
    "picture.safetensors": (lambda sound: b"\x89PNG\r\n\x1a\n" + bytes(99), "a picture; give the model, and"),
    "model.7z": (lambda sound: b"7z\xbc\xaf\x27\x1c" + bytes(99), "a packed archive; unpack it"),
    "part.ckpt": (lambda sound: b"PK\x03\x04" + bytes(99), "the archive's directory is missing.*fetch it again"),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_and_other_files_are_told(tmp_path: Path, name: str) -> None:
    change, message = FILES[name]
    sound = header_only(tmp_path / "sound.safetensors", {"a.weight": (4096, 2), "b.weight": (64, 64)}).read_bytes()
    path = tmp_path / name
    path.write_bytes(change(sound))
    for ask in (describe, load):
        with pytest.raises(DamagedFile, match=message) as raised:
            ask(path)
        assert str(raised.value).startswith(str(path))


# ---- what does not go together

LORA = r"attach it to the model: --lora FILE on the command line, or Model\.attach\(FILE\)"
# files by name: what load says
TOGETHER: dict[str, tuple[tuple[Callable[[], Shapes], ...], type[CalotypeError], str]] = {
    "two UNets of different families": (
        (lambda: known("sd1-unet-diffusers"), lambda: known("sdxl-unet-diffusers")),
        LoadError,
        r"0\.safetensors holds the unet of Stable Diffusion 1\.x, .*1\.safetensors holds the unet of SDXL; give the "
        r"files of one model$",
    ),
    "a whole model and a UNet of another family": (
        (lambda: known("kolors-unet"), lambda: known("sd1")),
        LoadError,
        r"1\.safetensors holds the unet of Stable Diffusion 1\.x, .*0\.safetensors holds the unet of Kolors; give the",
    ),
    "two UNets of one family": (
        (lambda: known("sd1-unet-diffusers"), lambda: known("sd1-original-unet")),
        LoadError,
        r"the unet is given twice, by .*0\.safetensors and by .*1\.safetensors; leave one of them out",
    ),
    "an autoencoder of 16 channels for Stable Diffusion 1": (
        (lambda: known("sd1"), lambda: known("flux-vae-diffusers")),
        WrongShape,
        r"1\.safetensors: an autoencoder with latent channels: 16, but this Stable Diffusion 1\.x UNet takes 4; it "
        r"belongs to another family or model",
    ),
    "CLIP for Kolors": (
        (lambda: known("kolors-unet"), lambda: known("sdxl-text-encoder-2")),
        LoadError,
        r"1\.safetensors: a clip, which goes with SDXL.*, and not with the Kolors model among the sources; leave it",
    ),
    "a LoRA beside its model": (
        (lambda: known("sd1"), lambda: s.kohya_lora(s.SD1)),
        NotAModel,
        rf"1\.safetensors: a LoRA \(kohya\) for sd1, which goes with a model and is none; {LORA}",
    ),
    "the refiner beside the base": (
        (lambda: known("sdxl-base"), refiner),
        UnsupportedModel,
        r"1\.safetensors: the unet of sdxl refiner, which does not go with the other sources \(SDXL\)",
    ),
    "one of SDXL's encoders": (
        (lambda: known("sdxl-unet-diffusers"), lambda: known("sdxl-text-encoder")),
        MissingPart,
        "a SDXL model without its clip_g and its vae; give also for the clip_g .*; for the vae ",
    ),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_what_does_not_go_together_is_told(tmp_path: Path, name: str) -> None:
    shapes, error, message = TOGETHER[name]
    paths = [header_only(tmp_path / f"{i}.safetensors", each()) for i, each in enumerate(shapes)]
    with pytest.raises(error, match=message) as raised:
        load(*paths)
    assert len(str(raised.value).replace(str(tmp_path), "")) < LONGEST
