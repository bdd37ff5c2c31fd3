"""Checkpoints written behind the training: copied to memory between two steps, written by a thread during the next.

One is under way at most: another waits for it. The thread saves as `Checkpoints` does, through a process group of its
own, so that a checkpoint is whole or not there whoever writes it, and its error is the same on every rank: it is
raised at the next step. The copy is made once and used again; in a GPU's host it is pinned. Where it would take more
than half of the memory that is free, training waits for its checkpoints instead.

Not taken: torch's `async_save`, whose thread ends before the manifest is written and the folder has its name; a
process for the writing, which has to import torch first and to share the copy: the thread's work is reading, summing
and writing large blocks, which let the training's thread run (docs/LOG.md).
"""

import mmap
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from counterflow.errors import CheckpointError
from counterflow.interrupt import end_now
from counterflow.machine import free_memory
from counterflow.train.checkpoint import Checkpoints, quiet
from counterflow.train.piece import Piece
from counterflow.units import bytes_

ALIGNMENT = 64
SHARE = 0.5
"""Of the memory that is free, which the copies may take: the rest is for what is on its way to the disk."""
CLOSING_S = 60
"""How long a training that failed waits for its last checkpoint: a rank that has to take part may be gone."""
SYNCHRONOUS = "training waits while a checkpoint is written"


class Behind:
    """A training's way to save; its end waits for the last checkpoint.   Fails, on every rank: CheckpointError."""

    def __init__(self, checkpoints: Checkpoints, wanted: bool, say: Callable[[str], object]) -> None:
        """`wanted`: whether to write behind at all; `say` is given what a user should know. A collective."""
        self._direct, self._say, self._wanted = checkpoints, say, wanted
        self._behind = Checkpoints(checkpoints.folder, checkpoints.keep, checkpoints.mesh.apart())
        self._copy: Copy | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stack = ExitStack()
        self._waited = 0.0

    def __enter__(self) -> "Behind":
        self._stack.enter_context(quiet())  # for the thread: what filters warnings belongs to the process
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        with self._stack:
            try:
                if kind is None:
                    self.wait()
                elif self._thread is not None and not interrupted:
                    self._thread.join(CLOSING_S)
            except KeyboardInterrupt:
                interrupted = True
                raise
            finally:
                writing = self._thread is not None and self._thread.is_alive()
                if writing and interrupted:  # Python's own end crashes while a thread is in torch's code
                    end_now()
                if self._copy is not None and not writing:
                    self._copy.close()

    def save(self, step: int, pieces: Mapping[str, Piece], state: Mapping[str, Any]) -> None:
        """Save once the one before is written; the pieces may change as soon as this returns. A collective."""
        self.wait()
        start = time.perf_counter()
        if self._wanted and self._copy is None:
            self._copy = self._make_room(pieces)
        if self._copy is None:
            self._direct.save(step, pieces, state)
        else:
            copied = self._copy.take(pieces)
            self._thread = threading.Thread(target=self._write, args=(step, copied, dict(state)), daemon=True)
            self._thread.start()
        self._waited += time.perf_counter() - start

    def waited(self) -> float:
        """Seconds that training has stood still for checkpoints since this was last asked."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def agreed(self, signal: int) -> int:
        """The highest of all ranks' values; a writer's error is raised here, on all of them. A collective."""
        failed = self._error is not None
        heard = self._direct.mesh.everyone((signal, failed))
        if any(failed for _, failed in heard):
            self.wait()
        return max(signal for signal, _ in heard)

    def wait(self) -> None:
        """Wait for the checkpoint under way.   Fails: with its error."""
        if self._thread is None:
            return
        start = time.perf_counter()
        self._thread.join()
        self._waited += time.perf_counter() - start
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def _write(self, step: int, pieces: Mapping[str, Piece], state: Mapping[str, Any]) -> None:
        try:
            self._behind.write(step, pieces, state)
        except BaseException as error:  # it is the training's
            self._error = error

    def _make_room(self, pieces: Mapping[str, Piece]) -> "Copy | None":
        """Room for the copy; None, from now on, where a host has too little."""
        mesh, needed = self._direct.mesh, size_of(pieces)
        host: dict[str, int] = {}
        free: dict[str, int] = {}
        for name, size, there in mesh.everyone((socket.gethostname(), needed, free_memory())):
            host[name], free[name] = host.get(name, 0) + size, min(there, free.get(name, there))
        for name in host:
            if host[name] > SHARE * free[name]:
                self._wanted = False
                self._say(
                    f"A copy of a checkpoint takes {bytes_(host[name])}, and {name} has {bytes_(free[name])} of memory "
                    f"free: {SYNCHRONOUS}."
                )
                return None
        size = bytes_(sum(host.values()))
        self._say(f"Checkpoints are copied to memory ({size}) and written while training goes on.")
        return mesh.all_do(lambda: Copy(pieces))


class Copy:
    """A copy in the host's memory of a rank's pieces, made again and again in the same place."""

    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        self._room = mmap.mmap(-1, max(size_of(pieces), 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(AttributeError, OSError):  # not every system has larger pages
            self._room.madvise(mmap.MADV_HUGEPAGE)
        self._devices = {piece.value.device for piece in pieces.values() if piece.value.is_cuda}
        if self._devices:
            self._pin()
        self._pieces: dict[str, Piece] = {}
        offset = 0
        for name, piece in pieces.items():
            value = torch.empty(0, dtype=piece.value.dtype)
            if len(piece.value):  # each has a storage of its own, so that it is written without another copy
                count = len(piece.value)
                value = torch.frombuffer(self._room, dtype=piece.value.dtype, count=count, offset=offset)
            self._pieces[name] = Piece(value, piece.offset, piece.total)
            offset += aligned(piece.value)

    def _pin(self) -> None:
        """Let the GPU write there by itself: touched first, by all threads, as pinning touches page by page."""
        whole = torch.frombuffer(self._room, dtype=torch.uint8).zero_()
        self._address = whole.data_ptr()
        failed = int(_driver().cudaHostRegister(self._address, len(whole), 0))
        if failed:
            raise CheckpointError(
                f"{bytes_(len(whole))} for the copy of a checkpoint could not be pinned (CUDA error {failed}); "
                "set keep.checkpoint_async=false."
            )

    def close(self) -> None:
        """Give the memory back. The driver forgets it first: it would refuse what is mapped there next."""
        if self._devices:
            _driver().cudaHostUnregister(self._address)
        self._devices.clear()
        self._pieces.clear()

    @torch.no_grad()
    def take(self, pieces: Mapping[str, Piece]) -> Mapping[str, Piece]:
        """The pieces as they are now; what was there is gone."""
        for name, piece in pieces.items():
            self._pieces[name].value.copy_(piece.value, non_blocking=True)
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()
        return self._pieces


def _driver() -> Any:
    """CUDA's runtime, which torch has where it has CUDA."""
    return torch.cuda.cudart()


def aligned(tensor: Tensor) -> int:
    """Bytes of a tensor's room in the copy."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def size_of(pieces: Mapping[str, Piece]) -> int:
    """Bytes of the copy."""
    return sum(aligned(piece.value) for piece in pieces.values())
