from __future__ import annotations

import collections
import contextlib
import itertools
import json
import math
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import tiny_stable as stable
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from calotype.checkpoint.autoencoders import AUTOENCODER, TINY_AUTOENCODER
from calotype.checkpoint.files import Weights
from calotype.checkpoint.text_encoders import CLIP, T5
from calotype.checkpoint.writing import Planned, header, write_random
from calotype.errors import (
    DamagedFile,
    LoadError,
    MissingKeys,
    MissingPart,
    NotAModel,
    OutputError,
    RequestError,
    SourceNotFound,
    UnexpectedKeys,
    UnknownModel,
    UnsafeFile,
    UnsupportedModel,
    WrongShape,
)
from calotype.families.flux import DEV_DEFAULTS, FluxModel
from calotype.families.flux.config import DEV
from calotype.families.flux.family import VAE as FLUX_VAE
from calotype.families.flux.keys import TRANSFORMER
from calotype.families.unets import UNetModel
from calotype.generate import Model
from calotype.loading import convert, describe, load, manifest
from calotype.nn.tiny_autoencoder import TinyAutoencoder
from calotype.text.clip import VIT_L
from calotype.text.t5 import XXL


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Local paths never touch the network."""

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def flux(model: Model[Any]) -> FluxModel:
    assert isinstance(model.family, FluxModel)
    return model.family


def networks(model: Model[Any]) -> dict[str, nn.Module]:
    family = flux(model)
    return {"transformer": family.transformer, "clip": family.clip, "t5": family.t5, "vae": family.vae}


def state(model: Model[Any]) -> dict[str, Tensor]:
    return {f"{name}.{key}": t for name, net in networks(model).items() for key, t in net.state_dict().items()}


def equal(a: Model[Any], b: Model[Any]) -> bool:
    first, second = state(a), state(b)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# ---- what loads


def test_parts_load_in_any_order(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    parts = [files[name] for name in ("transformer", "clip", "t5", "vae")]
    reference = load(*parts)
    for order in itertools.islice(itertools.permutations(parts), 3, None, 7):
        assert equal(load(*order), reference)
    assert reference.name == "flux/dev"
    assert flux(reference).transformer.config == tiny.FLUX
    assert flux(reference).clip.config == tiny.CLIP_TEXT
    assert flux(reference).t5.config == tiny.T5_TEXT
    assert flux(reference).vae.config == tiny.VAE


def test_weights_are_what_the_files_hold_frozen_and_in_eval(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    model = load(files["transformer"], files["clip"], files["t5"], files["vae"])
    stored = load_file(files["transformer"])
    assert torch.equal(flux(model).transformer.image_in.weight, stored["img_in.weight"])
    assert not any(tensor.requires_grad for tensor in state(model).values())
    assert not any(network.training for network in networks(model).values())
    assert not any(tensor.is_meta for tensor in state(model).values())


def test_loose_files_in_a_folder_make_a_model(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    assert equal(load(tmp_path), load(files["transformer"], files["clip"], files["t5"], files["vae"]))


def test_everything_in_one_file_loads(tmp_path: Path) -> None:
    tiny.originals(tmp_path / "parts")
    path = tiny.save(tmp_path / "all.safetensors", tiny.everything())
    tiny.clip_tokenizer(tmp_path / "tokenizer")
    tiny.t5_tokenizer(tmp_path / "tokenizer_2")
    assert equal(load(path), load(tmp_path / "parts"))


def test_a_pipeline_folder_loads_with_its_scheduler(tmp_path: Path) -> None:
    model = load(tiny.pipeline(tmp_path))
    assert flux(model).transformer.config == tiny.FLUX
    assert (flux(model).sampling.shift, flux(model).sampling.dynamic) == (2.5, False)
    assert model.family.source == str(tmp_path)
    picture = model.generate("a red fox", width=32, height=32, steps=2, seed=1, text_tokens=16)
    assert picture.size == (32, 32)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_tiny_autoencoder_takes_the_large_ones_place(tmp_path: Path) -> None:
    folder = tiny.pipeline(tmp_path / "model", tiny_vae=True)
    model = load(folder)
    assert isinstance(flux(model).vae, TinyAutoencoder)
    assert flux(model).vae.config == tiny.TINY_VAE
    halves = tiny.tensors(TINY_AUTOENCODER, "taesd", tiny.TINY_VAE, seed=9)
    paths = [
        tiny.save(
            tmp_path / f"taef1_{side}.safetensors",
            {key.removeprefix(side + "."): value for key, value in halves.items() if key.startswith(side)},
        )
        for side in ("decoder", "encoder")
    ]
    parts = [folder / name for name in ("transformer", "text_encoder", "text_encoder_2")]
    halved = load(*parts, *paths)
    assert torch.equal(flux(halved).vae.state_dict()["encoder.layers.0.weight"], halves["encoder.0.weight"])
    assert torch.equal(flux(halved).vae.state_dict()["decoder.layers.0.weight"], halves["decoder.1.weight"])
    with pytest.raises(MissingPart, match="its encoder is in another file"):
        load(*parts, paths[0])


def test_a_sharded_encoder_loads_from_any_of_its_files(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    whole = load_file(files["t5"])
    keys = sorted(whole)
    for number in (1, 2):
        tiny.save(
            tmp_path / f"t5-0000{number}-of-00002.safetensors", {key: whole[key] for key in keys[number - 1 :: 2]}
        )
    others = [files[name] for name in ("transformer", "clip", "vae")]
    sharded = load(*others, tmp_path / "t5-00002-of-00002.safetensors")
    assert equal(sharded, load(*others, files["t5"]))


def test_schnell_is_known_by_its_lack_of_a_guidance_input(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    config = replace(tiny.FLUX, guidance_input=False)
    path = tiny.save(tmp_path / "schnell.safetensors", tiny.tensors(TRANSFORMER, "original", config))
    model = load(path, files["clip"], files["t5"], files["vae"])
    assert model.name == "flux/schnell"
    assert (flux(model).sampling.dynamic, model.family.defaults.steps) == (False, 4)


def test_a_folder_may_name_itself_and_its_defaults(tmp_path: Path) -> None:
    folder = tiny.pipeline(tmp_path)
    tiny.write_json(folder / "calotype.json", {"variant": "mine", "defaults": {"width": 128, "height": 64, "steps": 3}})
    model = load(folder)
    assert model.name == "flux/mine"
    assert describe(folder).variant == "mine"
    defaults = model.family.defaults
    assert (defaults.width, defaults.height, defaults.steps) == (128, 64, 3)
    assert defaults.cfg_scale == DEV_DEFAULTS.cfg_scale
    for wrong in ("widht", "grain"):
        tiny.write_json(folder / "calotype.json", {"defaults": {wrong: 128}})
        with pytest.raises(DamagedFile, match=f"'{wrong}'"):
            load(folder)
    tiny.write_json(folder / "calotype.json", {"defaults": {"steps": "many"}})
    with pytest.raises(DamagedFile, match="steps = 'many'"):
        load(folder)


def test_harmless_extras_load(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    clip = load_file(files["clip"])
    clip["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    clip["text_projection.weight"] = torch.eye(64)
    clip["logit_scale"] = torch.zeros(())
    t5 = load_file(files["t5"])
    t5["encoder.embed_tokens.weight"] = t5.pop("shared.weight")
    parts = [
        files["transformer"],
        files["vae"],
        tiny.save(tmp_path / "clip_2.safetensors", clip),
        tiny.save(tmp_path / "t5_2.safetensors", t5),
    ]
    assert equal(load(*parts), load(*(files[name] for name in ("transformer", "clip", "t5", "vae"))))


# ---- types and memory


def test_types_are_kept_unless_another_is_asked_for(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path, dtype=torch.bfloat16)
    vae = tiny.save(tmp_path / "ae32.safetensors", tiny.tensors(AUTOENCODER, "original", tiny.VAE))
    parts = [files["transformer"], files["clip"], files["t5"], vae]
    kept = load(*parts)
    assert flux(kept).transformer.image_in.weight.dtype == torch.bfloat16
    assert flux(kept).vae.decoder.conv_in.weight.dtype == torch.float32  # pyright: ignore[reportAttributeAccessIssue]
    for asked, wanted in (("float32", torch.float32), (torch.float16, torch.float16)):
        assert {tensor.dtype for tensor in state(load(*parts, dtype=asked)).values()} == {wanted}


def test_mixed_files_come_in_one_type(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    stored = load_file(files["transformer"])
    mixed = {key: tensor.bfloat16() if tensor.ndim > 1 else tensor for key, tensor in stored.items()}
    others = [files["clip"], files["t5"], files["vae"]]
    model = load(tiny.save(tmp_path / "mixed.safetensors", mixed), *others)
    weights = flux(model).transformer.state_dict()
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert torch.equal(weights["image_in.weight"], mixed["img_in.weight"])


def test_loaded_tensors_share_the_file_mapping(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    model = load(files["transformer"], files["clip"], files["t5"], files["vae"])
    tensors = list(flux(model).transformer.state_dict().values())
    size = files["transformer"].stat().st_size
    places = [tensor.data_ptr() for tensor in tensors]
    assert max(places) - min(places) < size  # one region, no larger than the file
    maps = Path("/proc/self/maps")
    if maps.exists():
        lines = [line for line in maps.read_text().splitlines() if line.endswith(str(files["transformer"]))]
        regions = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
        assert all(any(start <= place < stop for start, stop in regions) for place in places)


def test_resident_memory_reads_everything(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    parts = [files[name] for name in ("transformer", "clip", "t5", "vae")]
    model = load(*parts, memory="resident")
    assert equal(model, load(*parts))
    before = {key: tensor.clone() for key, tensor in state(model).items()}
    for part in parts:
        part.write_bytes(bytes(part.stat().st_size))
    assert all(torch.equal(tensor, before[key]) for key, tensor in state(model).items())


PEAK = """
import re, sys
import torch
from calotype.checkpoint.files import Weights
from calotype.checkpoint.layouts import Found
from calotype.families.flux.config import DEV
from calotype.families.flux.family import VAE as FLUX_VAE
from calotype.families.flux.keys import TRANSFORMER
from calotype.loading import Chosen, _completed, _network
from calotype.families import FAMILIES

