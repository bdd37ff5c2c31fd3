"""The words of a pipeline: stage, chunk, cell, schedule, and inside a chunk part, plan, op, lane.

A schedule is data: rows of cells, one row a rank. Nothing here computes or waits; what waits for what is said in
`relation.py` alone. Two-way schedules have two pipes; pipe 1 is the reverse direction, and its stages hold a second
copy of the same layers (the mirror), so that stage i of either pipe is the i-th piece of the model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple


class Kind(StrEnum):
    """F forward, B whole backward, I backward for input, W backward for weights."""

    F = "F"
    B = "B"
    I = "I"  # noqa: E741
    W = "W"


class StageId(NamedTuple):
    """Stage `index` of a pipe; micro-batches enter at 0."""

    pipe: int
    index: int

    def __str__(self) -> str:
        return f"{self.index}{PRIME * self.pipe}"


class Chunk(NamedTuple):
    """One stage's work of one kind on one micro-batch; micro-batches are counted within their pipe."""

    kind: Kind
    stage: StageId
    mb: int

    def __str__(self) -> str:
        return f"{self.kind}{self.mb}{PRIME * self.stage.pipe}"


PRIME = "'"
Cell = tuple[Chunk, ...]
"""What a rank does in one slot: one chunk, or a forward and a backward that overlap."""


class Carried(StrEnum):
    """What moves between chunks: hidden states, their gradients, weight gradients."""

    X = "x"
    DX = "dx"
    DW = "dw"


class Product(NamedTuple):
    """What a chunk gives."""

    what: Carried
    stage: StageId
    mb: int

    def __str__(self) -> str:
        return f"{self.what} of micro-batch {self.mb} at stage {self.stage}"


@dataclass(frozen=True)
class Schedule:
    """Rows of cells, one row a rank; `stages` is the number of stages of one pipe."""

    name: str
    stages: int
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def ranks(self) -> int:
        """Ranks, one a row."""
        return len(self.rows)

    def chunks(self) -> Iterator[tuple[int, int, Chunk]]:
        """(rank, position of its cell, chunk) of every chunk."""
        for rank, row in enumerate(self.rows):
            for position, cell in enumerate(row):
                yield from ((rank, position, chunk) for chunk in cell)

    @cached_property
    def rank_of(self) -> Mapping[StageId, int]:
        """The rank that holds each stage."""
        return {chunk.stage: rank for rank, _, chunk in self.chunks()}

    def held(self, rank: int) -> list[StageId]:
        """The stages of a rank, pipe 0's first."""
        return sorted(stage for stage, holder in self.rank_of.items() if holder == rank)

    @cached_property
    def pipes(self) -> int:
        """1, or 2 where micro-batches enter from both ends."""
        return 1 + max((stage.pipe for stage in self.rank_of), default=0)

    @cached_property
    def overlaps(self) -> bool:
        """Whether a rank runs a forward and a backward at the same time."""
        return any(len(cell) > 1 for row in self.rows for cell in row)

    @cached_property
    def microbatches(self) -> tuple[int, ...]:
        """Micro-batches of each pipe."""
        counts = [0] * self.pipes
        for _, _, chunk in self.chunks():
            counts[chunk.stage.pipe] = max(counts[chunk.stage.pipe], chunk.mb + 1)
        return tuple(counts)


class Part(StrEnum):
    """Parts of a chunk. MERGE joins hidden and embedded states for MTP; HEAD is final norm, head and loss."""

    EMBED = "EMBED"
    ATTN = "ATTN"
    DISPATCH = "DISPATCH"
    MLP = "MLP"
    COMBINE = "COMBINE"
    MERGE = "MERGE"
    HEAD = "HEAD"


class Lane(StrEnum):
    """Where an op runs: on the computing multiprocessors, or on the wire between expert ranks."""

    COMPUTE = "compute"
    ALL_TO_ALL = "all-to-all"


TRANSFERS = (Part.DISPATCH, Part.COMBINE)
OWING = (Part.ATTN, Part.MLP, Part.MERGE)
"""Parts whose weight gradients can wait."""
Plan = tuple[tuple[Part, int], ...]
"""A stage's parts in forward order, each with its layer (HEAD and MERGE: with its depth)."""


class Op(NamedTuple):
    """One part of one chunk; `kind` is F, I or W, since a whole backward is I and W."""

    kind: Kind
    part: Part
    layer: int
    chunk: Chunk

    @property
    def lane(self) -> Lane:
        """Transfers run beside computation."""
        return Lane.ALL_TO_ALL if self.part in TRANSFERS else Lane.COMPUTE

    def __str__(self) -> str:
        return f"{self.part}{self.layer} {self.kind}{self.chunk.mb}{PRIME * self.chunk.stage.pipe}"


@dataclass(frozen=True)
class Span:
    """A cell or an op with its place in time, predicted or measured; seconds."""

    rank: int
    what: Cell | Op
    start: float
    end: float

    @property
    def lane(self) -> Lane:
        """Cells count as computation."""
        return self.what.lane if isinstance(self.what, Op) else Lane.COMPUTE
