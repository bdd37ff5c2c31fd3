"""Random layouts against the plain loop: one step bit for bit, and whole runs that are stopped and go on in another.

A step is compared by `counterflow.benchmark.equality`. A run is `train` itself: every rank is a thread with process
groups of its own over gloo, or, as `processes`, the command with a process a rank. It is stopped after some step, goes
on in another layout and is then complete in a third; batches must add up to what was asked for, and the plain loop,
given the same batches, must find the same losses. Rounding in another order moves them by some 1e-5.
"""

import contextlib
import io
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.multi_threaded_pg import ThreadLocalWorld

from counterflow.benchmark import equality_experts
from counterflow.benchmark.equality import compare, draw, random_placement, small_model
from counterflow.comm.mesh import Mesh
from counterflow.config.load import load_run
from counterflow.config.run import RunConfig
from counterflow.data.loader import Samples
from counterflow.errors import CounterflowError
from counterflow.plan.layout import require_layout
from counterflow.schedule import SCHEDULES
from counterflow.train import loop, lr
from counterflow.train.metrics import read
from counterflow.train.trainer import Trainer
from tests import processes
from tests.train.runs import overrides

RESUMED = 0.25
"""Of the layouts in one process: whole runs."""
LOSS, NORM = 1e-3, 1e-2
"""Relative differences from the plain loop that rounding, which Adam magnifies, stays below in a run of so few steps;
a sample left out or taken twice is above them."""
LENGTH, MOST_RANKS, ENDS_S = 8, 8, 120.0


@contextmanager
def opened(place: Path) -> Iterator[Callable[[random.Random], tuple[str, ...]]]:
    """Layouts in this process."""
    torch.set_num_threads(1)
    numbers = count()

    def case(dice: random.Random) -> tuple[str, ...]:
        if dice.random() >= RESUMED:
            return step(dice)
        return whole(dice, place, place / f"run{next(numbers)}", _in_threads, most=MOST_RANKS)

    with threads_are_ranks():
        yield case


@contextmanager
def opened_processes(place: Path) -> Iterator[Callable[[random.Random], tuple[str, ...]]]:
    """Layouts as commands, a process a rank."""
    numbers = count()
    yield lambda dice: whole(dice, place, place / f"run{next(numbers)}", _in_processes, most=4)


def step(dice: random.Random) -> tuple[str, ...]:
    """One step of a drawn layout."""
    layout, depth = draw(dice)
    while layout.ranks * layout.data_ranks > MOST_RANKS:
        layout, depth = draw(dice)
    stages = SCHEDULES[layout.schedule](layout.ranks, 4 * layout.ranks).stages
    model, seed = small_model(stages, depth, dice.randrange(1000)), dice.randrange(1000)
    try:
        if layout.expert == 1:
            compare(layout, model, seed)
        else:
            equality_experts.compare(layout, model.double(), seed)
    except Exception as error:
        raise AssertionError(f"{asdict(layout)}, MTP depth {depth}: {error}") from error
    kinds = {
        "MTP": depth,
        "uneven plan": layout.placement,
        "recomputation": layout.recompute != "none",
        "data ranks": layout.data_ranks > 1,
        "shared experts": layout.expert > 1,
    }
    return "one step", layout.schedule, *(name for name, wanted in kinds.items() if wanted)


def whole(
    dice: random.Random,
    place: Path,
    folder: Path,
    train: Callable[[RunConfig, list[str], int], None],
    most: int,
) -> tuple[str, ...]:
    """A run through a layout until some step, through another to the end, and once more in a third; at most so many
    ranks."""
    words, layouts = drawn_run(dice, most)
    words = overrides(place, *words, f"keep.folder={folder}")
    runs = [(load_run("tiny", [*words, *layout]), [*words, *layout]) for layout in layouts]
    told = " | ".join(" ".join(layout) for layout in layouts)
    try:
        stop = dice.randrange(1, max(2, _steps(runs[0][0])))
        train(*runs[0], stop)
        stopped = len(read(folder))
        train(*runs[1], 0)
        rows = read(folder)
        train(*runs[2], 0)
        assert read(folder) == rows, "a complete run went on in a third layout"
        assert stopped <= len(rows)
        compare_with_plain(load_run("tiny", [*words, "train.micro_batch_size=1"]), rows)
    except Exception as error:
        raise AssertionError(f"{' '.join(words[-12:])}: {told}: {error}") from error
    labels = {name for run, _ in runs[:2] for name in _labels(run)}
    return "resumed in another layout" if stopped < len(rows) else "not stopped", *sorted(labels)


