"""ZB1P (zero bubble, ZB-H1): 1F1B whose weight gradients wait until there is nothing else to do.

Rank r may owe r micro-batches, so that every rank holds at most as many as rank 0 of 1F1B does, and the gradient for
the input travels on as early as it can. Table 2's second row is this schedule's.
"""

from counterflow.errors import ScheduleError
from counterflow.schedule.method import at_most
from counterflow.schedule.one_f_one_b import require_positive
from counterflow.schedule.simulate import Costs
from counterflow.schedule.words import Cell, Chunk, Kind, Schedule, StageId


def zb1p(ranks: int, microbatches: int, stages_per_rank: int | None = None) -> Schedule:
    """One stage a rank, every backward split.   Fails: ScheduleError."""
    require_positive(ranks, microbatches)
    if stages_per_rank not in (None, 1):
        raise ScheduleError(f"{stages_per_rank} stages per rank; ZB1P has one.")
    return Schedule("zb1p", ranks, tuple(_row(rank, ranks, microbatches) for rank in range(ranks)))


def _row(rank: int, ranks: int, microbatches: int) -> tuple[Cell, ...]:
    stage, warmup = StageId(0, rank), min(microbatches, ranks - rank - 1)
    kinds = [(Kind.F, mb) for mb in range(warmup)]
    for mb in range(microbatches):
        if warmup + mb < microbatches:
            kinds.append((Kind.F, warmup + mb))
        kinds.append((Kind.I, mb))
        if mb >= rank:
            kinds.append((Kind.W, mb - rank))
    kinds += [(Kind.W, mb) for mb in range(max(0, microbatches - rank), microbatches)]
    return tuple((Chunk(kind, stage, mb),) for kind, mb in kinds)


def exactness(costs: Costs) -> str:
    """Where the bubble's formula holds: W fits into what B leaves, on every rank."""
    small = at_most(costs.w, costs.f) and at_most(costs.w, costs.b - costs.w)
    return "exact" if small else "too low: exact where W <= F and W <= B - W"
