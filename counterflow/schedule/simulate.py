"""When everything would happen, if cells or ops took as long as one says. No bandwidth, no contention: only order.

A rank does its cells one after another and waits for what each needs. At the resolution of ops a rank has two lanes,
each in order, that wait for each other only where an op needs what the other lane makes; so a transfer may run on
into the next cell, as it does on a GPU's streams. A host issues them in order and runs ahead of its device: an op that
keeps the device long gives back the time in which short ones waited for their launches.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from counterflow.errors import ScheduleError
from counterflow.schedule.relation import gives, last_op, needs, op_needs
from counterflow.schedule.weave import weave
from counterflow.schedule.words import (
    Cell,
    Chunk,
    Kind,
    Lane,
    Op,
    Part,
    Plan,
    Product,
    Schedule,
    Span,
    StageId,
)

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Costs:
    """Seconds (or any unit) of the chunks of every stage. `b` is the whole backward, so that I takes b − w."""

    f: float = 1.0
    b: float = 2.0
    w: float = 1.0
    pair: float | None = None
    """A forward and a backward that overlap; None: one after the other, f + b."""

    @property
    def overlapped(self) -> float:
        """Of a forward and a backward that overlap: Table 2's F&B."""
        return self.f + self.b if self.pair is None else self.pair

    def __call__(self, rank: int, cell: Cell) -> float:
        """Seconds of a cell."""
        if len(cell) > 1:
            return self.overlapped
        each = {Kind.F: self.f, Kind.B: self.b, Kind.I: self.b - self.w, Kind.W: self.w}
        return sum(each[chunk.kind] for chunk in cell)


def simulate(
    schedule: Schedule, seconds: Callable[[int, Cell], float] = Costs(), latency: float = 0.0
) -> list[Span]:
    """A span for every cell; `latency` is added wherever a product goes to another rank."""
    ready: dict[Product, float] = {}
    clocks, spans = [0.0] * schedule.ranks, []

    def start(rank: int, cell: Cell) -> float | None:
        """When a cell can start; None while something it needs is not known yet."""
        earliest = clocks[rank]
        for chunk in cell:
            for product in needs(chunk, schedule.stages):
                if product not in ready:
                    return None
                away = schedule.rank_of[product.stage] != rank
                earliest = max(earliest, ready[product] + latency * away)
        return earliest

    for rank, cell in _order(schedule.rows, lambda rank, cell: start(rank, cell) is not None):
        begin = start(rank, cell)
        assert begin is not None, "the order gives cells that can start"
        clocks[rank] = begin + seconds(rank, cell)
        spans.append(Span(rank, cell, begin, clocks[rank]))
        ready.update((product, clocks[rank]) for chunk in cell for product in gives(chunk))
    return spans


def _at_once(op: Op) -> float:
    del op
    return 0.0


def simulate_ops(
    schedule: Schedule,
    plans: Mapping[StageId, Plan],
    seconds: Callable[[int, Op], float],
    latency: float = 0.0,
    issue: Callable[[Op], float] = _at_once,
) -> list[Span]:
    """A span for every op on two lanes a rank; `latency` as in `simulate`. A stage may have nothing to do.

    `issue`: seconds of the host for an op, which begins no earlier than the first and ends no earlier than the last.
    """
    rows = [[op for cell in row for op in weave(cell, plans)] for row in schedule.rows]
    arrivals = _Arrivals(schedule, plans, latency)
    lanes = [dict.fromkeys(Lane, 0.0) for _ in rows]
    hosts, spans = [0.0] * len(rows), []
    for rank, op in _order(rows, lambda rank, op: arrivals.of(rank, op) is not None):
        there = arrivals.of(rank, op)
        assert there is not None, "the order gives ops that can start"
        begin = max(there, lanes[rank][op.lane], hosts[rank])
        hosts[rank] += issue(op)
        lanes[rank][op.lane] = end = max(begin + seconds(rank, op), hosts[rank])
        arrivals.done[(op.kind, op.part, op.layer, op.chunk.stage, op.chunk.mb)] = end
        spans.append(Span(rank, op, begin, end))
    return spans


class _Arrivals:
    """When what ops need is there, by the ends of the ops that are done; None while that is not known yet."""

    def __init__(self, schedule: Schedule, plans: Mapping[StageId, Plan], latency: float) -> None:
        self.schedule, self.plans, self.latency = schedule, plans, latency
        self.done: dict[tuple[Kind, Part, int, StageId, int], float] = {}

    def of(self, rank: int, op: Op) -> float | None:
        """For an op."""
        before = op_needs(op, self.plans[op.chunk.stage])
        if before is not None:
            kind = Kind.F if op.kind is Kind.F else Kind.I
            return self.done.get((kind, *before, op.chunk.stage, op.chunk.mb))
        return self._needs_of(rank, op.chunk._replace(kind=op.kind))

    def _needs_of(self, rank: int, chunk: Chunk) -> float | None:
        latest: float | None = 0.0
        for product in needs(chunk, self.schedule.stages):
            at = self._made(Chunk(Kind.F if product.what == "x" else Kind.I, product.stage, chunk.mb))
            away = self.schedule.rank_of[product.stage] != rank
            latest = None if at is None or latest is None else max(latest, at + self.latency * away)
        return latest

    def _made(self, maker: Chunk) -> float | None:
        """When a chunk has given what travels; one without ops hands on what it gets."""
        if not self.plans[maker.stage]:
            return self._needs_of(self.schedule.rank_of[maker.stage], maker)
        kind, (part, layer) = last_op(maker, self.plans[maker.stage])
        return self.done.get((kind, part, layer, maker.stage, maker.mb))


def _order(rows: Sequence[Sequence[Entry]], can: Callable[[int, Entry], bool]) -> Iterator[tuple[int, Entry]]:
    """Entries of all rows, each row in order, whenever they can be next."""
    at = [0] * len(rows)
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            while at[rank] < len(row) and can(rank, row[at[rank]]):
                yield rank, row[at[rank]]
                at[rank] += 1
                moved = True
    if any(place < len(row) for place, row in zip(at, rows)):
        raise ScheduleError("the schedule stops half-way; schedule.check says where and why.")


def makespan(spans: Sequence[Span]) -> float:
    """From the first start to the last end."""
    return max(span.end for span in spans) - min(span.start for span in spans)
