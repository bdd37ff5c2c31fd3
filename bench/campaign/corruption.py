"""Corrupted bytes in every file that is read: one clear line and a non-zero exit, or a right result.

Never a traceback, a hang, or another file lost or changed. A file that is `sealed` has a checksum, or others that say
the same: what is read although it is damaged must be what was written. In process a file's reader is called as the
command line calls it; `commands` are whole commands, forked.
"""

import contextlib
import io
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from bench.campaign.spoil import spoil
from counterflow.cli import answered
from counterflow.cli import main as command_line
from counterflow.config.run import Source
from counterflow.convert.export import Form, export
from counterflow.convert.load import load_folder
from counterflow.data.corpus import documents, survey
from counterflow.data.loader import Samples
from counterflow.data.tokenizer import load as load_tokenizer
from counterflow.evaluate import humaneval
from counterflow.schedule import SCHEDULES
from counterflow.schedule.text import to_csv, to_text
from counterflow.train.metrics import Metrics, read
from counterflow.train.restore import restore
from tests import processes
from tests.train.runs import overrides, small_run

HANGS_S, COMMAND_HANGS_S = 20, 120.0
MEMORY_BYTES = 12 * 2**30
"""Of this process and those forked: less than the machine has, so that what asks for too much fails by itself."""
LONGEST = 1500
"""Characters of a clear line."""
HARDWARE = """base = "h800"
communication_multiprocessors = 16
[card]
memory_bytes = 7e10
launch_s = 5e-6
source = "here"
[fabric]
bytes_per_s = 4e10
[efficiencies]
attention = 0.5
"""
GENERATE = ("generate", "--max_tokens", "2", "--temperature", "0", "--device", "cpu", "--run")


@dataclass(frozen=True)
class Kind:
    """Files of one kind, where they lie in the folder, and who reads them."""

    files: str
    """A pattern."""
    read: Callable[[Path, Path], Any]
    """Reads the file (its folder's root, the file); what it gives is compared where it is `sealed`."""
    words: Callable[[Path, Path], Sequence[str]]
    """The command that reads it."""
    sealed: bool = False
    picture: bool = False
    """Whether an error may show lines of what it found."""


class Hang(BaseException):
    """It takes too long; nothing that catches errors catches it."""


def prepare(root: Path) -> None:
    """A run with two checkpoints, its cache, an exported model and files of every other kind."""
    folder = root / "kept"
    folder.mkdir()
    texts(folder)
    words = overrides(folder, *RUN)
    assert command_line(["train", "tiny", *words]) == 0, "the run that is damaged later"
    model, tokenizer = restore(folder / "run")
    export(model, tokenizer, folder / "exported", Form("fp8", shard_gib=2e-5))
    shutil.copy(folder / "run" / "tokenizer.json", folder / "tokenizer.json")


RUN = ("keep.checkpoint_every=1", "train.steps=2", "keep.checkpoints=2", "keep.checkpoint_async=false")


def texts(folder: Path) -> None:
    """Files that are not made by a run."""
    import pyarrow
    from pyarrow import parquet

    rows = [{"text": f"the pipeline {n} is fed", "id": n, "more": {"a": [1, 2]}} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "plain.txt").write_text("One line of text.\nAnother – with signs.\n" * 20)
    parquet.write_table(pyarrow.table({"text": [f"row {n}" for n in range(20)]}), folder / "rows.parquet")
    tasks = [{"task_id": f"HumanEval/{n}", "completion": f"    return {n}\n"} for n in range(2)]
    (folder / "completions.jsonl").write_text("".join(f"{json.dumps(task)}\n" for task in tasks))
    (folder / "hardware.toml").write_text(HARDWARE)
    (folder / "loads.json").write_text("[[12, 9, 14, 3, 8, 8, 1, 40], [1, 2, 3, 4, 5, 6, 7, 8]]")
    (folder / "dispatch.json").write_text("[12, 9, 14, 3, 8, 8, 1, 40]")
    (folder / "schedule.txt").write_text(to_text(SCHEDULES["dualpipe"](4, 8)))
    (folder / "schedule.csv").write_text(to_csv(SCHEDULES["1f1b"](4, 8)))


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of names and bits."""
    found = blake2b()
    for name, tensor in tensors.items():
        found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def of_run(root: Path, _: Path) -> str:
    """A run's weights."""
    model, tokenizer = restore(root / "run")
    return digest(model.state_dict()) + tokenizer.hash


def of_export(root: Path, _: Path) -> str:
    """An exported model's weights."""
    return digest(load_folder(root / "exported")[0].state_dict())


def of_cache(root: Path, _: Path) -> str:
    """A run's samples."""
    run = small_run(root, *RUN)
    samples = Samples(run.data, run.model.vocab_size, run.train.seed, quiet=True)
    return samples.fingerprint + digest({"train": samples.train(0, 8), "held out": samples.held_out(0, 2)})