def memory(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024

from pathlib import Path
weights = Weights.of("x", [Path(sys.argv[1])])
found = Found(TRANSFORMER, TRANSFORMER.layout(sys.argv[2]), "", weights, {})
torch.ones(10) @ torch.ones(10)
before = memory("VmRSS")
dtype = getattr(torch, sys.argv[3])
built = _network(Chosen(FAMILIES[0].backbone, found, None), found.config(), dtype, None, False)
network = _completed(built, torch.device("cpu")).network
loaded = memory("VmHWM")
total = sum(float(tensor.sum()) for tensor in network.state_dict().values())  # every page is touched
size = sum(tensor.nbytes for tensor in network.state_dict().values())
print((loaded - before) / size, (memory("VmHWM") - before) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory counters")
@pytest.mark.parametrize(
    ("layout", "dtype", "at_loading"),
    [("original", "bfloat16", 0.05), ("diffusers", "bfloat16", 0.6), ("diffusers", "float32", 1.05)],
)
def test_the_peak_of_loading_stays_near_the_weights(tmp_path: Path, layout: str, dtype: str, at_loading: float) -> None:
    config = replace(tiny.FLUX, width=1024, heads=8, joint_blocks=2, single_blocks=4, mlp_ratio=4)
    chosen = TRANSFORMER.layout(layout)
    assert chosen is not None
    _, binding = TRANSFORMER.bind(chosen, config)
    path = tmp_path / "x.safetensors"
    write_random(path, binding.manifest(), torch.bfloat16)
    assert path.stat().st_size > 150e6
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path), layout, dtype], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded, touched = map(float, done.stdout.split())
    assert loaded < at_loading
    assert touched < 1.15
    print(f"{layout} to {dtype}: {loaded:.2f} of the weights when loaded, {touched:.2f} when used")


