"""What `counterflow plan` says of a run before it is made, and what the run then says of itself: both compared.

A prediction stands on the rates that were measured at the start and on nothing that the run itself showed. Beside it
stands the simulation fed with the run's own op times, which knows no transfer: where it idles, the schedule does; what
a rank waited for beyond that are the pipeline's transfers. With the overlap off both lay their ops end to end, cell by
cell, since a transfer that is waited for at once runs beside nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from counterflow.benchmark.several_steps import Way
from counterflow.config.backends import BACKENDS, LOCAL
from counterflow.config.load import load_run
from counterflow.config.run import RunConfig
from counterflow.errors import ConfigError
from counterflow.plan.cost import Costs, predict, update, without_transfers
from counterflow.plan.hardware import Hardware, hardware
from counterflow.plan.job import Layout, job_of
from counterflow.plan.layout import schedule_of
from counterflow.plan.memory import memory
from counterflow.plan.routing import UNIFORM, Routing
from counterflow.plan.stages import stage_plans
from counterflow.schedule.measure import idle
from counterflow.schedule.simulate import makespan, simulate
from counterflow.schedule.weave import weave
from counterflow.schedule.words import Cell, Op, Plan, Schedule, Span, StageId
from counterflow.train import timeline

ROOM = 0.8
"""Of a card's memory that a plan may fill: its peaks were up to 7 % too low, and allocators leave gaps."""
MOST = 256
"""Experts of the report's layers."""
FORCED = Routing(limited=False)
"""The planner's nearest to experts forced even: uniform over all of them, without the limit of groups."""


@dataclass(frozen=True)
class Prediction:
    """Of one way of a run."""

    step_s: float
    pipeline_s: float
    """Of it, all micro-batches."""
    idle_s: float
    """A rank's mean time without an op."""
    all_to_all_s: float
    """What dispatch and combine add to the pipeline."""
    memory_bytes: tuple[float, ...]
    """By pipeline rank, as it is measured: tensors on a GPU, the process on a CPU."""
    spans: tuple[Span, ...]


def scheduled(run: RunConfig) -> tuple[Schedule, tuple[Plan, ...]]:
    """A run's schedule and the plans of its stages."""
    microbatches = run.train.batch_size // run.train.micro_batch_size // run.parallel.data
    schedule = schedule_of(run.parallel, microbatches)
    return schedule, stage_plans(run.model, schedule.stages, run.parallel.placement)


def costs_of(run: RunConfig, machine: Hardware, routing: Routing = UNIFORM) -> Costs:
    """The planner's costs of a run."""
    parallel, train = run.parallel, run.train
    if parallel.multiprocessors:
        machine = replace(machine, communication_multiprocessors=parallel.multiprocessors)
    layout = Layout(
        parallel.pipeline,
        parallel.data,
        parallel.expert,
        train.micro_batch_size,
        parallel.schedule,
        recompute=train.recompute,
    )
    return Costs(job_of(run), layout, machine, routing)


def prediction(run: RunConfig, way: Way, machine: Hardware) -> Prediction:
    """The planner's."""
    costs = costs_of(run, machine, FORCED if way.forced else UNIFORM)
    schedule, plans = scheduled(run)
    spans = _spans(costs, way, schedule, plans)
    bare = _spans(without_transfers(costs), way, schedule, plans)
    whole = makespan(spans)
    on_gpu = machine.card.multiprocessors > 0
    peaks = memory(costs, schedule, plans, run.parallel.dispatch if run.parallel.expert > 1 else "")
    return Prediction(
        whole + update(costs, schedule, plans).seconds,
        whole,
        sum(idle(spans, schedule.ranks)) / schedule.ranks,
        whole - makespan(bare),
        tuple(peak.total - (peak.reserved if on_gpu else 0.0) for peak in peaks),
        tuple(spans),
    )


def _spans(costs: Costs, way: Way, schedule: Schedule, plans: tuple[Plan, ...]) -> list[Span]:
    if way.overlapped:
        return predict(costs, schedule=schedule).spans
    device = in_a_row(schedule, plans, lambda rank, op: costs.seconds(op.kind, op.part, op.layer, False))
    host = in_a_row(schedule, plans, lambda rank, op: costs.issue_s(op.kind, op.part, op.layer))
    return simulate(schedule, lambda rank, cell: max(device(rank, cell), host(rank, cell)), costs.send_s)


def in_a_row(
    schedule: Schedule, plans: tuple[Plan, ...], seconds: Callable[[int, Op], float]
) -> Callable[[int, Cell], float]:
    """Of a cell whose ops follow each other, transfers and all."""
    by_stage: Mapping[StageId, Plan] = {stage: plans[stage.index] for stage in schedule.rank_of}
    return lambda rank, cell: sum(seconds(rank, op) for op in weave(cell, by_stage))


