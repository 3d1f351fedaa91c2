from __future__ import annotations

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


def test_pickles_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match=r"no \.safetensors"):
        open_source(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsafeFile, match=r"pytorch_model\.bin, a pickle"):
        open_source(tmp_path)
    folder = tiny.pipeline(tmp_path / "model")
    for file in (folder / "vae").iterdir():
        torch.save(load_file(file), file.with_suffix(".bin")) if file.suffix == ".safetensors" else None
        file.unlink()
    with pytest.raises(UnsafeFile, match=r"vae: it holds only diffusion_pytorch_model\.bin"):
        open_source(folder)
