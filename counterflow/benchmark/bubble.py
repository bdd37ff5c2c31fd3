"""A schedule on real processes with real sends and receives, its computation replaced by sleeps of known length.

So eight ranks fit on two cores, and what is measured is the schedule: every rank's idle time beside the simulated one.
"""

import time
from collections.abc import Sequence
from multiprocessing import get_context

import torch
from torch import Tensor

from counterflow.benchmark.processes import on_processes
from counterflow.comm.channels import ProcessChannels
from counterflow.comm.mesh import Mesh
from counterflow.config.run import Parallel
from counterflow.pipeline.execute import Executor
from counterflow.pipeline.record import Recorder
from counterflow.pipeline.stage import Pass, StepSettings, Sums
from counterflow.schedule.simulate import Costs
from counterflow.schedule.transfers import transfers
from counterflow.schedule.words import Kind, Op, Part, Plan, Schedule, Span

SHAPE = torch.Size([64, 64])
PLAN: Plan = ((Part.ATTN, 0),)


class Sleeper:
    """A stage of one part that sleeps instead of computing and hands on tensors of a fixed shape."""

    def __init__(self, costs: Costs) -> None:
        self.plan = PLAN
        self.reads_tokens = False
        self._costs = costs

    def run(self, op: Op, state: Pass, sums: Sums) -> None:
        """Sleep as long as the op takes."""
        end = time.perf_counter() + seconds(self._costs, op)
        if op.kind is Kind.F:
            state.h = torch.zeros(SHAPE)
        elif op.kind is Kind.I:
            state.grads["h"] = torch.zeros(SHAPE)
        while (left := end - time.perf_counter()) > 0:
            time.sleep(left)

    def drain(self) -> None:
        """Nothing was computed."""


def seconds(costs: Costs, op: Op) -> float:
    """Of an op. A whole backward gives its dx at its end, as Table 2 counts it: its I takes all, its W nothing."""
    split = op.chunk.kind is not Kind.B
    return {Kind.F: costs.f, Kind.I: costs.b - costs.w * split, Kind.W: costs.w * split}[op.kind]


def measure(schedule: Schedule, costs: Costs, repeats: int) -> list[list[Span]]:
    """The measured spans of every repeat, all ranks' together, in seconds from each repeat's first start."""
    with get_context("spawn").Manager() as manager:
        found = manager.dict()
        on_processes(_rank, Parallel(pipeline=schedule.ranks), "cpu", schedule, costs, repeats, found)
        return [
            [span for rank in range(schedule.ranks) for span in found[rank, repeat]]
            for repeat in range(repeats)
        ]


def _rank(mesh: Mesh, schedule: Schedule, costs: Costs, repeats: int, found: dict) -> None:
    torch.set_num_threads(1)
    rank, sent = mesh.rank, transfers(schedule)
    channels = ProcessChannels(mesh, sent, torch.float32)
    recorder = Recorder(torch.device("cpu"))
    executor = Executor(schedule, rank, {s: Sleeper(costs) for s in schedule.held(rank)}, channels, recorder)
    for repeat in range(repeats):
        mesh.barrier()
        recorder.clear()
        channels.begin(sent, lambda product: SHAPE)
        executor.run(_no_tokens, StepSettings(1, 1, 1.0))
        channels.end()
        found[rank, repeat] = recorder.spans()


def _no_tokens(pipe: int, mb: int) -> Tensor:
    raise AssertionError("a sleeper reads no tokens")


def idle_of(spans: Sequence[Span], ranks: int) -> tuple[float, list[float]]:
    """The makespan over all ranks and each rank's idle time in it."""
    whole = max(span.end for span in spans) - min(span.start for span in spans)
    busy = [sum(span.end - span.start for span in spans if span.rank == rank) for rank in range(ranks)]
    return whole, [whole - time for time in busy]
