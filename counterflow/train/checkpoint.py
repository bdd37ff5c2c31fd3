"""Checkpoints that are either whole or not there, whenever the process dies.

A checkpoint is a folder that torch's distributed checkpoint writes under another name, beside a manifest with the
size and CRC of every file, the run's place, and a CRC of its own; it is flushed to disk and then renamed to
`step-…`, which is one atomic act. So every folder called `step-…` was whole when it got its name, and the manifest
tells whether it still is. Older ones go only after that, and lose their name before their files. Not taken:
overwriting in place, or one `latest` file that points somewhere: both have a moment in which nothing loads.
"""

import errno
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from counterflow.comm.mesh import Mesh
from counterflow.errors import CheckpointError, first_line
from counterflow.train import manifest
from counterflow.train.files import PieceReader, PieceWriter, system_error
from counterflow.train.piece import LoadPieces, Piece, SavePieces

METADATA = ".metadata"
"""The file in which torch's distributed checkpoint says where every tensor lies."""
WRITING, REMOVING = ".writing", ".removing"
ANOTHER_MODEL = "it is of another model or other settings: resume with the configuration in its run.toml."
CAUSES = {
    errno.ENOSPC: "no space is left there: free some, or lower keep.checkpoints",
    errno.EDQUOT: "the disk quota is used up: free some space, or lower keep.checkpoints",
    errno.EFBIG: "the file-size limit is reached: raise it (ulimit -f)",
    errno.EACCES: "writing there is not allowed: choose another keep.folder or change its permissions",
    errno.EPERM: "writing there is not allowed: choose another keep.folder or change its permissions",
    errno.EROFS: "that file system is read-only: choose another keep.folder",
    errno.ENOTDIR: "a file stands where a folder must be: move it, or choose another keep.folder",
    errno.EEXIST: "a file stands where a folder must be: move it, or choose another keep.folder",
}


