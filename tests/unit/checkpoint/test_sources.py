from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import torch
from safetensors.torch import load_file, save_file

from calotype.checkpoint.sources import open_source
from calotype.checkpoint.text_encoders import T5
from calotype.errors import DamagedFile, SourceNotFound, UnsafeFile


def sharded(folder: Path) -> tuple[Path, list[Path]]:
    """T5 in three shards with their index, as transformers saves large models."""
    state = tiny.tensors(T5, "transformers", tiny.T5_TEXT)
    names = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    keys = sorted(state)
    weight_map = {key: names[number % 3] for number, key in enumerate(keys)}
    for name in names:
        tiny.save(folder / name, {key: state[key] for key in keys if weight_map[key] == name})
    tiny.write_json(folder / "config.json", {"model_type": "t5"})
    index = tiny.write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return index, [folder / name for name in names]


def test_shards_are_one_part_however_they_are_named(tmp_path: Path) -> None:
    index, shards = sharded(tmp_path)
    for path in (tmp_path, index, shards[0], shards[2]):
        (group,) = open_source(path).groups
        assert len(group.weights) == len(tiny.tensors(T5, "transformers", tiny.T5_TEXT))
        assert set(group.weights.files) == set(shards)
        assert group.settings == {"model_type": "t5"} or path is index


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index, shards = sharded(tmp_path)
    shards[1].unlink()
    for path in (tmp_path, index, shards[0]):
        with pytest.raises(SourceNotFound, match="model-00002-of-00003"):
            open_source(path)


def test_an_index_may_not_lie(tmp_path: Path) -> None:
    index, _ = sharded(tmp_path)
    tiny.write_json(index, {"weight_map": {"a.weight": "../../secret.safetensors"}})
    with pytest.raises(DamagedFile, match="not the name of a file beside it"):
        open_source(tmp_path)
    tiny.write_json(index, {"weight_map": {"no.such.weight": "model-00001-of-00003.safetensors"}})
    with pytest.raises(DamagedFile, match=r"'no\.such\.weight'"):
        open_source(tmp_path)
    tiny.write_json(index, {})
    with pytest.raises(DamagedFile, match="no weight_map"):
        open_source(tmp_path)
    index.write_text("[1, 2]")
    with pytest.raises(DamagedFile, match="JSON object"):
        open_source(tmp_path)
    index.write_text("{")
    with pytest.raises(DamagedFile, match="not valid JSON"):
        open_source(tmp_path)


def test_of_several_versions_the_plain_one_is_taken(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.fp16.safetensors"):
        save_file({name.replace(".", "_"): torch.zeros(1)}, tmp_path / name)
    tiny.write_json(tmp_path / "config.json", {})
    (group,) = open_source(tmp_path).groups
    assert list(group.weights) == ["model_safetensors"]
    (tmp_path / "model.safetensors").rename(tmp_path / "model.bf16.safetensors")
    with pytest.raises(DamagedFile, match="several versions"):
        open_source(tmp_path)


def test_a_pipeline_folder_gives_the_parts_that_its_index_names(tmp_path: Path) -> None:
    folder = tiny.pipeline(tmp_path / "model")
    save_file({"x": torch.zeros(1)}, folder / "loose.safetensors")
    shutil.copytree(folder / "vae", folder / "another")
    for path in (folder, folder / "model_index.json"):
        source = open_source(path)
        assert source.layout == "diffusers"
        assert {group.component for group in source.groups} == {"transformer", "text_encoder", "text_encoder_2", "vae"}
        assert {tokenizer.name for tokenizer in source.tokenizers} == {"tokenizer", "tokenizer_2"}
        assert source.scheduler is not None
        assert source.scheduler["shift"] == 2.5


def test_a_file_in_a_part_folder_has_its_settings(tmp_path: Path) -> None:
    folder = tiny.pipeline(tmp_path / "model")
    (group,) = open_source(folder / "transformer" / "diffusion_pytorch_model.safetensors").groups
    assert group.settings["_class_name"] == "FluxTransformer2DModel"


def test_loose_files_in_a_folder_are_taken_each_by_itself(tmp_path: Path) -> None:
    tiny.originals(tmp_path)
    source = open_source(tmp_path)
    assert len(source.groups) == 4
    assert {tokenizer.name for tokenizer in source.tokenizers} == {"tokenizer", "tokenizer_2"}


def as_pickle(file: Path, name: str) -> Path:
    """A safetensors file as torch.save writes it, under another name in the same folder."""
    path = file.with_name(name)
    torch.save(load_file(file), path)
    return path


def test_an_empty_folder_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(64))  # of another program
    with pytest.raises(SourceNotFound, match=r"no file of tensors in this folder"):
        open_source(tmp_path)


