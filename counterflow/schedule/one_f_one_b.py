"""1F1B, plain and interleaved: a rank warms up with forwards, then alternates, then drains.

Interleaved, a rank holds several stages, so that a micro-batch passes it several times and the bubble shrinks by
their number, for as many more transfers; the order is Megatron-LM's.
"""

from counterflow.errors import ScheduleError
from counterflow.schedule.words import Cell, Chunk, Kind, Schedule, StageId


def one_f_one_b(ranks: int, microbatches: int, stages_per_rank: int | None = None) -> Schedule:
    """One stage a rank; at most `ranks` micro-batches in flight.   Fails: ScheduleError."""
    require_positive(ranks, microbatches)
    if stages_per_rank not in (None, 1):
        raise ScheduleError(f"{stages_per_rank} stages per rank; 1F1B has one: take interleaved-1f1b.")
    return Schedule("1f1b", ranks, tuple(_row(rank, ranks, microbatches, 1) for rank in range(ranks)))


def interleaved(ranks: int, microbatches: int, stages_per_rank: int | None = None) -> Schedule:
    """`stages_per_rank` (2 by default) stages a rank, dealt out in turns.   Fails: ScheduleError."""
    require_positive(ranks, microbatches)
    chunks = 2 if stages_per_rank is None else stages_per_rank
    if chunks < 1:
        raise ScheduleError(f"{chunks} stages per rank; take 1 or more.")
    if microbatches % ranks:
        raise ScheduleError(
            f"{microbatches} micro-batches; interleaved 1F1B runs them in rounds of {ranks}, one a rank: take "
            f"{-(-microbatches // ranks) * ranks}."
        )
    rows = tuple(_row(rank, ranks, microbatches, chunks) for rank in range(ranks))
    return Schedule("interleaved-1f1b", ranks * chunks, rows)


def require_positive(ranks: int, microbatches: int) -> None:
    """Fails (ScheduleError) where there is nothing to run or nobody to run it."""
    if ranks < 1 or microbatches < 1:
        raise ScheduleError(f"{ranks} ranks and {microbatches} micro-batches; take 1 or more of each.")


def _row(rank: int, ranks: int, microbatches: int, chunks: int) -> tuple[Cell, ...]:
    total = microbatches * chunks
    warmup = ranks - rank - 1 if chunks == 1 else (ranks - rank - 1) * 2 + (chunks - 1) * ranks
    warmup = min(total, warmup)

    def chunk(kind: Kind, turn: int) -> Cell:
        group, within = divmod(turn, ranks * chunks)
        visit = within // ranks if chunks > 1 else 0
        visit = visit if kind is Kind.F else chunks - 1 - visit
        mb = group * ranks + within % ranks if chunks > 1 else turn
        return (Chunk(kind, StageId(0, visit * ranks + rank), mb),)

    row = [chunk(Kind.F, turn) for turn in range(warmup)]
    for turn in range(total - warmup):
        row += [chunk(Kind.F, warmup + turn), chunk(Kind.B, turn)]
    return tuple(row + [chunk(Kind.B, turn) for turn in range(total - warmup, total)])
