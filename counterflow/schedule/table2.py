"""Table 2 for any number of stages and any costs: formula, simulation and, where a run was recorded, measurement.

A trace does not say which schedule it is of; its chunks do. A run is simulated with what each of its own cells took,
so that what is left between its simulation and its measurement is transfers and waiting, not unequal stages; the other
schedules are simulated with the run's mean costs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from counterflow.errors import ScheduleError
from counterflow.schedule import SCHEDULES
from counterflow.schedule.measure import cell_seconds, held, idle, mean_costs
from counterflow.schedule.method import Method
from counterflow.schedule.simulate import Costs, simulate
from counterflow.schedule.words import Chunk, Kind, Op, Schedule, Span


class Row(NamedTuple):
    """A schedule's row; idle times are of every rank."""

    name: str
    devices: int
    formula: float
    simulated: Sequence[float]
    """Empty where the schedule refuses the number of micro-batches."""
    measured: Sequence[float]
    activations_formula: int
    activations: int | None
    parameters: int
    refused: str
    """Why nothing is simulated."""


@dataclass(frozen=True)
class RunTable:
    """The table of a recorded run, with what it was made of."""

    rows: list[Row]
    schedule: Schedule
    """The run's."""
    microbatches: int
    costs: Costs
    predicted: list[Span]
    measured: list[Span]


def table() -> Mapping[str, Method]:
    """The rows of SCHEDULES whose bubble and activations both have a published formula."""
    return {name: row for name, row in SCHEDULES.items() if row.bubble and row.activations}


def rows(stages: int, microbatches: int, costs: Costs, latency: float = 0.0) -> list[Row]:
    """Every schedule of the table at an equal, even number of stages."""
    return [_row(name, row, stages, microbatches, costs, latency) for name, row in table().items()]


def _row(name: str, row: Method, stages: int, microbatches: int, costs: Costs, latency: float) -> Row:
    assert row.bubble and row.activations, "the table's rows have formulas"
    devices, refused, waits, kept = stages // row.stages_per_rank, "", [], []
    try:
        schedule = row(devices, microbatches)
        waits, kept = idle(simulate(schedule, costs, latency), devices), held(schedule)
    except ScheduleError as error:
        refused = f"not simulated: {error}"
    activations = max((some.activations for some in kept), default=None)
    formula = row.bubble(devices, stages, costs)
    return Row(
        name, devices, formula, waits, (), row.activations(stages), activations, row.parameters, refused
    )


def rows_of_run(spans: Sequence[Span], latency: float = 0.0) -> RunTable:
    """The table for the last step of a recorded run, in seconds.   Fails: ScheduleError if it is of no row."""
    measured = last_step(spans)
    schedule = schedule_of(measured)
    costs, count = mean_costs(schedule, measured), sum(schedule.microbatches)
    predicted = simulate(schedule, cell_seconds(measured), latency)
    simulated, waits = idle(predicted, schedule.ranks), idle(measured, schedule.ranks)
    found = [
        row._replace(simulated=simulated, measured=waits) if row.name == schedule.name else row
        for row in rows(schedule.stages, count, costs, latency)
    ]
    return RunTable(found, schedule, count, costs, predicted, measured)


def last_step(spans: Sequence[Span]) -> list[Span]:
    """Each cell or op where it came last, with the first start at 0."""
    last = {(span.rank, span.what): span for span in sorted(spans, key=lambda span: span.start)}
    zero = min((span.start for span in last.values()), default=0.0)
    return [replace(span, start=span.start - zero, end=span.end - zero) for span in last.values()]


def schedule_of(spans: Sequence[Span]) -> Schedule:
    """The schedule of Table 2 whose chunks these are.   Fails: ScheduleError."""
    done = {(span.rank, chunk) for span in spans for chunk in _chunks(span) if chunk.kind is not Kind.W}
    ranks = 1 + max((rank for rank, _ in done), default=-1)
    counts: dict[int, int] = {}
    for _, chunk in done:
        counts[chunk.stage.pipe] = max(counts.get(chunk.stage.pipe, 0), chunk.mb + 1)
    for row in table().values():
        try:
            schedule = row(ranks, sum(counts.values()))
        except ScheduleError:
            continue
        if {(rank, chunk) for rank, _, chunk in schedule.chunks() if chunk.kind is not Kind.W} == done:
            return schedule
    raise ScheduleError(
        f"the trace of {ranks} ranks and {sum(counts.values())} micro-batches is of no schedule of Table 2; record "
        f"a whole step of {', '.join(table())}."
    )


def _chunks(span: Span) -> tuple[Chunk, ...]:
    return (span.what.chunk,) if isinstance(span.what, Op) else span.what