def test_a_pickle_that_asks_for_code_is_refused_wherever_it_lies(tmp_path: Path) -> None:
    folder = tiny.pipeline(tmp_path / "model")
    evil = folder / "vae" / "diffusion_pytorch_model.bin"
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"a": torch.zeros(1), "b": print}, evil)
    for source in (folder, folder / "vae", evil):
        with pytest.raises(UnsafeFile, match=r"print"):
            open_source(source)


def test_pickles_stand_in_where_there_are_no_safetensors(tmp_path: Path) -> None:
    folder = tiny.pipeline(tmp_path / "model")
    wanted = {group.component: group.weights.shapes for group in open_source(folder).groups}
    for part, name in (("vae", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")):
        (file,) = (folder / part).glob("*.safetensors")
        as_pickle(file, name)
        file.unlink()
    groups = {group.component: group for group in open_source(folder).groups}
    assert {part: group.weights.shapes for part, group in groups.items()} == wanted
    assert [file.name for file in groups["vae"].weights.files] == ["diffusion_pytorch_model.bin"]
    (alone,) = open_source(folder / "text_encoder" / "pytorch_model.bin").groups
    assert alone.settings == groups["text_encoder"].settings != {}


def test_safetensors_come_before_pickles_and_whole_files_before_variants(tmp_path: Path) -> None:
    folder = tiny.pipeline(tmp_path / "model") / "vae"
    safe = folder / "diffusion_pytorch_model.safetensors"
    names = ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin"]
    for name in names:
        as_pickle(safe, name)
    safe.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    safe = folder / "diffusion_pytorch_model.fp16.safetensors"
    for wanted in [safe.name, *names]:
        (group,) = open_source(folder).groups
        assert [file.name for file in group.weights.files] == [wanted]
        (folder / wanted).unlink()


def test_shards_may_be_pickles(tmp_path: Path) -> None:
    index, shards = sharded(tmp_path)
    named = {
        shard.name: shard.name.replace("model-", "pytorch_model-").replace("safetensors", "bin") for shard in shards
    }
    for shard in shards:
        as_pickle(shard, named[shard.name])
        shard.unlink()
    weight_map = json.loads(index.read_text())["weight_map"]
    index.unlink()
    index = tmp_path / "pytorch_model.bin.index.json"
    tiny.write_json(index, {"weight_map": {key: named[file] for key, file in weight_map.items()}})
    for path in (tmp_path, index, tmp_path / named[shards[1].name]):
        (group,) = open_source(path).groups
        assert set(group.weights) == set(weight_map)
        assert {file.name for file in group.weights.files} == set(named.values())
    (tmp_path / named[shards[2].name]).unlink()
    with pytest.raises(SourceNotFound, match="pytorch_model-00003-of-00003.bin: this shard is missing"):
        open_source(tmp_path)


def test_loose_pickles_count_where_nothing_safer_lies_beside_them(tmp_path: Path) -> None:
    for name in ("a.ckpt", "b.pt", "optimizer.pt", "rng_state_0.pth", "training_args.bin"):
        torch.save({name[0]: torch.zeros(1)}, tmp_path / name)
    (tmp_path / "openvino_model.bin").write_bytes(bytes(64))
    assert [list(group.weights) for group in open_source(tmp_path).groups] == [["a"], ["b"]]
    save_file({"safe": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert [list(group.weights) for group in open_source(tmp_path).groups] == [["safe"]]