def test_a_bad_device_dtype_or_memory_is_a_request_error(tmp_path: Path) -> None:
    folder = tiny.pipeline(tmp_path)
    for options in ({"device": "abacus"}, {"dtype": "float7"}, {"dtype": torch.int8}, {"memory": "cloud"}):
        with pytest.raises(RequestError, match=next(iter(options))):
            load(folder, **options)  # pyright: ignore[reportArgumentType]
    if not torch.cuda.is_available():
        with pytest.raises(RequestError, match="no CUDA device"):
            load(folder, device="cuda")


# ---- what does not load


def test_missing_sources_are_not_found(tmp_path: Path) -> None:
    for source in (tmp_path / "none.safetensors", "none.safetensors", "./a/b", "a/b/c", "/a/b"):
        with pytest.raises(SourceNotFound, match="no such file or folder"):
            load(source)


def test_a_missing_part_is_named_with_where_to_get_it(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    parts = {name: files[name] for name in ("transformer", "clip", "t5", "vae")}
    for lacking in parts:
        with pytest.raises(MissingPart, match=f"without its {lacking}; give also|the {lacking} of FLUX"):
            load(*(path for name, path in parts.items() if name != lacking))


def test_a_part_given_twice_is_refused(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    with pytest.raises(LoadError, match=r"the vae is given twice"):
        load(*(files[name] for name in ("transformer", "clip", "t5", "vae")), tiny.pipeline(tmp_path / "x") / "vae")


def test_parts_of_another_size_or_family_are_refused(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    sd_vae = tiny.save(
        tmp_path / "sd_vae.safetensors",
        tiny.tensors(AUTOENCODER, "original", replace(tiny.VAE, latent_channels=4, quant_convs=True)),
    )
    with pytest.raises(WrongShape, match=r"sd_vae.*latent channels: 4.*takes 16"):
        load(files["transformer"], files["clip"], files["t5"], sd_vae)
    wide = tiny.save(
        tmp_path / "wide.safetensors", tiny.tensors(CLIP, "transformers", replace(tiny.CLIP_TEXT, width=128))
    )
    with pytest.raises(WrongShape, match=r"wide.*width 128.*takes 64"):
        load(files["transformer"], wide, files["t5"], files["vae"])
    unet = tiny.save(
        tmp_path / "unet.safetensors",
        {
            "label_emb.0.0.weight": torch.zeros(1536, 2560),
            "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(768, 1280),
        },
    )
    with pytest.raises(UnsupportedModel, match=r"unet of sdxl refiner.*does not go with the other sources"):
        load(files["transformer"], files["clip"], files["t5"], files["vae"], unet)
    with pytest.raises(UnsupportedModel, match=r"sdxl refiner: recognised, but not supported yet"):
        load(unet)


def test_attachments_pickles_and_strangers_are_refused(tmp_path: Path) -> None:
    lora = tiny.save(
        tmp_path / "style.safetensors",
        {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 8)},
    )
    with pytest.raises(NotAModel, match=r"style\.safetensors: a LoRA \(diffusers\) for flux"):
        load(lora)
    with pytest.raises(NotAModel, match="a LoRA"):
        load(tiny.pipeline(tmp_path / "model"), lora)
    for name in ("x.ckpt", "x.safetensors"):
        torch.save({"a": torch.zeros(1), "b": print}, tmp_path / name)
        with pytest.raises(UnsafeFile, match=r"asks for '(__builtin__|builtins)\.print'"):
            load(tmp_path / name)
    with pytest.raises(UnknownModel, match=r"no known model: its tensors are called thing\.weight"):
        load(tiny.save(tmp_path / "thing.safetensors", {"thing.weight": torch.zeros(1)}))


def test_pickles_of_the_same_tensors_make_the_same_model(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    wanted = load(tmp_path)
    for number, name in enumerate(("transformer", "clip", "t5", "vae")):
        content = load_file(files[name])
        files[name].unlink()
        saved = {"state_dict": content, "epoch": 3, "callbacks": {}} if number % 2 else content
        torch.save(saved, files[name].with_suffix(".ckpt"), _use_new_zipfile_serialization=number < 2)
    assert equal(load(tmp_path), wanted)
    assert equal(load(tmp_path, memory="resident"), wanted)


class Callback:
    """Stands for what a trainer leaves in its checkpoints."""


@pytest.mark.parametrize(("zipped", "dtype"), [(True, torch.float32), (False, torch.float16)], ids=["zip", "legacy"])
def test_a_training_checkpoint_makes_the_same_model_as_its_safetensors(
    tmp_path: Path, zipped: bool, dtype: torch.dtype
) -> None:
    state_dict = {**stable.sd1(dtype), "model_ema.decay": torch.tensor(0.9999), "betas": torch.linspace(0, 1, 1000)}
    tokenizers = stable.tokenizers(tmp_path)
    safe = tiny.save(tmp_path / "v1.safetensors", state_dict)
    # Optimizers hold tensors as large as the model's own, and some trainers give them the same names.
    moments = {key: torch.full_like(tensor, 7) for key, tensor in state_dict.items()}
    content: dict[str, Any] = {
        "epoch": 6,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "optimizer": moments,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(4)}}, "param_groups": [{"params": [0], "lr": 1e-4}]}],
        "callbacks": {Callback: {"best": torch.tensor(0.1), "self": Callback()}},
        "lr_schedulers": [{"base_lrs": [1e-4]}],
        "state_dict": collections.OrderedDict(state_dict),
    }
    pickled = tmp_path / "v1.ckpt"
    torch.save(content, pickled, _use_new_zipfile_serialization=zipped)

    def weights(path: Path, memory: str) -> dict[str, Tensor]:
        family: Any = load(path, *tokenizers, memory=memory).family
        assert isinstance(family, UNetModel)
        parts = {"unet": family.backbone, "vae": family.vae, **{str(i): e for i, e in enumerate(family.encoders)}}
        return {f"{name}.{key}": tensor for name, net in parts.items() for key, tensor in net.state_dict().items()}

    wanted = weights(safe, "auto")
    for memory in ("auto", "resident"):
        found = weights(pickled, memory)
        assert found.keys() == wanted.keys()
        assert all(found[key].dtype == wanted[key].dtype for key in wanted)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    for one, other in zip(describe(pickled).parts, describe(safe).parts, strict=True):
        assert replace(one, files=()) == replace(other, files=())