def of_text(_: Path, file: Path) -> str:
    """A source's documents."""
    found = survey(Source(str(file)), 0.5).hash
    assert list(documents(Source(str(file)))), "a survey that finds text finds documents"
    return found


def of_tokenizer(_: Path, file: Path) -> None:
    """A tokenizer that goes both ways."""
    tokenizer = load_tokenizer(file)
    tokenizer.decode(tokenizer.encode("the pipeline is fed from both ends\n"))


def of_metrics(root: Path, _: Path) -> None:
    """A run's history, as it is read for a page and at a resumption."""
    kept = (root / "run" / "metrics.jsonl").read_bytes()
    read(root / "run")
    Metrics(root / "run", 2).close()
    (root / "run" / "metrics.jsonl").write_bytes(kept)


def of_completions(_: Path, file: Path) -> None:
    """Programs to grade."""
    list(humaneval.from_file(file, humaneval.problems()))


def by(*words: str) -> Callable[[Path, Path], list[str]]:
    """A command; ROOT and FILE stand for what they name."""
    return lambda root, file: [word.replace("ROOT", str(root)).replace("FILE", str(file)) for word in words]


def said(*words: str) -> Callable[[Path, Path], None]:
    """A reader that is a short command, in this process."""

    def called(root: Path, file: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            code = command_line(by(*words)(root, file))
        if code:
            raise Refused(code)

    return called


class Refused(Exception):
    """A command in this process ended with this code and has said why."""


def trained(root: Path, file: Path) -> list[str]:
    """The command that trains a run of the text in a new folder."""
    shutil.rmtree(root / "new", ignore_errors=True)
    words = [word for word in overrides(root, *RUN) if not word.startswith(("keep.folder", "data.sources"))]
    return [
        "train",
        "tiny",
        *words,
        f"keep.folder={root / 'new'}",
        f"data.sources={file}",
        "data.held_out=0.5",
    ]


def of_cached(root: Path, _: Path) -> list[str]:
    """The command that trains again by what is in the cache."""
    return [*trained(root, root / "text.txt"), "data.held_out=0.1"]


EXPORTED, OF_RUN = by(*GENERATE, "ROOT/exported"), by(*GENERATE, "ROOT/run")
GRADE = ("evaluate", "humaneval", "--completions", "FILE", "--unconfined")
PLACE = ("plan", "v3-16b", "--gpus", "4", "--place", "FILE")
LOADS = ("plan", "tiny", "--gpus", "2", "--card", "cpu", "train.tokens=1e6", "--loads", "FILE")
PLAN = ("plan", "tiny", "--gpus", "2", "train.tokens=1e6", "--hardware", "FILE")
KINDS: Mapping[str, Kind] = {
    "run.toml": Kind("run/run.toml", of_run, OF_RUN),
    "config.json": Kind("exported/config.json", of_export, EXPORTED),
    "generation_config": Kind("exported/*_config.json", of_export, EXPORTED),
    "shard": Kind("exported/*.safetensors", of_export, EXPORTED, sealed=True),
    "index": Kind("exported/*.index.json", of_export, EXPORTED, sealed=True),
    "checkpoint": Kind("run/checkpoints/step-00000002/*.distcp", of_run, OF_RUN, sealed=True),
    "checkpoint's metadata": Kind("run/checkpoints/step-00000002/.metadata", of_run, OF_RUN, sealed=True),
    "manifest": Kind("run/checkpoints/step-00000002/manifest.json", of_run, OF_RUN, sealed=True),
    "data shard": Kind("cache/shards/*/*.npy", of_cache, of_cached, sealed=True),
    "data manifest": Kind("cache/shards/*/manifest.json", of_cache, of_cached, sealed=True),
    "survey": Kind("cache/corpora/*/survey.json", of_cache, of_cached, sealed=True),
    "tokenizer.json": Kind("tokenizer.json", of_tokenizer, by("train", "tiny", "data.tokenizer=FILE", "--dry-run")),
    "exported tokenizer": Kind("exported/tokenizer.json", of_export, EXPORTED),
    "text": Kind("plain.txt", of_text, trained),
    "JSON lines": Kind("rows.jsonl", of_text, trained),
    "parquet": Kind("rows.parquet", of_text, trained),
    "completions": Kind("completions.jsonl", of_completions, by(*GRADE)),
    "metrics": Kind("run/metrics.jsonl", of_metrics, OF_RUN),
    "hardware": Kind("hardware.toml", said(*PLAN), by(*PLAN)),
    "placement's loads": Kind("loads.json", said(*PLACE), by(*PLACE)),
    "dispatch's loads": Kind("dispatch.json", said(*LOADS), by(*LOADS)),
    "schedule": Kind("schedule.txt", said("schedule", "FILE"), by("schedule", "FILE"), picture=True),
    "schedule's CSV": Kind("schedule.csv", said("schedule", "FILE"), by("schedule", "FILE"), picture=True),
}  # fmt: skip


@contextmanager
def opened(place: Path) -> Iterator[Callable[[random.Random], tuple[str, ...]]]:
    """Readers, in this process."""
    with _prepared(place) as root:
        whole = {name: kind.read(root, _files(root, kind)[0]) for name, kind in KINDS.items() if kind.sealed}
        yield partial(_case, root, lambda name, kind, file: in_process(root, kind, file, whole.get(name)))


@contextmanager
def opened_commands(place: Path) -> Iterator[Callable[[random.Random], tuple[str, ...]]]:
    """Commands, forked."""
    with _prepared(place) as root:
        yield partial(_case, root, lambda _, kind, file: by_command(root, kind, file))


@contextmanager
def _prepared(place: Path) -> Iterator[Path]:
    """The folder; within bounds of memory, since a wrong number may ask for any amount."""
    bounds = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare(place)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, bounds[1]))
    before = signal.signal(signal.SIGALRM, _hang)
    try:
        yield place / "kept"
    finally:
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, bounds)


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang


def _case(root: Path, reading: Callable[[str, Kind, Path], str], dice: random.Random) -> tuple[str, ...]:
    """A file spoilt, read, and put right again."""
    name = dice.choice(list(KINDS))
    kind = KINDS[name]
    file = dice.choice(_files(root, kind))
    good = file.read_bytes()
    how, bad = spoil(dice, file.name, good)
    if bad == good:
        how = "unchanged"
    file.write_bytes(bad)
    innocent = _snapshot(root, file)
    told = f"{file.relative_to(root)} {how}, {bad[:200]!r}{' …' if len(bad) > 200 else ''}"
    try:
        outcome = reading(name, kind, file)
        kept = _snapshot(root, file)
        lost = [path for path, stamp in innocent.items() if kept.get(path) != stamp]
        assert not lost, f"changed or lost: {lost}"
    except Exception as error:
        raise AssertionError(f"{told}: {error or repr(error)}") from error
    except Hang:
        raise AssertionError(f"{told}: it hangs") from None
    except BaseException as error:  # a library's panic is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise AssertionError(f"{told}: {error!r}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        file.write_bytes(good)
    return name, how, outcome


def _files(root: Path, kind: Kind) -> list[Path]:
    return sorted(root.glob(kind.files))


def _snapshot(root: Path, file: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file but this one, of locks and of what the commands make anew."""
    own = (".lock", "metrics.jsonl")
    paths = (
        path for path in root.rglob("*") if path.is_file() and path != file and not path.name.endswith(own)
    )
    return {
        str(path.relative_to(root)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in paths
        if path.relative_to(root).parts[0] != "new" and "tensorboard" not in path.parts
    }


def in_process(root: Path, kind: Kind, file: Path, whole: Any) -> str:
    """The file read as the command line reads it.   Fails: AssertionError."""
    found: list[Any] = []
    errors = io.StringIO()

    def act() -> int:
        found.append(kind.read(root, file))
        return 0

    signal.setitimer(signal.ITIMER_REAL, HANGS_S)
    with contextlib.redirect_stderr(errors):
        try:
            code = answered(act)
        except Refused as refused:
            code = refused.args[0]
    signal.setitimer(signal.ITIMER_REAL, 0)
    if code == 0:
        assert not kind.sealed or found[0] == whole, "it was read, and is not what was written"
        return "read"
    return _require_clear(errors.getvalue(), code, kind)


def by_command(root: Path, kind: Kind, file: Path) -> str:
    """The command's exit code and words.   Fails: AssertionError."""
    words = [sys.executable, "-m", "counterflow", *kind.words(root, file)]
    try:
        done = processes.run(words, timeout=COMMAND_HANGS_S, stdin=subprocess.DEVNULL, cwd=str(root.parent))
    except subprocess.TimeoutExpired:
        raise AssertionError("the command hangs") from None
    assert "Traceback" not in done.stdout + done.stderr, done.stderr[-1500:]
    return "read" if done.returncode == 0 else _require_clear(done.stderr, done.returncode, kind)


def _require_clear(said: str, code: int, kind: Kind) -> str:
    assert code in (2, 3), f"exit code {code}: {said[-1500:]}"
    lines = [line for line in said.splitlines() if line.startswith("counterflow: ")]
    rest = [line for line in said.splitlines() if line.strip() and line not in lines]
    assert lines, f"nothing clear is said: {said[-500:]!r}"
    assert kind.picture or not any("rror" in line for line in rest), f"more than a line: {said[-1500:]!r}"
    assert all(len(line) <= LONGEST for line in lines), (
        f"a line of {max(map(len, lines))} characters: {said[:300]!r}"
    )
    return "refused"