class Checkpoints:
    """The checkpoints of one run; the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int, mesh: Mesh | None = None) -> None:
        self.folder, self.keep, self.mesh = folder, keep, mesh or Mesh()

    def path(self, step: int) -> Path:
        """Where a step's checkpoint is."""
        return manifest.path_of(self.folder, step)

    def steps(self) -> list[int]:
        """The steps that have one, in order."""
        return manifest.steps_of(self.folder)

    def save(self, step: int, pieces: Mapping[str, Piece | Tensor], state: Mapping[str, Any]) -> Path:
        """Write every rank's pieces (a tensor is one, whole) and a JSON-able state.

        Older checkpoints are untouched until this one is whole. A collective. Fails, on every rank:
        CheckpointError that names path, cause and remedy.
        """
        with quiet():
            return self.write(step, pieces, state)

    def write(self, step: int, pieces: Mapping[str, Piece | Tensor], state: Mapping[str, Any]) -> Path:
        """`save`, for a thread: torch's warnings are the caller's to silence."""
        final = self.path(step)
        writing = final.with_name(final.name + WRITING)
        files = PieceWriter(writing)

        def prepare() -> None:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)

        def write() -> None:
            alone, group = self.mesh.size == 1, self.mesh.objects
            dcp.save(
                _pieces(pieces),
                storage_writer=files,
                planner=SavePieces(),
                process_group=group,
                no_dist=alone,
            )

        def finish() -> None:
            manifest.write(writing, state, sums)
            if final.exists():
                _remove(final)
            writing.rename(final)
            manifest.flush(self.folder)
            self._tidy(step)

        self.mesh.first_does(lambda: self._guarded(prepare, final))
        self.mesh.all_do(lambda: self._guarded(write, final))
        sums = {name: sum for some in self.mesh.everyone(files.sums) for name, sum in some.items()}
        self.mesh.first_does(lambda: self._guarded(finish, final))
        return final

    def _guarded(self, act: Callable[[], None], final: Path) -> None:
        """Act; what fails is said as a user can use it, and what was half written goes."""
        try:
            act()
        except (OSError, CheckpointException, RuntimeError) as error:
            if self.mesh.first:
                shutil.rmtree(final.with_name(final.name + WRITING), ignore_errors=True)
            raise CheckpointError(_why_not_written(final, error, self.steps())) from error

    def _tidy(self, saved: int) -> None:
        """Keep the newest up to the one just saved; later ones were passed over at resuming and count for nothing."""
        for step in [step for step in self.steps() if step <= saved][: -self.keep]:
            with suppress(OSError):
                _remove(self.path(step))
        self.clear()

    def clear(self) -> None:
        """Remove what a killed save has left, which a full disk may have no room beside."""
        for suffix in (WRITING, REMOVING):
            for stale in self.folder.glob("*" + suffix):
                shutil.rmtree(stale, ignore_errors=True)

    def state(self, step: int) -> dict[str, Any]:
        """The state saved with a checkpoint.   Fails: CheckpointError if its manifest cannot be read."""
        return manifest.state_of(self.path(step))

    def verify(self, step: int) -> None:
        """Compare every file with the manifest.   Fails: CheckpointError with the first file that differs."""
        manifest.verify(self.path(step))

    def holds(self, step: int, kind: str) -> bool:
        """Whether a checkpoint has tensors whose names begin so.   Fails: CheckpointError if its index is damaged."""
        manifest.verify(self.path(step), [METADATA])
        return any(name.startswith(kind) for name in self._saved(step))

    def load(self, step: int, pieces: Mapping[str, Piece | Tensor], some: bool = False) -> None:
        """Fill the pieces in place; with `some`, the checkpoint may hold more than are asked for, and in another type.

        Any layout's checkpoint fills any other's. A collective. Fails, on every rank: CheckpointError if a file is not
        as it was written, or a tensor's name, size or type is another.
        """
        path, wanted = self.path(step), _pieces(pieces)
        self.mesh.first_does(lambda: manifest.verify(path, [METADATA] if some else None))
        self.mesh.all_do(lambda: self._match(step, wanted, some))
        if some:
            names = self.mesh.union(pieces)
            self.mesh.first_does(lambda: manifest.verify(path, files_of(path, names)))
        with quiet():  # together, so that none is at the next step while another still reads
            self.mesh.all_do(
                lambda: dcp.load(
                    dict(wanted), storage_reader=PieceReader(path), planner=LoadPieces(), no_dist=True
                )
            )

    def _saved(self, step: int) -> Mapping[str, Any]:
        return dcp.FileSystemReader(str(self.path(step))).read_metadata().state_dict_metadata

    def _match(self, step: int, pieces: Mapping[str, Piece], some: bool) -> None:
        path, saved = self.path(step), self._saved(step)
        for name in sorted(set(self.mesh.union(pieces)) ^ set(saved)):
            if name not in saved:
                raise CheckpointError(f"{path} has no tensor '{name}'; {ANOTHER_MODEL}")
            if not some:
                raise CheckpointError(f"{path} holds '{name}', which this run lacks; {ANOTHER_MODEL}")
        for name, piece in pieces.items():
            kept = saved[name]
            assert isinstance(kept, TensorStorageMetadata), f"'{name}' was saved as a tensor"
            size, dtype = kept.size.numel(), kept.properties.dtype
            if size != piece.total:
                raise CheckpointError(
                    f"{path} holds '{name}' with {size} elements, this model has {piece.total}; {ANOTHER_MODEL}"
                )
            if dtype != piece.value.dtype and not some:
                raise CheckpointError(
                    f"{path} holds '{name}' in {dtype}, this model has it in {piece.value.dtype}; {ANOTHER_MODEL}"
                )


def _pieces(given: Mapping[str, Piece | Tensor]) -> dict[str, Piece]:
    return {name: value if isinstance(value, Piece) else Piece.whole(value) for name, value in given.items()}


def files_of(path: Path, names: Collection[str]) -> list[str]:
    """The files of a checkpoint that hold these tensors."""
    stored = dcp.FileSystemReader(str(path)).read_metadata().storage_data
    return sorted({info.relative_path for index, info in stored.items() if index.fqn in names})


def _remove(path: Path) -> None:
    """Take the name away in one act, then the files, so that a kill in between leaves no half `step-…`."""
    nameless = path.with_name(path.name + REMOVING)
    shutil.rmtree(nameless, ignore_errors=True)
    path.rename(nameless)
    shutil.rmtree(nameless, ignore_errors=True)


def _why_not_written(path: Path, error: BaseException, older: list[int]) -> str:
    """One sentence from whatever the writing raised, with the operating system's cause dug out."""
    cause = system_error(error)
    while isinstance(error, CheckpointException) and error.failures:  # by rank
        failure = next(iter(error.failures.values()))
        error = failure[0] if isinstance(failure, tuple) else failure
    why = CAUSES.get(cause.errno or 0, cause.strerror or str(cause)) if cause else first_line(error)
    kept = f"Saved before and untouched: step {older[-1]}." if older else "No earlier checkpoint was there."
    return f"the checkpoint {path} could not be written; {why}. {kept}"


@contextmanager
def quiet() -> Iterator[None]:
    """Without DCP's warning that there is no process group, which is what `no_dist` asks for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
        yield