def as_shards(file: Path, stem: str, content: dict[str, Tensor]) -> None:
    """In the place of a safetensors file, two pickles and their index, as transformers and diffusers write them."""
    names = [f"{stem}-{number:05}-of-00002.bin" for number in (1, 2)]
    weight_map = {key: names[number % 2] for number, key in enumerate(sorted(content))}
    for name in names:
        torch.save({key: content[key] for key in content if weight_map[key] == name}, file.with_name(name))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    tiny.write_json(file.with_name(f"{stem}.bin.index.json"), index)
    file.unlink()


def test_a_folder_of_sharded_pickles_makes_the_same_model(tmp_path: Path) -> None:
    wanted = load(tiny.pipeline(tmp_path / "safe"))
    folder = tiny.pipeline(tmp_path / "model")
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder_2", "pytorch_model")):
        (file,) = (folder / part).glob("*.safetensors")
        as_shards(file, stem, load_file(file))
    assert equal(load(folder), wanted)
    # A folder of transformers by itself too, and one of its shards.
    parts = [folder / name for name in ("transformer", "text_encoder", "vae", "tokenizer", "tokenizer_2")]
    for encoder in ("text_encoder_2", "text_encoder_2/pytorch_model-00002-of-00002.bin"):
        assert equal(load(*parts, folder / encoder), wanted)
    # What the index lists must be there: a shard of another model would otherwise go unnoticed.
    for index in folder.rglob("*.bin.index.json"):
        sound = index.read_text()
        weight_map = json.loads(sound)["weight_map"]
        tiny.write_json(index, {"weight_map": {**weight_map, "lost": next(iter(weight_map.values()))}})
        with pytest.raises(DamagedFile, match=r"in none of its shards, first 'lost'"):
            load(folder)
        index.write_text(sound)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_pickle_beside_safetensors_is_not_even_opened(tmp_path: Path, sharded: bool) -> None:
    wanted = load(tiny.pipeline(tmp_path / "safe"))
    folder = tiny.pipeline(tmp_path / "model")
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        (file,) = (folder / part).glob("*.safetensors")
        torch.save({"a": print}, file.with_name(f"{stem}.bin"))
        if not sharded:
            continue
        content = load_file(file)
        names = [f"{file.stem}-{number:05}-of-00002.safetensors" for number in (1, 2)]
        weight_map = {key: names[number % 2] for number, key in enumerate(sorted(content))}
        for name in names:
            tiny.save(file.with_name(name), {key: content[key] for key in content if weight_map[key] == name})
        tiny.write_json(file.with_name(f"{file.name}.index.json"), {"weight_map": weight_map})
        file.unlink()
    assert equal(load(folder), wanted)
    for part in ("transformer", "text_encoder"):
        assert describe(folder / part).parts
        for file in (folder / part).glob("*.safetensors*"):
            file.unlink()
        with pytest.raises(UnsafeFile, match="print"):  # now nothing stands before it
            load(folder)
        (folder / part).rename(tmp_path / f"{part}.done")
        (tmp_path / "safe" / part).rename(folder / part)


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    stored = load_file(files["transformer"])
    others = [files["clip"], files["t5"], files["vae"]]

    def altered(**changes: Tensor | None) -> Path:
        content = {key: tensor for key, tensor in {**stored, **changes}.items() if tensor is not None}
        return tiny.save(tmp_path / "altered.safetensors", content)

    with pytest.raises(MissingKeys, match=r"single_blocks\.1\.linear2\.bias") as missing:
        load(altered(**{"single_blocks.1.linear2.bias": None}), *others)
    assert missing.value.keys == ("single_blocks.1.linear2.bias",)
    with pytest.raises(MissingKeys, match=r"txt_in\.weight"):
        load(altered(**{"txt_in.weight": None}), *others)
    with pytest.raises(UnexpectedKeys, match=r"foo\.bar"):
        load(altered(**{"foo.bar": torch.zeros(1)}), *others)
    with pytest.raises(WrongShape, match=r"'txt_in\.bias' is \(3,\).*\(256,\)"):
        load(altered(**{"txt_in.bias": torch.zeros(3)}), *others)
    with pytest.raises(DamagedFile, match="numbered up to 900"):
        load(altered(**{"double_blocks.900.img_mod.lin.bias": torch.zeros(1)}), *others)
    # Under a prefix, what lies outside all parts is named too.
    path = tiny.save(tmp_path / "all.safetensors", {**tiny.everything(), "extra.thing": torch.zeros(1)})
    with pytest.raises(UnexpectedKeys, match=r"extra\.thing"):
        load(path)