def drawn_run(dice: random.Random, most: int) -> tuple[list[str], list[list[str]]]:
    """Settings of a run of few steps, and three layouts of at most so many ranks that all allow its batches."""
    while True:
        depth, layers = dice.choice((0, 0, 1, 1, 2)), dice.choice((2, 2, 3, 5))
        batch = dice.choice((4, 4, 8, 8, 12, 16))
        samples = batch * dice.uniform(1.5, 3.5)
        words = [
            f"data.sequence_length={LENGTH}",
            "data.held_out=0.01",
            f"model.num_mtp_modules={depth}",
            f"model.num_layers={layers}",
            f"train.batch_size={batch}",
            f"train.tokens={int(samples * LENGTH)}",
            "keep.checkpoint_async=false",
            "keep.checkpoint_every=1000",
            "keep.eval_every=1000",
        ]
        if dice.random() < 0.6:
            words += [
                f"train.batch_start={dice.choice((2, 4, 8))}",
                f"train.batch_ramp_until={dice.random()}",
            ]
        with contextlib.suppress(CounterflowError):
            layouts = [drawn_layout(dice, layers, depth) for _ in range(3)]
            runs = [load_run("tiny", [*overrides(Path("/"), *words), *layout]) for layout in layouts]
            for run in runs:
                require_layout(run)
            if all(run.parallel.processes <= most for run in runs):
                return words, layouts


def drawn_layout(dice: random.Random, layers: int, depth: int) -> list[str]:
    """Settings that may be others when a run goes on."""
    name, ranks, data = (
        dice.choice(list(SCHEDULES)),
        dice.choice((1, 1, 2, 2, 3, 4)),
        dice.choice((1, 1, 2, 2, 3, 4)),
    )
    expert = dice.choice([size for size in (1, 1, 2, 4) if data % size == 0])
    words = [f"parallel.pipeline={ranks}", f"parallel.data={data}", f"parallel.expert={expert}"]
    words.append(f"train.micro_batch_size={dice.choice((1, 1, 2))}")
    words.append(f"train.recompute={dice.choice(('none', 'attention', 'none' if ranks > 1 else 'layer'))}")
    if ranks > 1:
        words.append(f"parallel.schedule={name}")
        stages = SCHEDULES[name](ranks, 4 * ranks).stages
        if dice.random() < 0.5 and stages <= layers + depth + 2:
            words.append(f"parallel.placement={random_placement(dice, stages, layers, depth)}")
    if expert > 1 and dice.random() < 0.5:
        words += ["parallel.dispatch=two_hop", f"parallel.node_ranks={dice.choice((1, expert))}"]
    return words


def compare_with_plain(run: RunConfig, rows: list[dict[str, Any]]) -> None:
    """Samples, batches and losses of a run against the plain loop with its batches.   Fails: AssertionError."""
    samples = [row["samples"] for row in rows]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "steps are missing or twice"
    asked = run.train.tokens / LENGTH
    assert asked <= samples[-1] < asked + run.train.batch_size, f"{samples[-1]} samples for {asked:g}"
    starts = [0, *samples[:-1]]
    assert [row["batch"] for row in rows] == [end - start for start, end in zip(starts, samples)], "batches"
    plain = Trainer(run, Samples(run.data, run.model.vocab_size, run.train.seed, quiet=True), Mesh())
    for row in rows:
        assert row["batch"] == run.train.batch_size or run.train.batch_start, f"a batch of {row['batch']}"
        with patch.object(lr, "batch_size", lambda *_, row=row: row["batch"]):
            found: dict[str, Any] = plain.step()
        for name, bound in (("loss", LOSS), ("mtp_loss", LOSS), ("grad_norm", NORM), ("lr", 0.0)):
            _require_close(found[name], row[name], bound, f"{name} of step {row['step']}")
        for layer, counts in row["load"].items():
            assert sum(counts) == sum(found["load"][layer]), (
                f"step {row['step']} routed {sum(counts)} in {layer}"
            )
    loss = plain.held_out_loss(plain.samples.num_held_out)
    _require_close(loss, rows[-1]["held_out_loss"], LOSS, "the held-out loss")


