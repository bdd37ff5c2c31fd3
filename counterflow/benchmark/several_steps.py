"""Whole training steps on several ranks, timed in every way that transfers and routing can go: what each rank saw.

The pipeline, the optimizer and the dispatcher are those of training; only weights are drawn where they stay and tokens
are random. A way is with transfers overlapped or each waited for at once, and with the router's own choices or with
experts forced even. Ways share one model, since what takes longest is to start. Here is only what a rank can see: its
seconds, waits and memory, and the ops of one more step; what they mean is said by who holds them against a prediction.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from counterflow.benchmark.carried import balanced, in_turn
from counterflow.benchmark.pair import draw_on
from counterflow.benchmark.rates import resident_bytes
from counterflow.benchmark.saved import note
from counterflow.benchmark.steps import RandomTokens
from counterflow.comm.dispatch import Dispatcher, Route
from counterflow.comm.local import Local
from counterflow.comm.mesh import Mesh
from counterflow.comm.partition import carve
from counterflow.config.run import Parallel, RunConfig
from counterflow.errors import CounterflowError
from counterflow.model.transformer import expert_shards
from counterflow.pipeline.record import Recorder
from counterflow.schedule import trace
from counterflow.schedule.words import Span
from counterflow.train.optim import Optimizer
from counterflow.train.pipelined import Pipelined
from counterflow.train.spread import dispatcher_of
from counterflow.train.timeline import from_zero

FEW = 16
"""Tokens of a dispatcher's first call."""


@dataclass(frozen=True)
class Way:
    """How a step's transfers go, and its tokens."""

    overlapped: bool
    """Else each transfer between experts is waited for as soon as it is issued; a pipeline's are not, since a schedule
    whose sends block stands still."""
    forced: bool
    """Experts forced even; else the router's own choices."""

    def __str__(self) -> str:
        routing = "forced balanced" if self.forced else "real routing"
        return f"overlap {'on' if self.overlapped else 'off'}, {routing}"


def opened(run: RunConfig, mesh: Mesh) -> tuple[Dispatcher, str]:
    """The run's dispatcher, once it has carried a few tokens there and back; else why it cannot, on all ranks alike."""
    found, wrong = Local(), ""
    try:
        found = dispatcher_of(run, mesh)
        model = run.model
        x = torch.ones(FEW, model.hidden_size, device=mesh.device, dtype=dtype_of(run))
        ids = torch.arange(model.num_experts_per_token, device=mesh.device).repeat(FEW, 1)
        arrived = found.dispatch(x, Route(ids, ids.float())).wait()
        found.combine(arrived.rows, arrived, x).wait()
        found.traffic()  # raises where a kernel waited in vain
    except (CounterflowError, RuntimeError, ImportError) as error:
        wrong = str(error).splitlines()[0]
    failed = [reason for reason in mesh.everyone(wrong) if reason]
    return found, failed[0] if failed else ""


def dtype_of(run: RunConfig) -> torch.dtype:
    """What it multiplies in."""
    return torch.bfloat16 if run.train.precision == "bf16" else torch.float32


