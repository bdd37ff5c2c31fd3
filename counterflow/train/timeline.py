"""One step of a pipeline as it was, over what the simulator makes of the same ops: the run's timeline.

The prediction is given the run's own mean time of every op and nothing else: where the two pictures differ, the time
went into transfers, waiting, and ops that took longer than usual. A step of many ops is drawn cell by cell, and one
turn of its middle op by op: thousands of ops side by side are a stripe.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from counterflow.schedule import picture, trace
from counterflow.schedule.measure import idle
from counterflow.schedule.picture import Picture, Window
from counterflow.schedule.simulate import makespan, simulate_ops
from counterflow.schedule.words import Cell, Chunk, Lane, Op, Plan, Schedule, Span, StageId

TRACE, TIMELINE = "trace.json", "timeline.svg"
FEW = 30
"""Ops of a rank that have room for their names side by side."""
SHOWN = 20
"""Computing ops of the part that is drawn op by op."""


def write_timeline(
    folder: Path, schedule: Schedule, plans: Mapping[StageId, Plan], spans: Sequence[Span], step: int
) -> None:
    """Write the measured trace, and the picture of predicted over measured."""
    measured = from_zero(spans)
    predicted = predict(schedule, plans, measured)
    (folder / TRACE).write_text(trace.write(measured), encoding="utf-8")
    both = {
        caption("predicted from its ops' mean times", predicted, schedule.ranks): predicted,
        caption(f"step {step}, measured", measured, schedule.ranks): measured,
    }
    (folder / TIMELINE).write_text(drawn(schedule, both), encoding="utf-8")


def drawn(schedule: Schedule, named: Mapping[str, Sequence[Span]]) -> str:
    """Ops of one schedule by what they show, as SVG: all of them, or its cells and some ops of its middle."""
    if all(len(spans) <= FEW * schedule.ranks for spans in named.values()):
        return picture.compare(named, schedule.ranks)
    rank, cells = middle(schedule)
    chunks = {chunk for cell in cells for chunk in cell}
    names = ", ".join("&".join(map(str, cell)) for cell in cells)
    ops: set[Any] = set()
    whole, part = [], []
    for title, spans in named.items():
        if not all(isinstance(span.what, Op) for span in spans):  # a plan's are cells already
            whole.append(Picture(title, spans, schedule.ranks))
            continue
        ops = ops or set(_middle_ops([span for span in spans if span.rank == rank], chunks))
        mine = [span for span in spans if span.rank == rank and span.what in ops]
        frame: Window = min(span.start for span in mine), max(span.end for span in mine)
        whole.append(Picture(title, cell_spans(schedule, spans), schedule.ranks, frame=frame))
        title = f"{title.split(':')[0]}: the framed part op by op, {names} of rank {rank}"
        part.append(Picture(title, spans, schedule.ranks, window=frame))
    return picture.draw([whole, part])


def middle(schedule: Schedule) -> tuple[int, tuple[Cell, ...]]:
    """A rank, and of its middle an overlapped cell, or where there is none two cells, a forward and what follows."""
    rank = (schedule.ranks - 1) // 2
    row = schedule.rows[rank]
    pairs = [at for at, cell in enumerate(row) if len(cell) > 1]
    if pairs:
        return rank, (row[pairs[len(pairs) // 2]],)
    at = max(0, min(len(row) // 2, len(row) - 2))
    return rank, row[at : at + 2]


def _middle_ops(spans: Sequence[Span], chunks: Set[Chunk]) -> list[Op]:
    """Computing ops of chunks in the order of time, of many the middle ones."""
    ordered = sorted(spans, key=lambda span: span.start)
    ops = [span.what for span in ordered if isinstance(span.what, Op) and span.what.chunk in chunks]
    computing = [op for op in ops if op.lane is Lane.COMPUTE] or ops
    first = max(0, (len(computing) - SHOWN) // 2)
    return computing[first : first + SHOWN]


def cell_spans(schedule: Schedule, spans: Sequence[Span]) -> list[Span]:
    """A span for each cell, from its first op to its last; what goes out before the cell before has ended is cut."""
    times: dict[tuple[int, Chunk], Window] = {}
    for span in spans:
        assert isinstance(span.what, Op), "a recorded step has ops"
        start, end = times.get((span.rank, span.what.chunk), (span.start, span.end))
        times[span.rank, span.what.chunk] = min(start, span.start), max(end, span.end)
    cells: list[Span] = []
    for rank, row in enumerate(schedule.rows):
        last = float("-inf")
        for cell in row:
            found = [times[rank, chunk] for chunk in cell if (rank, chunk) in times]
            if not found:  # a stage may have nothing to do
                continue
            start = max(last, min(start for start, _ in found))
            last = max(start, *(end for _, end in found))
            cells.append(Span(rank, cell, start, last))
    return cells


def from_zero(spans: Sequence[Span]) -> list[Span]:
    """The spans with their first start at 0."""
    zero = min(span.start for span in spans)
    return [replace(span, start=span.start - zero, end=span.end - zero) for span in spans]


def predict(schedule: Schedule, plans: Mapping[StageId, Plan], measured: Sequence[Span]) -> list[Span]:
    """The schedule simulated with the mean time that each op took, micro-batches averaged."""
    return simulate_ops(schedule, plans, mean_seconds(measured))


def mean_seconds(measured: Sequence[Span]) -> Callable[[int, Op], float]:
    """Seconds of an op by its rank, kind, part and layer."""
    times: dict[tuple, list[float]] = defaultdict(list)
    for span in measured:
        op = span.what
        assert isinstance(op, Op), "a recorded step has ops"
        times[(span.rank, op.kind, op.part, op.layer)].append(span.end - span.start)
    means = {key: sum(some) / len(some) for key, some in times.items()}
    return lambda rank, op: means[(rank, op.kind, op.part, op.layer)]


def caption(what: str, spans: Sequence[Span], ranks: int) -> str:
    """What is shown, its length and its bubble."""
    whole = makespan(spans)
    share = sum(idle(spans, ranks)) / ranks / whole
    return f"{what}: {whole * 1e3:.0f} ms, ranks idle {share:.1%} of it"
