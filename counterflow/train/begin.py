"""What a start finds before it loads anything: text, folder, settings, an earlier run. No torch is imported here.

So a finished run says so and a wrong setting is refused at once, before ranks are started; each rank's own start asks
the same functions again, with what only it can know, such as the precision that `auto` means here.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

from counterflow.config.run import RunConfig
from counterflow.data.cache import lock
from counterflow.data.corpus import documents
from counterflow.data.tokenizer import require_tokenizer
from counterflow.errors import CheckpointError, ConfigError, installing
from counterflow.plan.count import count_parameters
from counterflow.plan.layout import begun, continued_in, require_layout
from counterflow.progress import say
from counterflow.train import lr
from counterflow.train.changes import Change, changes
from counterflow.train.folder import CHECKPOINTS, REPORT, RUN_TOML, run_config
from counterflow.train.manifest import path_of, state_of, steps_of, verify
from counterflow.train.patience import Patience
from counterflow.units import bytes_

BYTES_EACH = 16
"""Of a parameter in training: fp32 master, gradient and two moments."""
GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Where a Linux machine has any of these, only torch can tell whether it has a GPU for us."""


def is_complete(run: RunConfig) -> bool:
    """Whether the run is trained already, which is then said.   Fails: CounterflowError for what can be refused now."""
    require_tracker(run)
    if on_cpu(run):
        require_memory(run)
    folder = folder_for(run)
    with locked(folder, quiet=True):
        if _is_complete(run, folder):
            return True
    for source in run.data.sources:
        next(documents(source), None)
    require_tokenizer(run.data.tokenizer, run.model.vocab_size)
    return False


def on_cpu(run: RunConfig) -> bool:
    """Whether a run is surely one of this machine's processors, as far as can be told without torch."""
    return run.train.device == "cpu" or (sys.platform == "linux" and not any(map(os.path.exists, GPUS)))


def _is_complete(run: RunConfig, folder: Path) -> bool:
    """By the newest checkpoint alone; one that is damaged is for `begin` to pass over."""
    if run.keep.resume == "never":
        continued(run, folder, 0)
        return False
    step = newest(folder / CHECKPOINTS)
    require_resumable(run, folder, step)
    with suppress(CheckpointError):
        if step and trained_by(run, folder, step):
            verify(path_of(folder / CHECKPOINTS, step))
            say_complete(folder, step)
            return True
    return False


def begin(run: RunConfig, folder: Path) -> int | None:
    """The step to go on from, 0 for a start; None where the run is complete."""
    require_tracker(run)
    if run.keep.resume == "never" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        continued(run, folder, 0)
        move_aside(folder)  # once: ranks that parallel.restarts started again go on
    step = newest_sound(folder / CHECKPOINTS)
    require_resumable(run, folder, step)
    if step and trained_by(run, folder, step):
        say_complete(folder, step)
        return None
    return step


def require_resumable(run: RunConfig, folder: Path, step: int) -> None:
    """Refuse what cannot go on from a step, or an unfit layout, or to begin where there must be a checkpoint."""
    changed_at(continued(run, folder, step), folder, step)
    if run.keep.resume == "must" and not step:
        raise CheckpointError(
            f"{folder} has no checkpoint and keep.resume is 'must'; start with keep.resume=auto."
        )


def trained_by(run: RunConfig, folder: Path, step: int) -> bool:
    """Whether by a step that has a checkpoint all that the run plans is trained, or its patience is over."""
    run, state = continued(run, folder, step), state_of(path_of(folder / CHECKPOINTS, step))
    planned = lr.total_samples(run.train, run.data.sequence_length)
    return state["sample"] >= planned or Patience(run.train.patience, state).is_over


def continued(run: RunConfig, folder: Path, step: int) -> RunConfig:
    """The run with its batches and its length in tokens decided: as when it began, unless it asks for others now.

    Fails: CounterflowError for a layout that cannot run it.
    """
    run = continued_in(run, begun(run_config(folder)).train.batch_increment) if step else begun(run)
    require_layout(run)
    asked, train = asked_of(run), lr.in_tokens(run.train, run.data.sequence_length)
    if step and any(asked.values()) and asked == bounds_of(folder, step):
        decided = run_config(folder).train.tokens
        train = replace(run.train, tokens=min(run.train.tokens or decided, decided), steps=0, minutes=0.0)
    return replace(run, train=train)


def changed_at(run: RunConfig, folder: Path, step: int) -> list[Change]:
    """What is another setting in the run that goes on from a step; `run` as it was `continued`.

    Fails: ConfigError for what cannot be another one.
    """
    if not step:
        return []
    before = begun(run_config(folder))
    if run.train.minutes:
        before = replace(before, train=replace(before.train, minutes=bounds_of(folder, step)["minutes"]))
    return changes(before, run, folder, step)


