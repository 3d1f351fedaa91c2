"""What is asked of the hub and taken from it, with the hub played by a folder."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import huggingface_hub
import pytest

from calotype.checkpoint.hub import fetch_model, looks_like_hub_id
from calotype.errors import SourceNotFound

FOLDERS = frozenset({"unet", "vae", "text_encoder", "scheduler"})
KOLORS = {
    "model_index.json": json.dumps({"unet": ["a", "b"], "vae": ["a", "b"], "text_encoder": ["a", "b"]}),
    "unet/config.json": "{}",
    "unet/diffusion_pytorch_model.safetensors": "safe",
    "unet/diffusion_pytorch_model.bin": "not wanted",
    "unet/diffusion_pytorch_model.fp16.safetensors": "not wanted",
    "vae/diffusion_pytorch_model.fp16.safetensors": "not wanted",
    "vae/diffusion_pytorch_model.bin": "the only one that is whole",
    "text_encoder/config.json": "{}",
    "text_encoder/pytorch_model.bin.index.json": "{}",
    "text_encoder/pytorch_model-00001-of-00002.bin": "first",
    "text_encoder/pytorch_model-00002-of-00002.bin": "second",
    "text_encoder/optimizer.bin": "not wanted",
    "loose.ckpt": "not wanted",
}
WANTED = {name for name, content in KOLORS.items() if content != "not wanted"}


class Hub:
    """A hub of one model, which counts what it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path, files: dict[str, str]) -> None:
        self.online, self.cache, self.listed = True, root / "cache", 0
        self.files = files
        for name in ("hf_hub_download", "snapshot_download", "list_repo_files"):
            monkeypatch.setattr(huggingface_hub, name, getattr(self, name))

    def hf_hub_download(self, name: str, file: str, *, local_files_only: bool) -> str:
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        if (self.cache / file).exists():
            return str(self.cache / file)
        if local_files_only or not self.online:
            raise LocalEntryNotFoundError(file)
        if file not in self.files:
            raise EntryNotFoundError(file)
        return str(self._fetched(file))

    def snapshot_download(self, name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        for file in self.files:
            wanted = any(fnmatchcase(file, pattern) for pattern in allow_patterns)
            if not wanted or any(fnmatchcase(file, pattern) for pattern in ignore_patterns):
                continue
            # Without a connection the library refuses a cache that lacks something asked for.
            assert self.online or (self.cache / file).exists()
            self._fetched(file)
        return str(self.cache)

    def list_repo_files(self, name: str) -> list[str]:
        self.listed += 1
        if not self.online:
            raise ConnectionError
        return list(self.files)

    def _fetched(self, file: str) -> Path:
        (self.cache / file).parent.mkdir(parents=True, exist_ok=True)
        (self.cache / file).write_text(self.files[file])
        return self.cache / file

    def held(self) -> set[str]:
        return {file.relative_to(self.cache).as_posix() for file in self.cache.rglob("*") if file.is_file()}


def test_pickles_are_fetched_only_for_parts_without_safetensors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub = Hub(monkeypatch, tmp_path, KOLORS)
    assert fetch_model("org/kolors", FOLDERS) == hub.cache
    assert hub.held() == WANTED
    assert hub.listed == 1
    hub.online = False
    assert fetch_model("org/kolors", FOLDERS) == hub.cache


SHARDS = {f"model-0000{number}-of-00002.safetensors": "safe" for number in (1, 2)} | {
    "model.safetensors.index.json": "{}",
    "config.json": "{}",
}
PICKLES = {
    "pytorch_model.bin": "not wanted",
    "pytorch_model-00001-of-00001.bin": "not wanted",
    "pytorch_model.bin.index.json": "not wanted",
}


def test_no_pickle_is_fetched_where_safetensors_are_whatever_their_form(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for number, safe in enumerate((SHARDS, {"model.safetensors": "safe", "config.json": "{}"})):
        part = Hub(monkeypatch, tmp_path / f"part {number}", {**PICKLES, **safe})
        fetch_model("org/part", FOLDERS)
        assert part.held() == set(safe)
        index = {"model_index.json": json.dumps({"text_encoder": ["a", "b"]})}
        within = {f"text_encoder/{name}": content for name, content in {**PICKLES, **safe}.items()}
        whole = Hub(monkeypatch, tmp_path / f"whole {number}", {**index, **within})
        fetch_model("org/whole", FOLDERS)
        assert whole.held() == {*index, *(f"text_encoder/{name}" for name in safe)}


def test_a_part_by_itself_may_be_a_pickle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = Hub(monkeypatch, tmp_path, {"config.json": "{}", "pytorch_model.bin": "x", "flax_model.msgpack": "y"})
    fetch_model("org/part", FOLDERS)
    assert hub.held() == {"config.json", "pytorch_model.bin"}
    hub.files = {"flax_model.msgpack": "y"}
    shutil.rmtree(hub.cache)
    with pytest.raises(SourceNotFound, match="neither"):
        fetch_model("org/other", FOLDERS)


@pytest.mark.parametrize("name", ["org/model.safetensors", "org/model.ckpt", "org/model.PT", "org/model.bin"])
def test_a_file_is_no_name_of_a_model(name: str) -> None:
    assert not looks_like_hub_id(name)
    assert looks_like_hub_id("org/model-v1.5")
