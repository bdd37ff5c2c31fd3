"""Folders that are either whole or not there.

A folder is written beside its place under another name, flushed to disk and then renamed, which is one atomic act; a
killed process or a full disk leaves nothing that could be taken for it.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from os.path import expanduser
from pathlib import Path

from safetensors import SafetensorError

from counterflow.errors import CheckpointError
from counterflow.units import bytes_

WRITING = ".writing"
CONFIG = "config.json"
"""A folder that has it is a model in the released format."""


@contextmanager
def whole_folder(final: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """An empty folder to write in; it becomes `final` when the block ends without an error, else it goes.

    Fails: CheckpointError if something is there already, the disk has no room, or writing fails.
    """
    final = Path(expanduser(final)).absolute()
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise CheckpointError(f"{final} is there already; choose another folder, or remove it first.")
    writing = final.with_name(final.name + WRITING)
    try:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        _require_room(writing, needed_bytes)
        yield writing
        for path in [*(path for path in writing.rglob("*") if path.is_file()), writing]:
            _flush(path)
        writing.rename(final)
        _flush(final.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{final} could not be written; {_cause(error)}: free space there, mend its permissions, or choose "
            "another folder. Nothing of it was kept."
        ) from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def _require_room(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(0, f"it needs {bytes_(needed_bytes)} and the disk has {bytes_(free)} left")


def _cause(error: Exception) -> str:
    """The operating system's words; safetensors gives its errors as text."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    number = re.search(r"os error (\d+)", str(error))
    return os.strerror(int(number[1])) if number else str(error)


def _flush(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
