"""The files of a checkpoint: written and read by several threads, each file's size and CRC known when it is closed.

torch's distributed checkpoint plans which rank writes what; here is how a rank does it. Not taken: its own threads,
which lose the error of all but one and would give a file that lacks tensors its name; and a CRC read from the disk
afterwards by the first rank, which costs a pass over every rank's files.
"""

import os
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from io import IOBase
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from counterflow.machine import cores

CORES_EACH = 4
"""Of the machine for every thread that writes, so that writing leaves most of them to the training."""
MOST_THREADS = 4
"""Of a rank: as many as fill a disk."""


class SummedFile:
    """A file to write that sums what goes through it."""

    def __init__(self, file: IOBase) -> None:
        self.file, self.bytes, self.crc32 = cast("Any", file), 0, 0
        self.tell, self.flush, self.fileno, self.close = file.tell, file.flush, file.fileno, file.close

    def write(self, data: bytes | memoryview) -> int:
        """Write all of it; summing and writing both let other threads run."""
        self.crc32 = zlib.crc32(data, self.crc32)
        self.bytes += len(data)
        return self.file.write(data)


class SummedFiles(FileSystem):
    """The file system, with the sums of all files that were written to it."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, int]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[IOBase, None, None]:
        """A file; of one to write, the sums are kept when it is closed."""
        with super().create_stream(path, mode) as stream:
            if mode != "wb":
                yield stream
                return
            file = SummedFile(stream)
            yield cast("IOBase", file)
        self.sums[Path(path).name] = {"bytes": file.bytes, "crc32": file.crc32}


class PieceWriter(FileSystemWriter):
    """Writes a rank's pieces, each kind into files of its own; `sums` are the files' sizes and CRCs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, per_thread_copy_ahead=0)
        self.fs = SummedFiles()

    @property
    def sums(self) -> dict[str, dict[str, int]]:
        """Of the files written here, by name."""
        return self.fs.sums

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the plan's pieces.   Fails: with the first error of any thread."""
        written: list[WriteResult] = []
        errors: list[BaseException] = []

        def write(numbered: tuple[int, list[WriteItem]]) -> None:
            number, items = numbered
            prefix = replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            part = replace(plan, items=items, storage_data=prefix)
            try:
                written.extend(super(PieceWriter, self).write_data(part, planner).value())
            except BaseException as error:  # a thread's error is the caller's
                errors.append(error)

        threads = max(1, min(MOST_THREADS, cores() // CORES_EACH))
        with ThreadPool(threads) as pool:  # daemons: Ctrl-C does not wait for them
            pool.map(write, enumerate(by_kind(plan.items, threads)), chunksize=1)
        if errors:
            raise system_error(errors[0]) or errors[0]  # what lies behind an error does not reach other ranks
        done: Future[list[WriteResult]] = Future()
        done.set_result(written)
        return done


class PieceReader(FileSystemReader):
    """Reads a rank's pieces, several files at once."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the plan's pieces."""
        files: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            files.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)

        def read(items: list[ReadItem]) -> None:
            super(PieceReader, self).read_data(replace(plan, items=items), planner).wait()

        with ThreadPool(max(1, min(MOST_THREADS, len(files), cores()))) as pool:
            pool.map(read, files.values(), chunksize=1)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def by_kind(items: list[WriteItem], parts: int) -> list[list[WriteItem]]:
    """The items of each kind (masters, averages, a moment: what a name begins with) in at most so many parts.

    The parts of a kind are of about the same size; who needs the weights alone reads no file of moments.
    """
    lists: dict[str, list[list[WriteItem]]] = {}
    sizes: dict[str, list[int]] = {}
    for item in sorted(items, key=_elements, reverse=True):
        kind = item.index.fqn.partition(".")[0]
        mine = sizes.setdefault(kind, [0] * parts)
        place = mine.index(min(mine))
        lists.setdefault(kind, [[] for _ in range(parts)])[place].append(item)
        mine[place] += _elements(item)
    return [part for kind in lists.values() for part in kind if part]


def _elements(item: WriteItem) -> int:
    assert item.tensor_data is not None, "a checkpoint is made of tensors"
    return item.tensor_data.chunk.sizes.numel()


def system_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind one, looked for in causes and in DCP's per-rank failures."""
    seen: list[BaseException | None] = [error]
    while seen:
        one = seen.pop()
        if isinstance(one, OSError):
            return one
        if isinstance(one, CheckpointException):
            seen += [
                failure[0] if isinstance(failure, tuple) else failure for failure in one.failures.values()
            ]
        if one is not None:
            seen += [one.__cause__, one.__context__]
    return None
