"""What was compiled once is found again, whole or not at all, and takes no more room than it may."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from calotype.backends.openvino_cache import END, GIB, PART, Cache, usual
from calotype.errors import RequestError

ROOM = 3 * (100 + END.size)  # for three values of 100 bytes


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "held", ROOM)


def value(letter: str) -> bytes:
    return letter.encode() * 100


def keep(cache: Cache, *letters: str) -> None:
    """One after another, as the file system's clock sees it."""
    for letter in letters:
        cache.put(letter, value(letter))
        grow_older(cache)


def grow_older(cache: Cache) -> None:
    for path in cache.folder.iterdir():
        before = path.stat().st_mtime
        os.utime(path, (before - 10, before - 10))


def held(cache: Cache) -> str:
    return "".join(sorted(path.stem for path in cache.folder.glob("*.bin")))


def test_values_come_back(cache: Cache) -> None:
    assert cache.get("a") is None
    keep(cache, "a")
    cache.put("b", memoryview(b"other"))
    found, other = cache.get("a"), cache.get("b")
    assert found is not None and found.tobytes() == value("a") and found.flags.writeable
    assert other is not None and other.tobytes() == b"other"
    cache.put("a", b"newer")
    newer = cache.get("a")
    assert newer is not None and newer.tobytes() == b"newer"
    assert found.tobytes() == value("a")  # what was handed out stays


def test_what_was_not_used_for_longest_gives_way(cache: Cache) -> None:
    keep(cache, "a", "b", "c")
    assert cache.get("a") is not None
    keep(cache, "d")
    assert held(cache) == "acd"
    cache.put("e", b"e" * 210)
    assert held(cache) == "de"
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= ROOM


def test_what_would_never_fit_is_not_kept(cache: Cache) -> None:
    keep(cache, "a")
    cache.put("b", bytes(ROOM))
    assert held(cache) == "a"


@pytest.mark.parametrize("where", ["first byte", "last byte", "length", "cut short", "empty"])
def test_damage_is_noticed_and_taken_away(cache: Cache, where: str) -> None:
    keep(cache, "a")
    path = cache.folder / "a.bin"
    data = bytearray(path.read_bytes())
    match where:
        case "first byte":
            data[0] ^= 1
        case "last byte":
            data[-1] ^= 1
        case "length":
            data[100 + 8] ^= 1
        case "cut short":
            del data[-30:]
        case _:
            data.clear()
    path.write_bytes(data)
    with pytest.warns(RuntimeWarning, match=r"a\.bin: damaged .*compiling again"):
        assert cache.get("a") is None
    assert not path.exists() and cache.get("a") is None
    keep(cache, "a")
    assert cache.get("a") is not None


def test_half_written_files_are_not_taken_for_whole_ones_and_do_not_stay(cache: Cache) -> None:
    keep(cache, "a")
    fresh, old = cache.folder / f"x{PART}", cache.folder / f"y{PART}"
    fresh.write_bytes(b"half")
    old.write_bytes(b"half")
    yesterday = time.time() - 25 * 3600
    os.utime(old, (yesterday, yesterday))
    cache.put("b", value("b"))
    assert held(cache) == "ab" and fresh.exists() and not old.exists()


def test_a_folder_that_cannot_be_written_costs_no_more_than_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / "file", ROOM)
    with pytest.warns(RuntimeWarning, match="could not be kept .*CALOTYPE_OPENVINO_CACHE=0 switches the cache off"):
        cache.put("a", value("a"))


def test_a_failed_write_leaves_nothing(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        cache.put("a", value("a"))
    assert list(cache.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "limit"), [(None, 8 * GIB), ("", 8 * GIB), ("2.5", 5 * GIB // 2), ("0", None), ("0.0", None)]
)
def test_the_environment_says_where_and_how_much(
    given: str | None, limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALOTYPE_HOME", str(tmp_path))
    if given is None:
        monkeypatch.delenv("CALOTYPE_OPENVINO_CACHE", raising=False)
    else:
        monkeypatch.setenv("CALOTYPE_OPENVINO_CACHE", given)
    cache = usual()
    assert (None if cache is None else cache.limit) == limit
    assert cache is None or cache.folder == tmp_path / "openvino"


@pytest.mark.parametrize("given", ["off", "-1", "nan", "inf"])
def test_other_words_are_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALOTYPE_OPENVINO_CACHE", given)
    with pytest.raises(RequestError, match="CALOTYPE_OPENVINO_CACHE: got .*; 0 for no cache"):
        usual()
