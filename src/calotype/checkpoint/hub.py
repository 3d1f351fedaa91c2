"""Models of the Hugging Face hub, as folders of its cache on this machine."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from calotype.checkpoint.files import PICKLE_SUFFIXES
from calotype.checkpoint.sources import CARD, CONFIG, INDEX, has_config, read_json
from calotype.errors import LoadError, SourceNotFound

NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
SMALL = (
    "config.json",
    "*.safetensors.index.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "scheduler_config.json",
)
WEIGHTS = ("model*.safetensors", "diffusion_pytorch_model*.safetensors")
PICKLED = ("pytorch_model*.bin", "diffusion_pytorch_model*.bin", "*.bin.index.json")
VARIANTS = ("*.fp16.*", "*.non_ema.*")


def looks_like_hub_id(source: str) -> bool:
    """Whether a source that is no local path could be a model's name: org/name, and no file."""
    file = Path(source).suffix.lower() in PICKLE_SUFFIXES | {".safetensors", ".gguf"}
    return NAME.fullmatch(source) is not None and not source.startswith(".") and not file


def fetch_model(name: str, folders: frozenset[str]) -> Path:
    """The folder of a hub model: for a pipeline only the parts in `folders`, without its single files.

    Of a part that has no safetensors, its pickles are taken. HF_HUB_OFFLINE is honoured.
    Raises SourceNotFound or LoadError.
    """
    index = _download(name, INDEX)
    if isinstance(index, Path):
        patterns = [INDEX, CARD]
        files = _files(name)
        for part in sorted(folders & set(read_json(index))):
            patterns += _patterns(files, f"{part}/")
        return _download_folder(name, patterns)
    # Where the hub could not be asked, a part by itself may still be in the cache.
    if isinstance(_download(name, "config.json", cached=index is not None), Path):
        return _download_folder(name, _patterns(_files(name), ""))
    raise index or SourceNotFound(
        f"{name}: this hub model has neither {INDEX} nor config.json; download the file you want "
        f"(hf download {name} FILE) and give its path"
    )


def _files(name: str) -> list[str]:
    """All files that the hub has of a model; none where it cannot be asked."""
    from huggingface_hub import list_repo_files

    try:
        return list_repo_files(name)
    except Exception:
        # What the library beneath raises without a connection differs between versions. The download that follows
        # takes what is in the cache, whichever format that has, or says what is wrong.
        return []


def _patterns(files: list[str], folder: str) -> list[str]:
    """What to download of a part, from the files that there are."""

    def present(patterns: tuple[str, ...]) -> bool:
        held = [file for file in files if not any(fnmatchcase(file, variant) for variant in VARIANTS)]
        return any(fnmatchcase(file, folder + pattern) for file in held for pattern in patterns)

    pickled = PICKLED if present(PICKLED) and not present(WEIGHTS) else ()
    return [folder + pattern for pattern in (*SMALL, *WEIGHTS, *pickled)]


def fetch_tokenizer(name: str, files: tuple[str, ...]) -> Path:
    """The folder of a hub model's tokenizer files; the hub is asked only if they are not in the cache."""
    found = [_download(name, file, cached=True) for file in files]
    if not all(isinstance(path, Path) for path in found):
        found = [_download(name, file) for file in files]
    for path in found:
        if not isinstance(path, Path):
            raise path or SourceNotFound(f"{name}: the hub model has no {' or '.join(files)}")
    assert isinstance(found[0], Path)
    return found[0].parent


FILE = re.compile(r"([\w.-]{1,96}/[\w.-]{1,96})/([\w./-]{1,400})", re.ASCII)


def file_on_hub(source: str) -> tuple[str, str] | None:
    """A hub model and the path of a file or folder in it, of a source like org/name/folder/file; None for others."""
    match = FILE.fullmatch(source)
    if match is None or source.startswith(".") or ".." in source or source.endswith("/"):
        return None
    return match[1], match[2]


def fetch_file(source: str) -> Path:
    """What lies at org/name/path on the hub: a file, with its config.json, or a folder of one part.

    Raises SourceNotFound or LoadError.
    """
    found = file_on_hub(source)
    assert found is not None
    name, file = found
    if Path(file).suffix.lower() not in PICKLE_SUFFIXES | {".safetensors"}:
        folder = fetch_folder(name, file)
        if folder.is_dir():
            return folder
        raise SourceNotFound(f"{source}: no such file or folder here, and the hub model {name} has no folder {file}")
    path = _download(name, file)
    if isinstance(path, Path):
        if has_config(path.name):
            fetch_small(name, str(PurePosixPath(file).with_name(CONFIG)))
        return path
    raise path or SourceNotFound(f"{source}: no such file or folder here, and the hub model {name} has no file {file}")


def fetch_small(name: str, file: str) -> Path | None:
    """A file of a hub model; None where it has none of that name, or that cannot be found out now."""
    path = _download(name, file)
    return path if isinstance(path, Path) else None


def fetch_folder(name: str, folder: str) -> Path:
    """One part's folder of a hub model, which may turn out not to be there."""
    return _download_folder(name, _patterns(_files(name), f"{folder}/")) / folder


def _download(name: str, file: str, *, cached: bool = False) -> Path | LoadError | None:
    """A file of a hub model; None where the model has no such file, an error where that cannot be found out.

    With `cached`, only what is in the cache already.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file, local_files_only=cached))
    except LocalEntryNotFoundError as error:
        return _explained(name, error)
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _explained(name, error) from error


def _download_folder(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=list(VARIANTS)))
    except (OSError, ValueError) as error:
        raise _explained(name, error) from error


def _explained(name: str, error: Exception) -> LoadError:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return LoadError(f"{name}: access is restricted; accept its licence on its hub page, then run `hf auth login`")
    if isinstance(error, RepositoryNotFoundError):
        return SourceNotFound(f"{name}: no such file or folder here, and no such model on the hub")
    if constants.HF_HUB_OFFLINE:
        return SourceNotFound(
            f"{name}: no such file or folder here, and not in the hub's cache (HF_HUB_OFFLINE is set); "
            "download it while online, or give a local path"
        )
    reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
    if isinstance(error, LocalEntryNotFoundError):
        reason = "no connection"
    return SourceNotFound(f"{name}: no such file or folder here, and the hub could not be asked: {reason}")