def test_truncated_files_and_nonsense_settings_are_damage(tmp_path: Path) -> None:
    folder = tiny.pipeline(tmp_path / "model")
    config = folder / "transformer" / "config.json"
    settings = json.loads(config.read_text())
    for changes, error in (
        ({"axes_dims_rope": [1, 2, 3]}, DamagedFile),
        ({"axes_dims_rope": "none"}, DamagedFile),
        ({"patch_size": 2}, UnsupportedModel),
    ):
        tiny.write_json(config, {**settings, **changes})
        with pytest.raises(error):
            load(folder)
    tiny.write_json(config, settings)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    tiny.write_json(scheduler, {"_class_name": "DDIMScheduler"})
    with pytest.raises(UnsupportedModel, match="DDIMScheduler"):
        load(folder)
    tiny.write_json(scheduler, {"shift": "much"})
    with pytest.raises(DamagedFile, match="much"):
        load(folder)
    scheduler.unlink()
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DamagedFile, match="cut short"):
        load(folder)


def test_canny_and_depth_are_recognised_but_refused(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    config = replace(tiny.FLUX, image_width=2 * tiny.FLUX.image_width_out)
    path = tiny.save(tmp_path / "canny.safetensors", tiny.tensors(TRANSFORMER, "original", config))
    assert (describe(path).variant, describe(path).supported) == ("canny-depth-dev", False)
    with pytest.raises(UnsupportedModel, match="canny-depth-dev"):
        load(path, files["clip"], files["t5"], files["vae"])


def test_without_a_tokenizer_the_message_says_what_to_give(tmp_path: Path) -> None:
    files = tiny.originals(tmp_path)
    (files["tokenizer"] / "tokenizer.json").unlink()
    with pytest.raises(MissingPart, match=r"no tokenizer for this encoder of 40 tokens.*tokenizer/"):
        load(tmp_path)
    other = tiny.clip_tokenizer(tmp_path / "elsewhere" / "of_clip")
    assert flux(load(tmp_path, other)).clip_tokenizer.start == 0


def test_offline_a_hub_id_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceNotFound, match=r"org/name: no such file or folder here.*HF_HUB_OFFLINE"):
        load("org/name")


