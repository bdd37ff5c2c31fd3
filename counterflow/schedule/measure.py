"""What a schedule costs: the bubble from its spans, held activations and parameters from its order alone. [Tab. 2]

Activations are counted in stage-passes: one micro-batch's of one stage. They are held whole from F to I, and what the
weight gradients still need from I to W. Parameters are counted in stages; Table 2 writes 1× for one of PP.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from counterflow.schedule.simulate import Costs, makespan
from counterflow.schedule.weave import weave
from counterflow.schedule.words import Cell, Kind, Plan, Schedule, Span, StageId


class Held(NamedTuple):
    """Peaks of one rank, in stage-passes."""

    activations: int
    """Both kinds together; a pair's forward counts before its backward lets go."""
    whole: int
    """Held from F to I."""
    owed: int
    """Held from I to W for the weight gradients."""
    stages: int
    """Stages whose parameters the rank keeps."""


def idle(spans: Sequence[Span], ranks: int) -> list[float]:
    """Each rank's time without a cell, of the whole makespan: the bubble."""
    whole = makespan(spans)
    busy = [0.0] * ranks
    for span in spans:
        busy[span.rank] += span.end - span.start
    return [whole - time for time in busy]


def held(schedule: Schedule, plans: Mapping[StageId, Plan] | None = None) -> list[Held]:
    """What every rank holds at its peak; with plans, counted in the order in which a pair's ops are woven."""
    return [_held(schedule, rank, plans) for rank in range(schedule.ranks)]


def _held(schedule: Schedule, rank: int, plans: Mapping[StageId, Plan] | None) -> Held:
    whole = owed = 0
    peaks = (0, 0, 0)
    for cell in schedule.rows[rank]:
        for kind, begins in _events(cell, plans):
            whole += begins if kind is Kind.F else -(kind is not Kind.W and not begins)
            owed += (kind is Kind.I and not begins) - (kind is Kind.W and not begins)
            peaks = max(peaks[0], whole + owed), max(peaks[1], whole), max(peaks[2], owed)
    return Held(*peaks, len(schedule.held(rank)))


def _events(cell: Cell, plans: Mapping[StageId, Plan] | None) -> Iterator[tuple[Kind, bool]]:
    """Begin (True) and end of the cell's chunks in order: the forward first, or as its plans weave."""
    chunks = sorted(cell, key=lambda chunk: chunk.kind is not Kind.F)
    ops = [] if plans is None else weave(cell, plans)
    marks: list[tuple[int, int, Kind, bool]] = []
    for place, chunk in enumerate(chunks):
        own = [at for at, op in enumerate(ops) if op.chunk == chunk] or [-1]
        marks += [(own[0], place, chunk.kind, True), (own[-1], place, chunk.kind, False)]
    yield from ((kind, begins) for _, _, kind, begins in sorted(marks, key=lambda mark: (mark[0], mark[1])))


Formula = Callable[[int, Costs], float]


def _pair(costs: Costs) -> float:
    return costs.f + costs.b if costs.pair is None else costs.pair


BUBBLES: Mapping[str, Formula] = {
    "1f1b": lambda stages, c: (stages - 1) * (c.f + c.b),
    "zb1p": lambda stages, c: (stages - 1) * (c.f + c.b - 2 * c.w),
    "dualpipe": lambda stages, c: (stages / 2 - 1) * (_pair(c) + c.b - 3 * c.w),
    "dualpipev": lambda stages, c: (stages / 2 - 1) * (_pair(c) + c.b - 3 * c.w),
}
"""Idle time of a rank by the number of stages PP; B is the whole backward. [Tab. 2]"""
ACTIVATIONS: Mapping[str, Callable[[int], int]] = {
    "1f1b": lambda stages: stages,
    "zb1p": lambda stages: stages,
    "dualpipe": lambda stages: stages + 1,
    "dualpipev": lambda stages: stages + 1,
}
"""Peak stage-passes of the fullest rank by the number of stages PP. [Tab. 2]"""


def how_exact(name: str, costs: Costs) -> str:
    """What is known of the bubble's formula at these costs: 'exact', or in which way it is not."""
    inner = costs.b - costs.w
    if name not in BUBBLES:
        return "no formula in Table 2"
    if name == "1f1b":
        return "exact"
    if name == "zb1p":
        return "exact" if costs.w <= costs.f else "too low: exact where W <= F"
    if inner != costs.f or costs.w > costs.f:
        return "approximate: exact where B - W = F and W <= F"
    if _pair(costs) < costs.f + costs.b:
        return "exact on the middle ranks alone, since F&B < F + B"
    return "exact"
