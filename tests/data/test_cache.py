"""A cached folder is made once, whole or not at all."""

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from counterflow.data.cache import build_once, key_of


def test_many_starters_build_once(tmp_path: Path) -> None:
    calls: list[Path] = []

    def write(folder: Path) -> None:
        calls.append(folder)
        time.sleep(0.05)
        (folder / "done").write_text("1")

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: build_once(tmp_path / "a" / "b", write), range(4)))
    assert len(calls) == 1 and set(made) == {tmp_path / "a" / "b"}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_failure_leaves_nothing_and_the_next_try_works(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "made", fail)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    assert build_once(tmp_path / "made", lambda folder: (folder / "x").touch()).is_dir()


def test_key_is_fixed_for_all_time() -> None:
    """Caches and checkpoints' fingerprints rely on it."""
    assert key_of(1, ["a"], 0.1) == "793b75bd2fce8330f2b9f673b583588c"


def test_what_a_killed_process_left_goes_when_its_folder_is_made(tmp_path: Path) -> None:
    (tmp_path / "made.77.partial").mkdir()
    build_once(tmp_path / "made", lambda folder: (folder / "x").touch())
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_systems_without_locks_are_written_without(tmp_path: Path, monkeypatch, number: int) -> None:
    def none(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", none)
    assert build_once(tmp_path / "made", lambda folder: (folder / "x").touch()).is_dir()


def test_without_locks_nobody_takes_what_another_is_writing(tmp_path: Path, monkeypatch) -> None:
    """Both write, and the first to end gives the folder; the other one's work is dropped, not an error."""
    monkeypatch.setattr("counterflow.data.cache.lock", lambda *_: "no locks available")

    def write(folder: Path) -> None:
        build_once(tmp_path / "made", lambda other: (other / "x").write_text("second"))
        (folder / "x").write_text("first")

    assert (build_once(tmp_path / "made", write) / "x").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