def asked_of(run: RunConfig) -> dict[str, float]:
    """What a run's length in tokens is decided from when it begins; its checkpoints keep it."""
    return {"minutes": run.train.minutes, "steps": run.train.steps}


def bounds_of(folder: Path, step: int) -> dict[str, float]:
    """What was asked of the run of a checkpoint; its run.toml holds the tokens that came of it."""
    state = state_of(path_of(folder / CHECKPOINTS, step))
    return {"minutes": state.get("minutes", 0.0), "steps": state.get("steps", 0)}


def say_complete(folder: Path, step: int) -> None:
    """One line, with the page where there is one."""
    page = folder / REPORT
    shown = f"its page is {page}; " if page.is_file() else ""
    say(f"{folder} is complete (step {step}); {shown}keep.resume=never trains it anew.")


def folder_for(run: RunConfig) -> Path:
    """Where a run is kept, in full."""
    return Path(run.folder).resolve()


def require_tracker(run: RunConfig) -> None:
    """Refuse to log to a service whose package is not there."""
    if run.keep.wandb and find_spec("wandb") is None:
        raise ConfigError(
            f"keep.wandb is '{run.keep.wandb}' and wandb is not installed; leave it out, or: {installing('wandb')}."
        )


def require_memory(run: RunConfig) -> None:
    """Refuse a model whose weights and optimizer alone are more than the CPU's memory, before anything is made."""
    counts = count_parameters(run.model)
    each = BYTES_EACH + (4 if run.train.ema_decay else 0) + (2 if run.train.precision == "bf16" else 0)
    needed = (counts.total + counts.mtp) * each
    there = machine_bytes()
    if needed > there:
        raise ConfigError(
            f"{run.name} needs {bytes_(needed)} for weights, gradients and optimizer, and this machine has "
            f"{bytes_(there)}; one process trains smaller models: choose another, or lower its sizes."
        )


def machine_bytes() -> int:
    """The memory of this machine's processors."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def move_aside(folder: Path) -> None:
    """Give an earlier run another name, so that a new one can have its folder."""
    if (folder / RUN_TOML).is_file():
        aside = folder.with_name(f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(aside)
        say(f"The earlier run is now {aside}.")
        folder.mkdir(parents=True)


def newest(checkpoints: Path) -> int:
    """The newest checkpoint whose manifest can be read, else the oldest; 0 without one."""
    steps = steps_of(checkpoints)
    for step in reversed(steps):
        with suppress(CheckpointError):
            state_of(path_of(checkpoints, step))
            return step
    return steps[0] if steps else 0


def newest_sound(checkpoints: Path) -> int:
    """The newest checkpoint that is as it was written; 0 without one. What is passed over is said."""
    steps = steps_of(checkpoints)
    for step in reversed(steps):
        try:
            verify(path_of(checkpoints, step))
            return step
        except CheckpointError as error:
            if step == steps[0]:
                raise
            say(f"counterflow: {error} Going on from the one before.", sys.stderr)
    return 0


@contextmanager
def locked(folder: Path, quiet: bool = False) -> Iterator[None]:
    """Only one process trains in a folder; another is told so. A folder in which nothing came to lie goes again.

    The lock file stands beside the folder, so that the folder itself may be moved aside while it is held; in it where
    nothing may be written beside it. A file system without locks is named unless `quiet`.
    """
    beside = folder.with_name(f".{folder.name}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = _opened(beside)
        except OSError:
            file = _opened(folder / ".lock")
    except OSError as error:
        raise ConfigError(
            f"the folder {folder} cannot be written ({error.strerror}); choose another with keep.folder=..., or mend "
            "its permissions."
        ) from None
    with file:
        try:
            missing = lock(file, wait=False)
        except BlockingIOError:
            raise ConfigError(
                f"another process is training in {folder}; wait for it, or choose another folder with name=..."
            ) from None
        if missing and not quiet:
            say(
                f"counterflow: the file system of {folder} has no locks ({missing}); see to it that no other process "
                "trains there.",
                sys.stderr,
            )
        file.write(str(os.getpid()))
        try:
            yield
        finally:
            with suppress(OSError):
                folder.rmdir()
                beside.unlink()


def _opened(path: Path) -> TextIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT), "w")


def is_trained(run: RunConfig) -> bool:
    """Whether the newest checkpoint ends the run; one that was stopped has none that does."""
    folder = folder_for(run)
    step = newest(folder / CHECKPOINTS)
    return bool(step) and trained_by(run, folder, step)
