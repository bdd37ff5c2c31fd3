"""Pipeline schedules as data: one object is printed, checked, simulated, drawn and run."""

from collections.abc import Callable, Mapping

from counterflow.schedule.dual import dualpipe, dualpipev
from counterflow.schedule.one_f_one_b import interleaved, one_f_one_b
from counterflow.schedule.words import Kind, Schedule
from counterflow.schedule.zb1p import zb1p

SCHEDULES: Mapping[str, Callable[..., Schedule]] = {
    "1f1b": one_f_one_b,
    "interleaved-1f1b": interleaved,
    "zb1p": zb1p,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}
"""Rules by name: (ranks, microbatches, stages_per_rank=None) gives the schedule, or a ScheduleError that says what
is not allowed and what would be."""


def forward_only(schedule: Schedule) -> Schedule:
    """The schedule without its backward chunks: what evaluation runs."""
    rows = (
        tuple(kept for cell in row if (kept := tuple(chunk for chunk in cell if chunk.kind is Kind.F)))
        for row in schedule.rows
    )
    return Schedule(f"{schedule.name}, forward only", schedule.stages, tuple(rows))
