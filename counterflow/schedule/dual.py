"""DualPipe and DualPipeV: one rule of eight steps, two placements.

Micro-batches enter from both ends, so that every rank soon has a forward chunk of one direction to run with a
backward chunk of the other, and the communication of each hides behind the computation of the other. DualPipe keeps
each stage twice, on ranks r and PP − 1 − r; DualPipeV folds one pipe of 2 P stages over P ranks into a V, whose two
arms are the two directions, and keeps it once.
"""

from math import isclose

from counterflow.errors import ScheduleError
from counterflow.schedule.method import at_most
from counterflow.schedule.simulate import Costs
from counterflow.schedule.words import Cell, Chunk, Kind, Schedule, StageId

Ends = tuple[StageId, StageId]
"""A rank's stages: of direction 0, which its first forward chunks are of, and of direction 1."""


def dualpipe(ranks: int, microbatches: int, stages_per_rank: int | None = None) -> Schedule:
    """Both ends of `ranks` stages fed with half of the micro-batches each.   Fails: ScheduleError. [Fig. 5]"""
    if stages_per_rank not in (None, 2):
        raise ScheduleError(
            f"{stages_per_rank} stages per rank; DualPipe has two on each, one of either pipe."
        )
    if ranks < 2 or ranks % 2:
        raise ScheduleError(
            f"{ranks} ranks; DualPipe pairs rank r with rank PP - 1 - r, so their number must be even: "
            f"take {max(2, ranks + 1)}."
        )
    if microbatches < 2 * ranks or microbatches % 2:
        raise ScheduleError(
            f"{microbatches} micro-batches; DualPipe on {ranks} ranks feeds both ends alike and needs an even "
            f"number of at least {2 * ranks}: take {max(2 * ranks, microbatches + microbatches % 2)}."
        )
    rows = []
    for rank in range(ranks):
        ends = StageId(0, rank), StageId(1, ranks - 1 - rank)
        depth = min(rank, ranks - 1 - rank)
        first, second = ends if rank < ranks // 2 else (ends[1], ends[0])
        rows.append(_row((first, second), ranks // 2, depth, microbatches // 2))
    return Schedule("dualpipe", ranks, tuple(rows))


def dualpipev(ranks: int, microbatches: int, stages_per_rank: int | None = None) -> Schedule:
    """A pipe of two stages per rank that runs down the ranks and back.   Fails: ScheduleError."""
    if stages_per_rank not in (None, 2):
        raise ScheduleError(f"{stages_per_rank} stages per rank; DualPipeV has two, one on each arm.")
    if ranks < 1:
        raise ScheduleError(f"{ranks} ranks; take 1 or more.")
    if microbatches < 2 * ranks:
        raise ScheduleError(
            f"{microbatches} micro-batches; DualPipeV on {ranks} ranks needs at least {2 * ranks}: take "
            f"{2 * ranks}."
        )
    rows = []
    for rank in range(ranks):
        ends = StageId(0, rank), StageId(0, 2 * ranks - 1 - rank)
        rows.append(_row(ends, ranks, rank, microbatches))
    return Schedule("dualpipev", 2 * ranks, tuple(rows))


def exactness(costs: Costs) -> str:
    """Where the bubble's formula, (PP/2 - 1)(F&B + B - 3W), holds."""
    if not isclose(costs.b - costs.w, costs.f) or not at_most(costs.w, costs.f):
        return "approximate: exact where B - W = F and W <= F"
    if not at_most(costs.b, costs.overlapped):
        return "approximate: exact on the middle ranks where F&B >= B"
    if not isclose(costs.overlapped, costs.f + costs.b):
        sign = "<" if costs.overlapped < costs.f + costs.b else ">"
        return f"exact on the middle ranks alone, since F&B {sign} F + B"
    return "exact"


def _row(ends: Ends, half: int, depth: int, microbatches: int) -> tuple[Cell, ...]:
    """The cells of a rank `depth` ranks away from the end, of `half` ranks to the middle."""
    row, places = _Row(ends), half - depth - 1
    for _ in range(2 * places):
        row.add("F0")
    for _ in range(depth + 1):
        row.add("F0")
        row.add("F1")
    for _ in range(places):
        row.add("I1")
        row.add("W")
        row.add("F1")
    for turn in range(microbatches - 2 * half + depth + 1):
        if turn == 0 and places == 0:  # the middle has just made the micro-batch that it would overlap with
            row.add("F0")
            row.add("B1")
        else:
            row.add("F0", "B1")
        row.add("F1", "B0")
    for _ in range(places):
        row.add("B1")
        row.add("F1", "B0")
    _drain(row, depth)
    for _ in range(places):
        row.add("W")
        row.add("I0")
    for _ in range(depth + 1):
        row.add("W")
    assert not row.owed, "a DualPipe row pays all it owes"
    return tuple(row.cells)


def _drain(row: "_Row", depth: int) -> None:
    """Step 6: whole backwards until half are done, from then on those for input alone."""
    half = (depth + 1) // 2
    for turn in range(depth + 1):
        late = turn >= half
        row.add("I1" if late and not (turn == half and depth % 2 == 0) else "B1")
        row.add("I0" if late else "B0")


class _Row:
    """Cells under construction: numbers micro-batches per direction and keeps the queue of owed W."""

    def __init__(self, ends: Ends) -> None:
        self.ends = ends
        self.cells: list[Cell] = []
        self.owed: list[Chunk] = []
        self._next = {(forward, direction): 0 for forward in (True, False) for direction in (0, 1)}

    def add(self, *words: str) -> None:
        """One cell: F, B or I with its direction, or W for the oldest debt."""
        self.cells.append(tuple(self._chunk(word) for word in words))

    def _chunk(self, word: str) -> Chunk:
        if word == "W":
            return self.owed.pop(0)._replace(kind=Kind.W)
        kind, direction = Kind(word[0]), int(word[1])
        key = (kind is Kind.F, direction)
        chunk = Chunk(kind, self.ends[direction], self._next[key])
        self._next[key] += 1
        if kind is Kind.I:
            self.owed.append(chunk)
        return chunk