def _require_close(one: Any, other: Any, bound: float, what: str) -> None:
    pairs = zip(one, other, strict=True) if isinstance(one, list) else [(one, other)]
    for a, b in pairs:
        assert abs(a - b) <= bound * abs(a), f"{what} is {b:.6g}, the plain loop's {a:.6g}"


def _steps(run: RunConfig) -> int:
    return lr.num_steps(run.train, LENGTH)


def _labels(run: RunConfig) -> Iterator[str]:
    parallel, train = run.parallel, run.train
    yield parallel.schedule if parallel.pipeline > 1 else "one pipeline rank"
    kinds = {
        "MTP": run.model.num_mtp_modules,
        "uneven plan": parallel.placement,
        "recomputation": train.recompute != "none",
        "data ranks": parallel.data > 1,
        "shared experts": parallel.expert > 1,
        "ramp": train.batch_start,
    }
    yield from (name for name, wanted in kinds.items() if wanted)


@contextmanager
def threads_are_ranks() -> Iterator[None]:
    """While inside, every thread has process groups of its own."""
    isolate = torch._C._distributed_c10d._set_thread_isolation_mode  # pyright: ignore[reportAttributeAccessIssue]
    isolate(True)
    try:
        with patch.object(distributed_c10d, "_world", ThreadLocalWorld()):
            yield
    finally:
        isolate(False)


def _in_threads(run: RunConfig, words: list[str], stop: int) -> None:
    """Train with a thread a rank, told to stop after a step (0: never)."""
    parallel, store, stops, plain = run.parallel, dist.HashStore(), list[int](), Trainer.step

    def counted(trainer: Trainer, *given: Any) -> dict[str, object]:
        values = plain(trainer, *given)
        if trainer.steps == stop:
            stops.append(signal.SIGTERM)
        return values

    def rank(number: int) -> int:
        size = parallel.processes
        if size > 1:
            dist.init_process_group(
                "gloo", store=store, rank=number, world_size=size, timeout=timedelta(seconds=ENDS_S)
            )
        try:
            return loop.train(run, Mesh(parallel.pipeline, parallel.data, number, expert=parallel.expert))
        finally:
            if size > 1:
                dist.destroy_process_group()

    told = patch.object(loop, "stop_signals", lambda *_: contextlib.nullcontext(stops))
    silent = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with (
        patch.object(Trainer, "step", counted),
        told,
        silent[0],
        silent[1],
        ThreadPoolExecutor(parallel.processes) as pool,
    ):
        codes = set(pool.map(rank, range(parallel.processes)))
    assert codes <= {0, 128 + signal.SIGTERM}, f"ended with {codes}"


def _in_processes(run: RunConfig, words: list[str], stop: int) -> None:
    """Train by the command, told to stop once it has measured a step (0: never)."""
    command = [sys.executable, "-m", "counterflow", "train", "tiny", *words]
    with processes.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + ENDS_S
        while stop and process.poll() is None and len(read(Path(run.keep.folder))) < stop:
            assert time.monotonic() < deadline, f"step {stop} does not come"
            time.sleep(0.002)
        if stop and process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            said = process.communicate(timeout=ENDS_S)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError("the command does not end") from None
    assert process.returncode in (0, 128 + signal.SIGTERM), f"ended with {process.returncode}: {said[-1000:]}"
