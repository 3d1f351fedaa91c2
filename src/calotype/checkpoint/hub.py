"""Models of the Hugging Face hub, as folders of its cache on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from calotype.checkpoint.sources import INDEX, read_json
from calotype.errors import LoadError, SourceNotFound

NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
CONFIGURATION = (
    "config.json",
    "*.safetensors.index.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "vocab.json",
)
SMALL = (*CONFIGURATION, "merges.txt", "spiece.model", "scheduler_config.json")


def looks_like_hub_id(source: str) -> bool:
    """Whether a source that is no local path could be a model's name: org/name, and no file."""
    return NAME.fullmatch(source) is not None and not source.startswith(".") and not source.endswith(".safetensors")


def fetch_model(name: str, folders: frozenset[str]) -> Path:
    """The folder of a hub model: for a pipeline only the parts in `folders`, in safetensors, without its single files.

    HF_HUB_OFFLINE is honoured. Raises SourceNotFound or LoadError.
    """
    index = _download_file(name, INDEX, optional=True)
    if index is not None:
        wanted = [part for part in read_json(index) if part in folders]
        patterns = [INDEX, "calotype.json"]
        for part in wanted:
            patterns += [f"{part}/{pattern}" for pattern in SMALL]
            patterns += [f"{part}/model*.safetensors", f"{part}/diffusion_pytorch_model*.safetensors"]
        return _download_folder(name, patterns)
    if _download_file(name, "config.json", optional=True) is None:
        raise SourceNotFound(
            f"{name}: this hub model has neither {INDEX} nor config.json; download the file you want "
            f"(hf download {name} FILE) and give its path"
        )
    return _download_folder(name, [*SMALL, "model*.safetensors", "diffusion_pytorch_model*.safetensors"])


def fetch_tokenizer(name: str, files: tuple[str, ...]) -> Path:
    """The folder of a hub model's tokenizer files."""
    paths = [_download_file(name, file) for file in files]
    assert paths[0] is not None
    return paths[0].parent


def _download_file(name: str, file: str, optional: bool = False) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file))
    except EntryNotFoundError as error:
        if optional and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise _explained(name, error) from error
    except (OSError, ValueError) as error:
        raise _explained(name, error) from error


def _download_folder(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*.fp16.*", "*.non_ema.*"]))
    except (OSError, ValueError) as error:
        raise _explained(name, error) from error


def _explained(name: str, error: Exception) -> LoadError:
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return LoadError(f"{name}: access is restricted; accept its licence on its hub page, then run `hf auth login`")
    if isinstance(error, RepositoryNotFoundError):
        return SourceNotFound(f"{name}: no such file or folder here, and no such model on the hub")
    if HF_HUB_OFFLINE:
        return SourceNotFound(
            f"{name}: no such file or folder here, and not in the hub's cache (HF_HUB_OFFLINE is set); "
            "download it while online, or give a local path"
        )
    reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
    return SourceNotFound(f"{name}: no such file or folder here, and the hub could not be asked: {reason}")
