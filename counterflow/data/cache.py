"""Folders made once and kept between runs: learnt tokenizers, token shards, what a corpus was found to hold.

A folder is written beside its place and renamed into it, so that a killed run leaves nothing half made, and
under a lock, so that of several processes starting together one works and the others wait. Its name is a hash
of all that decides its content, so nothing is ever updated. Not taken: one cache file with an index, which a
crash can tear.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path

from counterflow.errors import DataError

try:
    import fcntl
except (
    ImportError
):  # Windows has no flock: two processes may both build, and the rename lets the first one win
    fcntl = None


def key_of(*parts: object) -> str:
    """A name of 32 hex digits for a tuple of plain values, the same on every machine."""
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def build_once(folder: Path, write: Callable[[Path], object]) -> Path:
    """The folder, made by `write` if it is not there yet. Fails: DataError if it cannot be written."""
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():
                _build(folder, write)
    except OSError as error:
        raise DataError(
            f"cannot write {folder}: {error}. Tokenizer and token shards need a folder with room and "
            "permission: free space there, or set data.cache_dir to another folder."
        ) from error
    return folder


def _build(folder: Path, write: Callable[[Path], object]) -> None:
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        write(beside)
        os.rename(beside, folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held while inside; the kernel frees it if the process dies."""
    with open(path, "w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    with suppress(OSError):
        path.unlink()
