"""What `import calotype` gives, and what it costs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import calotype

PUBLIC = [
    "CalotypeError",
    "Control",
    "DamagedFile",
    "Description",
    "GenerationError",
    "HighRes",
    "ImagePrompt",
    "LoadError",
    "Lora",
    "Lowered",
    "MetadataError",
    "MissingKeys",
    "MissingPart",
    "Model",
    "NonFiniteImage",
    "NotAModel",
    "OutOfMemory",
    "OutputError",
    "Picture",
    "Progress",
    "Region",
    "Request",
    "RequestError",
    "Size",
    "SourceNotFound",
    "UnexpectedKeys",
    "UnknownModel",
    "UnsafeFile",
    "UnsupportedModel",
    "WrongShape",
    "__version__",
    "describe",
    "load",
    "read_metadata",
    "save",
]
# A machine of a continuous integration service may be many times slower than a laptop.
SECONDS = 1.0 if "CI" in os.environ else 0.15


def said(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()


def test_the_public_names_are_these() -> None:
    assert calotype.__all__ == PUBLIC
    assert sorted(PUBLIC) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(calotype, name) is not None


def test_every_error_is_public() -> None:
    from calotype import errors

    named = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert named <= set(PUBLIC)


def test_load_stays_a_function_once_its_module_is_imported() -> None:
    assert said("import calotype.loading, calotype; print(callable(calotype.load))") == "True"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        calotype.lod  # noqa: B018


def test_importing_costs_milliseconds_and_brings_no_torch() -> None:
    code = (
        "import time; start = time.process_time(); import calotype; spent = time.process_time() - start; "
        "import sys; calotype.Request, calotype.save, calotype.RequestError, calotype.__version__; "
        "print(spent, any(name in sys.modules for name in ('torch', 'numpy', 'tokenizers', 'huggingface_hub')))"
    )
    spent, heavy = zip(*(said(code).split() for _ in range(5)), strict=True)
    assert set(heavy) == {"False"}
    assert min(map(float, spent)) < SECONDS


@pytest.mark.parametrize(
    "words", [["--help"], ["generate", "--help"], ["--version"], ["generate", "x", "--steps", "0"]]
)
def test_help_and_usage_errors_bring_no_torch(words: list[str]) -> None:
    code = f"import sys; from calotype.cli.main import main; main({words!r}); print('torch' in sys.modules)"
    assert said(code).splitlines()[-1] == "False"
