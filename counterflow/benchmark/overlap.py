"""What of a transfer's time remains when a forward and a backward chunk hide each other's transfers, on a CPU.

The executor, the segments and the model are the real ones. Two things are paced, so that the answer does not hang on
what else a small machine does: the wire, one lane on which each transfer takes a given time after the one before it,
and computation, whose ops are drawn out to given lengths. DualPipeV with one rank puts both ends of the model on it,
and every micro-batch beyond the first few adds two pairs: the difference of two runs is the time of a pair.
"""

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from counterflow.benchmark.carried import Carried
from counterflow.benchmark.equality import Layout, samples_of, settings_of, small_model, with_accumulators
from counterflow.comm.channels import Links, LocalChannels
from counterflow.comm.dispatch import Pending
from counterflow.model.transformer import Transformer
from counterflow.pipeline.execute import Executor
from counterflow.pipeline.stage import Pass, Stage, Sums
from counterflow.plan.stages import stage_plans
from counterflow.schedule.dual import dualpipev
from counterflow.schedule.simulate import makespan, simulate_ops
from counterflow.schedule.transfers import transfers
from counterflow.schedule.weave import lanes
from counterflow.schedule.words import TRANSFERS, Lane, Op, Plan


class SlowWire:
    """Time on a wire that takes `seconds` for each transfer, one after another, beside whatever is computed."""

    def __init__(self, seconds: float, in_turn: bool = False) -> None:
        self._seconds, self._in_turn = seconds, in_turn
        self._free = 0.0
        self.waited = 0.0
        """Seconds that computation has waited for the wire."""

    def carry(self, name: str, act: Callable[..., Pending[Any]], arguments: tuple[Any, ...]) -> Pending[Any]:
        """A dispatcher's call, whose result comes after its time."""
        value = act(*arguments).wait()
        self._free = deadline = max(time.perf_counter(), self._free) + self._seconds

        def finish() -> Any:
            self._wait_until(deadline)
            return value

        pending = Pending(finish)
        if self._in_turn:
            pending.wait()
        return pending

    def _wait_until(self, deadline: float) -> None:
        start = time.perf_counter()
        _sleep_until(deadline)
        self.waited += time.perf_counter() - start


class PacedStage(Stage):
    """A stage whose computations last `seconds` each, without the time that they wait for the wire."""

    def __init__(self, model: Transformer, plan: Plan, wire: SlowWire, seconds: float) -> None:
        super().__init__(model, plan)
        self._wire, self._seconds = wire, seconds

    def run(self, op: Op, state: Pass, sums: Sums) -> None:
        """The op, drawn out."""
        before, end = self._wire.waited, time.perf_counter() + self._seconds
        super().run(op, state, sums)
        if op.part not in TRANSFERS:
            _sleep_until(end + self._wire.waited - before)


def _sleep_until(deadline: float) -> None:
    while (left := deadline - time.perf_counter()) > 0:
        time.sleep(left)


def pair_seconds(unit: float, wire: float, in_turn: bool = False, layers: int = 4) -> float:
    """Seconds of a pair of chunks of `layers` / 2 MoE layers: computations of `unit` each, transfers of `wire`."""
    few, many = (_step_seconds(unit, wire, in_turn, layers, count) for count in (3, 7))
    return (many - few) / 8


def pair_lanes(unit: float, wire: float, layers: int = 4) -> tuple[float, float]:
    """Seconds of a pair's computation and of its transfers, each alone: the mean of all pairs of the schedule."""
    schedule, plans = dualpipev(1, 7), _plans(layers)
    held = {stage: plans[stage.index] for stage in schedule.held(0)}
    pairs = [lanes(cell, held) for cell in schedule.rows[0] if len(cell) > 1]
    computed = sum(len(pair[Lane.COMPUTE]) for pair in pairs) / len(pairs)
    moved = sum(len(pair[Lane.ALL_TO_ALL]) for pair in pairs) / len(pairs)
    return unit * computed, wire * moved


def pair_of(unit: float, wire: float, layers: int = 4) -> float:
    """What the simulator says a pair takes, from the same difference of two runs."""
    plans, spans = _plans(layers), []
    for microbatches in (5, 9):
        schedule = dualpipev(1, microbatches)
        held = {stage: plans[stage.index] for stage in schedule.held(0)}
        spans.append(simulate_ops(schedule, held, lambda _, op: unit if op.lane is Lane.COMPUTE else wire))
    return (makespan(spans[1]) - makespan(spans[0])) / 8


def _plans(layers: int) -> tuple[Plan, ...]:
    return stage_plans(_model(layers).config, 2, f"embed {layers // 2} | {layers - layers // 2} head")


def _model(layers: int) -> Transformer:
    return small_model(layers + 2, 0, num_dense_layers=0)


def _step_seconds(unit: float, wire: float, in_turn: bool, layers: int, microbatches: int) -> float:
    model = with_accumulators(_model(layers))
    slow = SlowWire(wire, in_turn)
    model.dispatcher = Carried(model.dispatcher, slow.carry)
    schedule = dualpipev(1, microbatches)
    plans = _plans(layers)
    stages = {stage: PacedStage(model, plans[stage.index], slow, unit) for stage in schedule.held(0)}
    layout = Layout(schedule.name, 1, microbatches)
    samples = samples_of(layout, model.config, 0)[0]
    executor = Executor(schedule, 0, stages, LocalChannels(Links(schedule, transfers(schedule))))

    def feed(pipe: int, mb: int) -> Tensor:
        return samples[mb]

    start = time.perf_counter()
    executor.run(feed, settings_of(layout))
    return time.perf_counter() - start