def test_a_hub_model_in_the_cache_loads_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--name"
    folder = tiny.pipeline(repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    assert equal(load("org/name"), load(folder))


def test_the_published_tokenizer_comes_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    files = tiny.originals(tmp_path / "parts")
    wide = replace(tiny.CLIP_TEXT, vocabulary=49408, end=49407)
    clip = tiny.save(tmp_path / "clip.safetensors", tiny.tensors(CLIP, "transformers", wide))
    parts = [files["transformer"], files["t5"], files["vae"], files["tokenizer_2"], clip]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(MissingPart, match="hf download openai/clip-vit-large-patch14 tokenizer.json"):
            load(*parts)
    repository = tmp_path / "cache" / "models--openai--clip-vit-large-patch14"
    folder = tiny.tokenizer(repository / "snapshots" / "0123abc", ["<|startoftext|>", "<|endoftext|>", "<cached>"])
    tiny.write_json(folder / "tokenizer_config.json", {"pad_token": "<cached>"})
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    assert flux(load(*parts)).clip_tokenizer.padding == 2


# ---- conversion


def same_file(a: Path, b: Path) -> bool:
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_part_converts_there_and_back(tmp_path: Path, dtype: torch.dtype) -> None:
    for part, config in ((TRANSFORMER, tiny.FLUX), (AUTOENCODER, tiny.VAE)):
        original = tiny.save(
            tmp_path / part.name / "a.safetensors", tiny.tensors(part, "original", config, dtype=dtype)
        )
        folder = tmp_path / part.name / "folder"
        convert(original, folder, "diffusers")
        assert (folder / "config.json").is_file()
        back = tmp_path / part.name / "b.safetensors"
        convert(folder, back, "original")
        assert same_file(original, back)
        assert describe(back).layout == "original"


def test_a_whole_model_converts_there_and_back(tmp_path: Path) -> None:
    for tiny_vae in (False, True):
        folder = tiny.pipeline(tmp_path / f"model{tiny_vae}", tiny_vae=tiny_vae)
        originals, back = tmp_path / f"originals{tiny_vae}", tmp_path / f"back{tiny_vae}"
        convert(folder, originals, "original")
        assert (originals / "flux1-dev.safetensors").is_file()
        convert(originals, back, "diffusers")
        for file in folder.glob("*/*.safetensors"):
            assert same_file(file, back / file.relative_to(folder))
        assert equal(load(originals), load(folder))
        assert equal(load(back), load(folder))
        assert flux(load(originals)).sampling == flux(load(folder)).sampling
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "scheduler"):
            for file in (folder / name).glob("*.json"):
                assert json.loads(file.read_text()) == json.loads((back / name / file.name).read_text())


