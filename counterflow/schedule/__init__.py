"""Pipeline schedules as data: one object is printed, checked, simulated, drawn and run.

Below, the table of the rules. To add one: a file in this folder and a row here.
"""

from collections.abc import Mapping

from counterflow.schedule import dual, zb1p
from counterflow.schedule.method import Method, from_on
from counterflow.schedule.one_f_one_b import interleaved, one_f_one_b
from counterflow.schedule.words import Chunk, Kind, Schedule

SCHEDULES: Mapping[str, Method] = {
    "1f1b": Method(
        one_f_one_b,
        microbatches=lambda ranks: from_on(1),
        bubble=lambda ranks, stages, c: (stages - 1) * (c.f + c.b),
        activations=lambda stages: stages,
        source="Table 2",
    ),
    "interleaved-1f1b": Method(
        interleaved,
        microbatches=lambda ranks: from_on(ranks, ranks),
        needs="a multiple of its ranks as micro-batches",
        stages_per_rank=2,
        choices=(2, 4),
        bubble=lambda ranks, stages, c: (ranks - 1) * (c.f + c.b),
        source="Megatron-LM, arXiv 2104.04473 §2.2",
    ),
    "zb1p": Method(
        zb1p.zb1p,
        microbatches=lambda ranks: from_on(1),
        bubble=lambda ranks, stages, c: (stages - 1) * (c.f + c.b - 2 * c.w),
        exactness=zb1p.exactness,
        activations=lambda stages: stages,
        source="Table 2",
    ),
    "dualpipe": Method(
        dual.dualpipe,
        even_ranks=True,
        microbatches=lambda ranks: from_on(2 * ranks, 2),
        needs="even ranks and micro-batches",
        bubble=lambda ranks, stages, c: (stages / 2 - 1) * (c.overlapped + c.b - 3 * c.w),
        exactness=dual.exactness,
        parameters=2,
        activations=lambda stages: stages + 1,
        source="Table 2",
    ),
    "dualpipev": Method(
        dual.dualpipev,
        microbatches=lambda ranks: from_on(2 * ranks),
        stages_per_rank=2,
        bubble=lambda ranks, stages, c: (stages / 2 - 1) * (c.overlapped + c.b - 3 * c.w),
        exactness=dual.exactness,
        parameters=2,
        activations=lambda stages: stages + 1,
        source="DualPipe's README, as Table 2",
    ),
}
PLAIN_LOOP = "1f1b"
"""What one pipeline rank runs, whatever its run's schedule: on one rank that rule is the plain loop."""


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
