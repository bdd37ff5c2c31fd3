"""What a schedule costs: the bubble from its spans, held activations and parameters from its order alone. [Tab. 2]

Activations are counted in stage-passes: one micro-batch's of one stage. They are held whole from F to I, and what the
weight gradients still need from I to W. Parameters are counted in stages; Table 2 writes 1× for one of PP.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from counterflow.schedule.simulate import Costs, makespan
from counterflow.schedule.words import Kind, Schedule, Span


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


def held(schedule: Schedule) -> list[Held]:
    """What every rank holds at its peak."""
    return [_held(schedule, rank) for rank in range(schedule.ranks)]


def _held(schedule: Schedule, rank: int) -> Held:
    whole = owed = 0
    peaks = (0, 0, 0)
    for cell in schedule.rows[rank]:
        for chunk in sorted(cell, key=lambda chunk: chunk.kind is not Kind.F):
            whole += (chunk.kind is Kind.F) - (chunk.kind in (Kind.B, Kind.I))
            owed += (chunk.kind is Kind.I) - (chunk.kind is Kind.W)
            peaks = max(peaks[0], whole + owed), max(peaks[1], whole), max(peaks[2], owed)
    return Held(*peaks, len(schedule.held(rank)))


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
