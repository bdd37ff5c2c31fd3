"""SIGKILL of a real process in the midst of a phase; the same command goes on, and the end is as if nothing had been.

A phase is a function of the package. A command is forked in which this function starts a clock, so that the process
kills itself at a random moment of a random call; with two ranks that is one or both of them. A tenth of the commands
is executed as one types it, and killed from outside where its folder shows the phase. After each kill all checkpoints
must load; tensors of the last one and metrics must be those of the run left alone, bit for bit, and an export is whole
or not there.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from counterflow.train.checkpoint import WRITING, Checkpoints
from counterflow.train.folder import CHECKPOINTS
from counterflow.train.metrics import read
from tests import processes
from tests.train.runs import overrides

PHASES: Mapping[str, tuple[str, str, str]] = {
    "tokenising": ("counterflow.data.loader", "Samples", "__init__"),
    "step": ("counterflow.train.trainer", "Trainer", "step"),
    "checkpoint": ("counterflow.train.checkpoint", "Checkpoints", "write"),
    "evaluation": ("counterflow.train.trainer", "Trainer", "held_out_loss"),
    "export": ("counterflow.convert.export", "", "export"),
}
"""Module, class and function."""
RUN = ("keep.checkpoint_every=2", "keep.eval_every=3", "keep.checkpoints=2", "train.tokens=1536")
LAYOUTS = {"one rank": (), "two ranks": ("parallel.pipeline=2", "parallel.schedule=1f1b")}
EXECUTED, TWO = 0.1, 0.2
"""Shares of the commands that are executed, and of those that have two ranks."""
MEASURED = ("_s", "seconds", "_bytes")
"""Ends of the names of metrics that no two runs share."""
ENDS_S = 120.0


@contextmanager
def opened(place: Path) -> Iterator[Callable[[random.Random], tuple[str, ...]]]:
    """Runs and an export left alone, and then the kills."""
    numbers, told = count(), place / "told"
    for name, layout in LAYOUTS.items():
        place.joinpath(name).mkdir()
        run(training(place, place / name, *layout), "all", told)
        if not layout:
            calls: dict[str, list[float]] = json.loads(told.read_text())
    run(
        ["export", str(place / "one rank" / "run"), str(place / "exported"), "--shard_gib", "2e-5"],
        "all",
        told,
    )
    calls["export"] = json.loads(told.read_text())["export"]

    def case(dice: random.Random) -> tuple[str, ...]:
        phase = dice.choice(list(PHASES))
        folder = place / str(next(numbers))
        folder.mkdir()
        if phase == "export":
            return exports(dice, place, folder, calls[phase])
        return trains(dice, place, folder, phase, calls[phase])

    yield case


def training(place: Path, folder: Path, *more: str) -> list[str]:
    """The command's words for a run in this folder; they end in how it treats an earlier one."""
    return [
        "train",
        "tiny",
        *overrides(place, *RUN, f"keep.folder={folder / 'run'}", *more),
        "keep.resume=auto",
    ]


def run(
    words: Sequence[str], phase: str = "", told: Path | None = None, number: int = 0, after_s: float = 0.0
) -> int:
    """A forked command's exit code; with a phase its calls are written down, or one of them ends by SIGKILL."""
    clock = ["-m", "bench.campaign.kills", phase, str(told), str(number), str(after_s)]
    command = [sys.executable, *(clock if phase else ["-m", "counterflow"]), *words]
    done = processes.run(command, timeout=ENDS_S, cwd=str(processes.ROOT))
    assert number or done.returncode == 0, (
        f"{words}: {done.returncode}: {done.stdout[-500:]} {done.stderr[-1500:]}"
    )
    assert "Traceback" not in done.stderr, done.stderr[-1500:]
    return done.returncode


def trains(dice: random.Random, place: Path, folder: Path, phase: str, calls: list[float]) -> tuple[str, ...]:
    """A training killed in a phase, which then goes on."""
    layout = "two ranks" if phase != "tokenising" and dice.random() < TWO else "one rank"
    more = [*LAYOUTS[layout], *([f"data.cache_dir={folder / 'cache'}"] if phase == "tokenising" else [])]
    words = training(place, folder, *more)
    if dice.random() < EXECUTED:
        where = "executed"
        executed(words, SHOWN[phase](folder), dice.uniform(0.0, 0.05))
    else:
        number = dice.randrange(len(calls))
        where = killed(words, phase, folder / "told", number + 1, dice.random() * calls[number])
    kept = Checkpoints(folder / "run" / CHECKPOINTS, 9)
    for step in kept.steps():
        kept.verify(step)
    begun = "from a checkpoint" if kept.steps() else "from the start"
    run(words)
    assert not list(kept.folder.glob("*" + WRITING)), "a half-written checkpoint is left"
    mine, theirs = final_state(folder / "run"), final_state(place / layout / "run")
    names = mine.keys() | theirs.keys()
    different = [name for name in names if not same(mine.get(name), theirs.get(name))]
    assert not different, f"{phase} {where}, {layout}: {different[:3]} of {len(names)} tensors differ"
    assert timeless(folder / "run") == timeless(place / layout / "run"), f"{phase} {where}: metrics differ"
    return f"{phase}, {where}", layout, begun