def test_one_file_with_everything_becomes_a_folder(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "all.safetensors", tiny.everything())
    tiny.clip_tokenizer(tmp_path / "tokenizer")
    tiny.t5_tokenizer(tmp_path / "tokenizer_2")
    convert(path, tmp_path / "folder", "diffusers")
    assert equal(load(tmp_path / "folder", tmp_path / "tokenizer", tmp_path / "tokenizer_2"), load(path))


def test_diffusers_reads_what_is_converted(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = replace(tiny.FLUX, mlp_ratio=4)  # diffusers knows no other
    original = tiny.save(tmp_path / "a.safetensors", tiny.tensors(TRANSFORMER, "original", config))
    convert(original, tmp_path / "transformer", "diffusers")
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    stored = Weights.of("x", [tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"])
    assert all(torch.equal(tensor, stored.mapped(key)) for key, tensor in theirs.state_dict().items())
    vae = tiny.save(tmp_path / "ae.safetensors", tiny.tensors(AUTOENCODER, "original", tiny.VAE))
    convert(vae, tmp_path / "vae", "diffusers")
    assert diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae").config.latent_channels == tiny.VAE.latent_channels


def test_conversion_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    path = tiny.save(tmp_path / "a.safetensors", tiny.tensors(TRANSFORMER, "original", tiny.FLUX))
    folder = tiny.pipeline(tmp_path / "model")
    with pytest.raises(RequestError, match="layout"):
        convert(path, tmp_path / "out", "pickle")
    with pytest.raises(OutputError, match="exists already"):
        convert(path, folder, "diffusers")
    with pytest.raises(OutputError, match="exists already"):
        convert(folder / "transformer", path, "original")
    for source, layout in ((path, "diffusers"), (folder, "original")):
        with pytest.raises(RequestError, match="a folder"):
            convert(source, tmp_path / "out.safetensors", layout)
    with pytest.raises(UnknownModel, match="no known model"):
        convert(tiny.save(tmp_path / "x.safetensors", {"a.b": torch.zeros(1)}), tmp_path / "out", "original")
    assert not (tmp_path / "out").exists()


# ---- sizes


def test_the_real_flux_is_mapped_in_megabytes(tmp_path: Path) -> None:
    """34 GB of weights, all holes on disk: mapping them takes neither time nor memory, on a machine with less."""
    files = {"flux1-dev": "flux1-dev", "flux-ae": "ae", "flux-text-encoder": "clip_l", "t5xxl-fp16": "t5xxl"}
    for name, file in files.items():
        plan = [Planned(key, torch.bfloat16, shape) for key, shape in manifest(name)]
        head = header(plan, {})
        with (tmp_path / f"{file}.safetensors").open("wb") as out:
            out.write(head)
            out.truncate(len(head) + sum(2 * torch.Size(item.shape).numel() for item in plan))
    tiny.clip_tokenizer(tmp_path / "tokenizer")
    tiny.t5_tokenizer(tmp_path / "tokenizer_2")
    model = load(tmp_path)
    assert model.name == "flux/dev"
    assert flux(model).transformer.config == DEV
    assert flux(model).clip.config == VIT_L
    assert flux(model).t5.config == XXL
    assert flux(model).vae.config == FLUX_VAE
    assert sum(tensor.nbytes for tensor in state(model).values()) > 33e9


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.originals(tmp_path_factory.mktemp("parts"))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_nonsense_shapes_give_load_errors_only(parts: dict[str, Path], data: st.DataObject) -> None:
    part, layout_name, config = data.draw(
        st.sampled_from(
            [
                (TRANSFORMER, "original", tiny.FLUX),
                (TRANSFORMER, "diffusers", tiny.FLUX),
                (CLIP, "transformers", tiny.CLIP_TEXT),
                (T5, "transformers", tiny.T5_TEXT),
                (AUTOENCODER, "original", tiny.VAE),
                (TINY_AUTOENCODER, "diffusers-tiny", tiny.TINY_VAE),
            ]
        )
    )
    layout = part.layout(layout_name)
    assert layout is not None
    shapes = dict(part.bind(layout, config)[1].manifest())
    side = st.sampled_from([0, 1, 2, 3, 7, 64, 2**31])
    for key in data.draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, max_size=6)):
        shapes[key] = tuple(data.draw(st.lists(side, max_size=4)))
    head = header([Planned(key, torch.float32, shape) for key, shape in shapes.items()], {})
    size = sum(4 * math.prod(shape) for shape in shapes.values())
    path = parts["tokenizer"] / "x.safetensors"
    with path.open("wb") as out:
        out.write(head)
        out.truncate(len(head) + min(size, 2**40))
    others = [parts[name] for name in ("transformer", "clip", "t5", "vae") if name != part.name]
    with contextlib.suppress(LoadError):
        describe(path)
    with contextlib.suppress(LoadError):
        load(path, *others, parts["tokenizer"], parts["tokenizer_2"])


def test_pipelines_of_other_families_are_named(tmp_path: Path) -> None:
    folder = tiny.pipeline(tmp_path / "sd2")
    for name in ("transformer", "text_encoder_2"):
        (folder / name).rename(tmp_path / name)
    tiny.save(
        folder / "unet" / "diffusion_pytorch_model.safetensors",
        {
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, 1024),
            "conv_out.weight": torch.zeros(4, 320, 3, 3),
        },
    )
    (folder / "safety_checker").mkdir()
    torch.save({}, folder / "safety_checker" / "pytorch_model.bin")  # not needed to draw, so not looked at
    index = {name: ["library", "Class"] for name in ("unet", "text_encoder", "vae", "safety_checker")}
    tiny.write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline", **index})
    seen = describe(folder)
    assert (seen.kind, seen.family, seen.variant, seen.supported) == ("model", "sd2", "2.x", False)
    assert [part.name for part in seen.parts] == ["unet", "clip", "vae"]
    with pytest.raises(UnsupportedModel, match=r"the unet of sd2 2\.x: recognised, but not supported yet"):
        load(folder)
    tiny.write_json(folder / "model_index.json", {"_class_name": "OtherPipeline"})
    assert describe(folder).note == "no known model (OtherPipeline)"
    with pytest.raises(UnknownModel, match="an? OtherPipeline, which is not supported"):
        load(folder)
