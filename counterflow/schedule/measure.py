"""What a schedule costs: the bubble from its spans, held activations and parameters from its order alone. [Tab. 2]

Activations are counted in stage-passes: one micro-batch's of one stage. They are held whole from F to I, and what the
weight gradients still need from I to W. Parameters are counted in stages; Table 2 writes 1× for one of PP.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from counterflow.schedule.simulate import Costs, makespan
from counterflow.schedule.weave import weave
from counterflow.schedule.words import Cell, Chunk, Kind, Op, Plan, Schedule, Span, StageId


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
    """Each rank's time without a cell, or without an op on either lane, of the whole makespan: the bubble."""
    whole = makespan(spans)
    of_rank: list[list[Span]] = [[] for _ in range(ranks)]
    for span in spans:
        of_rank[span.rank].append(span)
    return [whole - busy(some) for some in of_rank]


def busy(spans: Iterable[Span]) -> float:
    """The time that any of the spans covers; what runs beside another span counts once."""
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total


def cell_seconds(measured: Sequence[Span]) -> Callable[[int, Cell], float]:
    """What each cell of a measured run took, without the waiting inside it: for `simulate`."""
    of_chunk: dict[tuple[int, Chunk], list[Span]] = defaultdict(list)
    for span in measured:
        for chunk in (span.what.chunk,) if isinstance(span.what, Op) else span.what:
            of_chunk[span.rank, chunk].append(span)
    return lambda rank, cell: busy(span for chunk in cell for span in of_chunk[rank, chunk])


def mean_costs(schedule: Schedule, measured: Sequence[Span]) -> Costs:
    """A measured run's means over all ranks and cells; W is the W ops' where they are not cells, else half of B."""
    seconds, times = cell_seconds(measured), defaultdict[str, list[float]](list)
    for rank, row in enumerate(schedule.rows):
        for cell in row:
            times["&".join(sorted(chunk.kind for chunk in cell))].append(seconds(rank, cell))
    owed = defaultdict[tuple[int, Chunk], float](float)
    for span in measured:
        if isinstance(span.what, Op) and span.what.kind is Kind.W and span.what.chunk.kind is Kind.B:
            owed[span.rank, span.what.chunk] += span.end - span.start
    mean = {
        kind: sum(some) / len(some) for kind, some in (times | {"owed": list(owed.values())}).items() if some
    }
    backward = mean.get("B", mean.get("I", 0.0) + mean.get("W", 0.0))
    weights = min(backward, mean.get("W", mean.get("owed", backward / 2)))
    return Costs(mean.get("F", 0.0), backward, weights, mean.get("B&F"))


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
