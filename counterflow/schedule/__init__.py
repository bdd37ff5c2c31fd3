"""Pipeline schedules as data: one object is printed, checked, simulated, drawn and run."""

from collections.abc import Callable, Mapping

from counterflow.schedule.dual import dualpipe, dualpipev
from counterflow.schedule.one_f_one_b import interleaved, one_f_one_b
from counterflow.schedule.words import Chunk, Kind, Schedule
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


def forward_only(schedule: Schedule, microbatches: int | None = None) -> Schedule:
    """The schedule without its backward chunks, or of its first so many micro-batches: what evaluation runs."""
    total = sum(schedule.microbatches) if microbatches is None else microbatches
    kept = [total // schedule.pipes + (pipe < total % schedule.pipes) for pipe in range(schedule.pipes)]

    def stays(chunk: Chunk) -> bool:
        return chunk.kind is Kind.F and chunk.mb < kept[chunk.stage.pipe]

    rows = (
        tuple(cell for row_cell in row if (cell := tuple(chunk for chunk in row_cell if stays(chunk))))
        for row in schedule.rows
    )
    return Schedule(f"{schedule.name}, forward only", schedule.stages, tuple(rows))
