"""What lies in a checkpoint's folder, read without torch: which steps are there, what they say, whether they are whole.

The manifest holds the size and CRC of every file, the run's place, and a CRC of its own. A start asks here before
torch is imported, so that a finished run says so at once. Not taken: a file beside the checkpoints that says "done",
which could say another thing than they do.
"""

import errno
import json
import os
import zlib
from collections.abc import Collection, Mapping
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from counterflow.errors import CheckpointError
from counterflow.machine import cores
from counterflow.notation import from_json

MANIFEST = "manifest.json"
CHUNK = 1 << 22


def path_of(folder: Path, step: int) -> Path:
    """Where a step's checkpoint is."""
    return folder / f"step-{step:08d}"


def steps_of(folder: Path) -> list[int]:
    """The steps that have one, in order."""
    found = folder.glob("step-*") if folder.is_dir() else ()
    return sorted(int(path.name[5:]) for path in found if path.name[5:].isdigit() and path.is_dir())


def state_of(path: Path) -> dict[str, Any]:
    """The state saved with a checkpoint.   Fails: CheckpointError if its manifest cannot be read."""
    return _read(path)["state"]


def verify(path: Path, names: Collection[str] | None = None) -> None:
    """Compare every file, or those named, with the manifest.

    Fails: CheckpointError with the first file that differs.   Cost: one read of them.
    """
    files = _read(path)["files"]
    if names is not None:
        files = {name: files[name] for name in names}
    number = min(len(files), cores()) or 1
    with ThreadPool(number) as readers:  # daemons: Ctrl-C does not wait for them
        for fault in readers.imap(_fault, [(path / name, expected) for name, expected in files.items()]):
            if fault:
                raise CheckpointError(f"{fault}; {_instead(path)}")


def _fault(told: tuple[Path, Mapping[str, int]]) -> str:
    """How a file differs from what the manifest says of it; empty where it does not."""
    file, expected = told
    size = file.stat().st_size if file.is_file() else -1
    if size != expected["bytes"]:
        torn = f"truncated: it has {size} bytes, not {expected['bytes']}"
        return f"{file} is {'missing' if size < 0 else torn}"
    try:
        crc = crc_of(file)
    except OSError as error:
        return f"{file} cannot be read ({error.strerror})"
    return "" if crc == expected["crc32"] else f"{file} is corrupt: its CRC is not the manifest's"


def write(folder: Path, state: Mapping[str, Any], sums: Mapping[str, Mapping[str, int]]) -> None:
    """The manifest of all files there, everything flushed to disk, the folder last.

    `sums` are sizes and CRCs of files by who wrote and flushed them.   Fails: OSError where one has another size.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        if path.name not in sums:
            flush(path)
        elif size != sums[path.name]["bytes"]:
            raise OSError(errno.EIO, f"{path.name} has {size} of {sums[path.name]['bytes']} bytes written")
        files[path.name] = dict(sums.get(path.name) or {"bytes": size, "crc32": crc_of(path)})
    manifest = folder / MANIFEST
    crc = _own_crc(files, state)
    manifest.write_text(json.dumps({"crc32": crc, "files": files, "state": dict(state)}, indent=1))
    flush(manifest)
    flush(folder)


def flush(path: Path) -> None:
    """See a file or folder on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def crc_of(path: Path) -> int:
    """Of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            crc = zlib.crc32(block, crc)
    return crc


def _read(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = from_json(file.read_bytes())
        whole = manifest["crc32"] == _own_crc(manifest["files"], manifest["state"])
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); {_instead(path)}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        whole, manifest = False, {}
    if not whole:
        raise CheckpointError(f"{file} is corrupt: it is not as it was written; {_instead(path)}")
    return manifest


def _own_crc(files: Mapping[str, Any], state: Mapping[str, Any]) -> int:
    """Of what it says, not of its text; the same before writing and after reading."""
    return zlib.crc32(json.dumps([files, dict(state)]).encode())


def _instead(path: Path) -> str:
    others = [other for other in steps_of(path.parent) if path_of(path.parent, other) != path]
    if others:
        return f"delete {path} to go on from step {others[-1]}."
    return f"there is no other checkpoint in {path.parent}: delete it to start anew."