class Steps:
    """A rank's share of a run, from random weights. A collective."""

    def __init__(self, run: RunConfig, mesh: Mesh) -> None:
        self.run, self.mesh = run, mesh
        carve(run.parallel.multiprocessors, mesh.device)
        self.carrier, self.why_not = opened(run, mesh)
        if self.why_not:
            instead = replace(run, parallel=replace(run.parallel, dispatch=Parallel.dispatch))
            self.carrier = dispatcher_of(instead, mesh)
        self.pipelined = Pipelined(run, mesh)
        model = self.pipelined.model
        draw_on(model, mesh.device, dtype_of(run))
        model.recompute = run.train.recompute
        shards, groups = expert_shards(model), self.pipelined.groups()
        self.optimizer = Optimizer(
            list(model.named_parameters()), run.train, mesh.device, mesh, groups, shards
        )
        self.samples = RandomTokens(run)
        if mesh.device.type == "cuda":
            torch.cuda.empty_cache()

    def go(self, way: Way) -> None:
        """Let transfers go so from here on."""
        found: Any = self.carrier
        if way.forced:
            found = balanced(found, self.run.model.num_routed_experts)
        self.pipelined.model.dispatcher = found if way.overlapped else in_turn(found)

    def step(self, record: Recorder | None = None) -> None:
        """Forward, backward, sums over holders, clipping, update."""
        train, weight = self.run.train, self.run.train.mtp_weight * bool(self.run.model.num_mtp_modules)
        self.pipelined.step(self.samples, 0, train.batch_size, weight, record)
        self.optimizer.reduce()
        norm = self.optimizer.norm()
        self.optimizer.clip(norm)
        self.optimizer.step(train.lr.peak)
        if not torch.isfinite(norm):  # the same on all ranks
            raise RuntimeError(
                "the gradient's norm is not finite: these steps are none that training would make"
            )

    def timed(self) -> tuple[float, float, float]:
        """Seconds of a step here, and how long computation stood still for tokens and for the pipeline's products."""
        self.mesh.barrier()
        self._wait()
        start = time.perf_counter()
        self.step()
        self._wait()
        seconds = time.perf_counter() - start
        return seconds, *self.waited()

    def waited(self) -> tuple[float, float]:
        """Of the last step: seconds of computation's waits for tokens, and for the pipeline's products."""
        return sum(hop.waited() for hop in self.carrier.traffic()), self.pipelined.waited()

    def recorded(self) -> tuple[list[Span], list[tuple[float, float]]]:
        """One more step's ops on the first data rank's pipeline, from its first on, and what these ranks waited."""
        recorder = Recorder(self.mesh.device)
        self.mesh.barrier()
        self.step(recorder)
        first = self.mesh.data_rank == 0
        every = self.mesh.everyone((recorder.spans(), self.waited()) if first else None)
        kept = [one for one in every if one is not None]
        return from_zero([span for spans, _ in kept for span in spans]), [waits for _, waits in kept]

    def forget_peak(self) -> None:
        """Begin to look for the most memory anew; a CPU's process cannot."""
        if self.mesh.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.mesh.device)

    def peak(self) -> int:
        """The most bytes so far: of tensors on a GPU, of the process on a CPU."""
        if self.mesh.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.mesh.device)
        return resident_bytes("VmHWM")

    def _wait(self) -> None:
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)


def step_speed(
    mesh: Mesh, run: RunConfig, name: str, ways: Sequence[Way], warmups: int, count: int, rows: Path
) -> None:
    """A row for every way, noted by the first rank as `NAME, WAY`, its trace beside the rows; after the first way one
    step is warm-up enough. A collective."""
    steps = Steps(run, mesh)
    for number, way in enumerate(ways):
        steps.go(way)
        steps.forget_peak()
        unheeded = 1 if number else warmups
        found = [mesh.everyone(steps.timed()) for _ in range(unheeded + count)][unheeded:]
        spans, waits = steps.recorded()
        peaks = mesh.everyone(steps.peak())
        if not mesh.first:
            continue
        file = rows.with_name(f"{rows.stem}-{number}.trace.json")
        file.write_text(trace.write(spans), encoding="utf-8")
        row = {
            "name": f"{name}, {way}",
            "steps_s": [max(seconds for seconds, *_ in every) for every in found],
            "all_to_all_wait_s": _by_rank(found, 1),
            "pipeline_wait_s": _by_rank(found, 2),
            "recorded_waits_s": waits,
            "memory_bytes": peaks,
            "trace": str(file),
        }
        note(rows, row | ({"by_collective": steps.why_not} if steps.why_not else {}))


def _by_rank(found: Sequence[Sequence[tuple[float, float, float]]], place: int) -> list[float]:
    """Medians over the steps."""
    return [median(one[place] for one in of_rank) for of_rank in zip(*found)]
