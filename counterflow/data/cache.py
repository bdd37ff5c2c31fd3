"""Folders made once and kept between runs: learnt tokenizers, token shards, what a corpus was found to hold.

A folder is written beside its place and renamed into it, so that a killed run leaves nothing half made, and
under a lock, so that of several processes starting together one works and the others wait. Its name is a hash
of all that decides its content, so nothing is ever updated. Not taken: one cache file with an index, which a
crash can tear.
"""

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from secrets import token_hex
from typing import IO

from counterflow.errors import DataError

try:
    import fcntl
except (
    ImportError
):  # Windows has no flock: two processes may both build, and the rename lets the first one win
    fcntl = None

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
"""What file systems answer that know no locks, as NFS and Lustre may be mounted."""


def key_of(*parts: object) -> str:
    """A name of 32 hex digits for a tuple of plain values, the same on every machine."""
    return blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def build_once(folder: Path, write: Callable[[Path], object]) -> Path:
    """The folder, made by `write` if it is not there yet. Fails: DataError if it cannot be written."""
    if not folder.is_dir():
        with in_place_of(folder), locked(folder.with_name(f"{folder.name}.lock")) as missing:
            if not folder.is_dir():
                if not missing:  # without a lock they may be of a process that is at work
                    _clear(folder)
                _build(folder, write)
    return folder


def finish_once(folder: Path, growing: Path, finish: Callable[[], object]) -> Path:
    """The folder, which is `growing` once `finish` has ended; what lies in `growing` stays if that is killed.

    Fails: DataError if it cannot be written.
    """
    with in_place_of(folder), locked(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            finish()
            _rename(growing, folder)
    return folder


@contextmanager
def in_place_of(folder: Path) -> Iterator[None]:
    """For writing what becomes this folder, below one that is made.   Fails: DataError for an error of the system."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DataError(
            f"cannot write {folder}: {error}. Tokenizer and token shards need a folder with room and "
            "permission: free space there, or set data.cache_dir to another folder."
        ) from error


def _clear(folder: Path) -> None:
    """Remove what a process that was killed has left."""
    for left in folder.parent.glob(f"{folder.name}.*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def _build(folder: Path, write: Callable[[Path], object]) -> None:
    beside = folder.with_name(f"{folder.name}.{token_hex(4)}.partial")
    beside.mkdir()
    try:
        write(beside)
        _rename(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _rename(made: Path, folder: Path) -> None:
    """Where there are no locks, another process may have been first."""
    try:
        os.rename(made, folder)
    except OSError:
        if not folder.is_dir():
            raise


@contextmanager
def locked(path: Path) -> Iterator[str]:
    """Held while inside; the kernel frees it if the process dies. Gives what `lock` gives."""
    with open(path, "w") as file:
        yield lock(file)
    with suppress(OSError):
        path.unlink()


def lock(file: IO[str], wait: bool = True) -> str:
    """Lock an open file until it is closed; empty, or why its file system has no locks, which is logged.

    Fails: BlockingIOError where another process has it and is not to be waited for.
    """
    if fcntl is None:
        return "this system has none"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logging.getLogger(__name__).info("no lock on %s: %s", file.name, error)
        return error.strerror or str(error)
    return ""