def exports(dice: random.Random, place: Path, folder: Path, calls: list[float]) -> tuple[str, ...]:
    """An export killed and made again."""
    words = ["export", str(place / "one rank" / "run"), str(folder / "exported"), "--shard_gib", "2e-5"]
    if dice.random() < EXECUTED:
        where = "executed"
        executed(words, SHOWN["export"](folder), dice.uniform(0.0, 0.02))
    else:
        where = killed(words, "export", folder / "told", 1, dice.random() * calls[0])
    whole = (folder / "exported").exists()
    if not whole:
        run(words)
    assert contents(folder / "exported") == contents(place / "exported"), f"the export is another, {where}"
    return f"export, {where}", "was whole" if whole else "was not there"


def killed(words: Sequence[str], phase: str, told: Path, number: int, after_s: float) -> str:
    """Whether the kill came inside the phase or behind it."""
    code = run(words, phase, told, number, after_s)
    if not told.exists():
        assert code == 0, f"ended with {code}"
        return "not reached"
    assert code in (-signal.SIGKILL, 4), f"ended with {code}"  # 4: a rank was killed
    return told.read_text()


def executed(words: Sequence[str], shows: Callable[[], bool], after_s: float) -> None:
    """Run a command as one types it, and kill it so long after its folder shows the phase."""
    command = [sys.executable, "-m", "counterflow", *words]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen(command, cwd=processes.ROOT, **quiet) as process:
        deadline = time.monotonic() + ENDS_S
        while process.poll() is None and not shows():
            assert time.monotonic() < deadline, "the phase does not come"
            time.sleep(0.001)
        time.sleep(after_s)
        process.kill()


SHOWN: Mapping[str, Callable[[Path], Callable[[], bool]]] = {
    "tokenising": lambda folder: lambda: any((folder / "cache").glob("*/*")),
    "step": lambda folder: lambda: len(read(folder / "run")) > 2,
    "checkpoint": lambda folder: lambda: any((folder / "run" / CHECKPOINTS).glob("*" + WRITING)),
    "evaluation": lambda folder: lambda: len(read(folder / "run")) == 2,
    "export": lambda folder: lambda: any(folder.glob("*" + WRITING)),
}
"""By what a folder shows from outside that a phase has begun, or is about to."""


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    kept = Checkpoints(folder / CHECKPOINTS, 9)
    step = kept.steps()[-1]
    metadata: Any = dcp.FileSystemReader(str(kept.path(step))).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in metadata.items()}
    kept.load(step, tensors)
    return tensors


def same(mine: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    """Whether both are there and equal bit for bit."""
    return mine is not None and theirs is not None and torch.equal(mine, theirs)


def timeless(folder: Path) -> list[dict[str, Any]]:
    """What a run has measured but for times and memory."""
    return [{key: each for key, each in row.items() if not key.endswith(MEASURED)} for row in read(folder)]


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def clocked(phases: Sequence[str], told: Path, number: int, after_s: float) -> None:
    """Have all calls of the phases timed, or this process killed so long after the beginning of one of them."""
    seconds: dict[str, list[float]] = {phase: [] for phase in phases}

    def around(phase: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        inside = threading.Event()

        def kill() -> None:
            time.sleep(after_s)
            told.write_text("inside" if inside.is_set() else "behind it")
            os.kill(os.getpid(), signal.SIGKILL)

        def timed(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            inside.set()
            if len(seconds[phase]) + 1 == number:
                threading.Thread(target=kill, daemon=True).start()
            try:
                return plain(*given, **named)
            finally:
                inside.clear()
                seconds[phase].append(time.perf_counter() - start)
                if not number:
                    told.write_text(json.dumps(seconds))

        return timed

    for phase in phases:
        module, owner, name = PHASES[phase]
        place: Any = getattr(import_module(module), owner) if owner else import_module(module)
        setattr(place, name, around(phase, getattr(place, name)))


if __name__ == "__main__":
    from counterflow.cli import main

    clocked(
        list(PHASES) if sys.argv[1] == "all" else sys.argv[1:2],
        Path(sys.argv[2]),
        int(sys.argv[3]),
        float(sys.argv[4]),
    )
    sys.exit(main(sys.argv[5:]))