def held_against(run: RunConfig, way: Way, row: Mapping[str, Any], spans: Sequence[Span]) -> dict[str, Any]:
    """What a measured row means: tokens a second, the recorded step's bubble beside the simulated one, exposed waits.

    `spans` are the recorded step's. Exposed transfers of the pipeline are what ranks waited for products beyond the
    time that the simulation, fed with the step's own op times, leaves them idle.
    """
    schedule, _ = scheduled(run)
    ranks, step = schedule.ranks, median(row["steps_s"])
    simulated = simulated_from(run, way, spans)
    stood = [waits[1] for waits in row["recorded_waits_s"]]
    at_rest = idle(simulated, ranks)
    return {
        "step_s": step,
        "tokens_per_s": run.train.batch_size * run.data.sequence_length / step,
        "measured": {"pipeline_s": makespan(spans), "idle_s": idle(spans, ranks), "waited_s": stood},
        "simulated": {"pipeline_s": makespan(simulated), "idle_s": at_rest},
        "exposed_all_to_all_s": max(row["all_to_all_wait_s"]),
        "exposed_pipeline_s": max(0.0, (sum(stood) - sum(at_rest)) / ranks),
    }


def simulated_from(run: RunConfig, way: Way, spans: Sequence[Span]) -> list[Span]:
    """The schedule with the mean times of a recorded step's own ops, on two lanes or in a row as the way has them."""
    schedule, plans = scheduled(run)
    if way.overlapped:
        return timeline.predict(schedule, {stage: plans[stage.index] for stage in schedule.rank_of}, spans)
    return simulate(schedule, in_a_row(schedule, plans, timeline.mean_seconds(spans)))


def errors(predicted: Prediction, row: Mapping[str, Any]) -> dict[str, float]:
    """Predicted over measured, less one: of the step, of its pipeline, of the fullest rank's memory."""
    return {
        "step": predicted.step_s / row["step_s"] - 1,
        "pipeline": predicted.pipeline_s / row["measured"]["pipeline_s"] - 1,
        "memory": max(predicted.memory_bytes) / max(row["memory_bytes"]) - 1,
    }


def report_words(
    pipeline: int,
    expert: int,
    bytes_: float,
    microbatches: int,
    schedules: Sequence[str],
    more: Sequence[str] = (),
) -> list[str]:
    """What makes of `v3-671b`, with `more` said of it, a model whose layers are the report's and that fits so many GPUs
    of `bytes_` each under every one of the schedules: two layers for each pipeline rank and as many experts as fit,
    then more layers.

    Fails: ConfigError where not even the fewest experts fit.
    """

    def fits(words: Sequence[str]) -> bool:
        size = load_run("v3-671b", more).train.micro_batch_size
        for schedule in schedules:
            layout = laid_out(pipeline, expert, microbatches, size, schedule)
            if not _fits(load_run("v3-671b", [*words, *layout, *more]), bytes_):
                return False
        return True

    best: list[str] = []
    for layers in range(2 * pipeline, 8 * pipeline + 1, 2 * pipeline):
        sizes = (experts for experts in range(MOST, 15, -16) if experts % expert == 0)
        found = next((experts for experts in sizes if fits(_cut(layers, experts))), 0)
        best = _cut(layers, found) if found == MOST or (found and not best) else best
        if found < MOST:
            break
    if not best:
        raise ConfigError(
            f"no layers of the report's sizes fit {pipeline} × {expert} GPUs of {bytes_ / 1e9:.0f} GB; take more GPUs "
            "or --models small."
        )
    return best


def _cut(layers: int, experts: int) -> list[str]:
    return [
        f"model.num_layers={layers}",
        f"model.num_routed_experts={experts}",
        "model.num_dense_layers=0",
        "model.num_mtp_modules=0",
        "model.vocab_size=8192",
    ]


def laid_out(pipeline: int, expert: int, microbatches: int, size: int, schedule: str) -> list[str]:
    """The words of a layout: so many micro-batches of a data rank, `size` sequences each."""
    return [
        f"parallel.pipeline={pipeline}",
        f"parallel.data={expert}",
        f"parallel.expert={expert}",
        f"parallel.schedule={schedule}",
        f"train.micro_batch_size={size}",
        f"train.batch_size={microbatches * expert * size}",
        "train.batch_start=0",
        "train.ema_decay=0",
    ]


def _fits(run: RunConfig, bytes_: float) -> bool:
    schedule, plans = scheduled(run)
    largest = max(BACKENDS, key=lambda name: (BACKENDS[name].worst_case, BACKENDS[name].regions))
    backend = largest if run.parallel.expert > 1 else LOCAL
    return (
        max(peak.total for peak in memory(costs_of(run, hardware("h200")), schedule, plans, backend))
        < ROOM * bytes_
    )
