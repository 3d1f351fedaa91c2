"""The exception tree: what callers can catch, and what messages say."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import PurePosixPath

import pytest

from calotype import errors
from calotype.errors import CalotypeError, MissingKeys, OutputError, RequestError, UnexpectedKeys

ALL = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]


@pytest.mark.parametrize("error", ALL)
def test_everything_descends_from_one_error_and_explains_itself(error: type[Exception]) -> None:
    assert issubclass(error, CalotypeError)
    assert error.__doc__


def test_the_tree_in_the_documentation_is_the_tree_in_the_code() -> None:
    drawn = re.findall(r"^    ([│├└─ ]*)(\w+)", errors.__doc__ or "", re.MULTILINE)
    path: list[str] = []
    parents: dict[str, str | None] = {}
    for rails, name in drawn:
        path = [*path[: len(rails) // 4], name]
        parents[name] = path[-2] if len(path) > 1 else None
    ours = {error.__name__ for error in ALL}
    assert parents == {
        error.__name__: next((base.__name__ for base in error.__bases__ if base.__name__ in ours), None)
        for error in ALL
    }


def test_common_python_errors_catch_ours_too() -> None:
    assert issubclass(RequestError, ValueError)
    assert issubclass(errors.SourceNotFound, FileNotFoundError)
    assert issubclass(OutputError, OSError)


def test_a_path_is_said_as_it_was_given() -> None:
    assert str(RequestError("file", PurePosixPath("a/b.png"), "another")) == "file: got 'a/b.png'; allowed: another"
    assert RequestError("steps", 0, "more").under("high_res[0].").field == "high_res[0].steps"


def test_a_request_error_names_field_value_and_what_is_allowed() -> None:
    error = RequestError("steps", 0, "a whole number from 1 to 1,000")
    assert str(error) == "steps: got 0; allowed: a whole number from 1 to 1,000"
    assert (error.field, error.value, error.allowed) == ("steps", 0, "a whole number from 1 to 1,000")


def test_a_long_value_is_cut_in_the_message_only() -> None:
    error = RequestError("prompt", "x" * 100_000, "at most 20,000 characters")
    assert len(str(error)) < 200
    assert "100,002 characters" in str(error)
    assert error.value == "x" * 100_000


@pytest.mark.parametrize("kind", [MissingKeys, UnexpectedKeys])
def test_key_errors_list_a_few_keys_and_keep_all(kind: type[MissingKeys] | type[UnexpectedKeys]) -> None:
    keys = [f"block.{number}.weight" for number in range(9)]
    error = kind("a.safetensors", "flux/original", keys)
    assert "9 tensors" in str(error)
    assert "'block.2.weight' and 6 more" in str(error)
    assert "block.5.weight" not in str(error)
    assert "calotype info a.safetensors" in str(error)
    assert error.keys == tuple(keys)


@pytest.mark.parametrize(
    "error",
    [
        RequestError("steps", 0, "a whole number from 1 to 1,000"),
        MissingKeys("a.safetensors", "flux/original", ["a", "b"]),
        UnexpectedKeys("a.safetensors", "flux/original", ["a"]),
        errors.SourceNotFound("a.safetensors: no such file"),
        OutputError("out.png: not writable"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_cross_the_border_of_a_process(error: CalotypeError) -> None:
    """Workers hand them back pickled."""
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is type(error)
        assert (str(other), vars(other)) == (str(error), vars(error))
