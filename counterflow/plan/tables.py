"""Tables of the planner's other answers: published runs, sizes, schedules, copies of experts."""

from collections.abc import Mapping, Sequence

from counterflow.plan import chart
from counterflow.plan.cost import predict
from counterflow.plan.placement import Placement
from counterflow.plan.published import (
    Compared,
    bubble_rows,
    report_costs,
    run_rows,
    step_rows,
    table_1,
    trace_rows,
)
from counterflow.plan.scale import Point, Row
from counterflow.units import aligned, bytes_


def published() -> str:
    """The report's run part by part, its bubble by its causes, Table 1, and the runs that nothing was fitted on."""
    step = predict(report_costs())
    causes = [["bubble, s", ""], *([name, f"{seconds:+.3f}"] for name, seconds in bubble_rows(step))]
    runs = [["run", "published", "predicted", "error", "transfers free", "error", ""]]
    for run, real, free in run_rows():
        cells = [f"{real.predicted:.0f}", _percent(real.error), f"{free.predicted:.0f}", _percent(free.error)]
        runs.append([run.name, f"{run.tokens_per_s:.0f}", *cells, run.note])
    return "\n\n".join(
        [
            "v3-671b on 2,048 H800, FP8, PP16 EP64 DualPipe, batch 15360 × 4096. Predicted; nothing of it fitted:",
            compared(step_rows(step)),
            "Where the bubble comes from, cause by cause:",
            aligned(causes),
            "The report's Table 1:",
            compared(table_1(step)),
            "The public profile-data trace, on which three efficiencies were fitted:",
            compared(trace_rows()),
            "Published runs that nothing was fitted on, tokens/s of a GPU:",
            aligned(runs),
        ]
    )


def compared(rows: Sequence[Compared]) -> str:
    """A line each."""
    table = [["", "published", "predicted", "error", ""]]
    for row in rows:
        unit = f"{row.unit}; {row.note}" if row.note else row.unit
        table.append([row.name, _short(row.published), _short(row.predicted), _percent(row.error), unit])
    return aligned(table)


def scale(curves: Mapping[str, Sequence[Point]]) -> str:
    """A block a variant."""
    blocks = [
        "Overhead of all-to-all over the same without any, the model growing with the cluster (EP = GPUs).\n"
        "lone: a layer by itself. exposed: what a steady pair of chunks cannot cover. pair: and the multiprocessors\n"
        "that transfers take. step: a DualPipe step on PP16, EP = GPUs / 16."
    ]
    for name, points in curves.items():
        table = [["GPUs", "experts", "lone", "exposed", "pair", "step", ""]]
        for point in points:
            step = "-" if point.step is None else _share(point.step)
            shares = [_share(point.alone), _share(point.exposed), _share(point.pair), step]
            table.append([str(point.gpus), str(point.experts), *shares, ""])
        blocks.append(f"{name}:\n{aligned(table)}")
    return "\n\n".join(blocks)


def scale_svg(curves: Mapping[str, Sequence[Point]]) -> str:
    """What a steady pair cannot cover, a line a variant; above 100 % at the edge."""
    lines = {
        name: [(float(point.gpus), point.exposed) for point in points] for name, points in curves.items()
    }
    first = next(iter(curves.values()))
    lines["as the report, nothing overlapped"] = [(float(point.gpus), point.alone) for point in first]
    return chart.curves(
        lines, "GPUs (expert ranks), four experts each", "exposed all-to-all, % of computation", 1.0
    )


def schedules(rows: Sequence[Row]) -> str:
    """The quickest first."""
    table = [["step", "idle", "transfers free", "idle", "they cost", "peak memory", "layout"]]
    for row in sorted(rows, key=lambda row: row.seconds):
        free = [f"{row.free_s:.2f} s", f"{row.free_idle_s:.2f} s", _percent(row.seconds / row.free_s - 1)]
        table.append(
            [f"{row.seconds:.2f} s", f"{row.idle_s:.2f} s", *free, bytes_(row.peak_bytes), str(row.layout)]
        )
    return aligned(table)


def placements(pairs: Sequence[tuple[Placement, Placement]]) -> str:
    """Balance before and after, and the most copied experts, a line a layer."""
    table = [["layer", "fullest GPU / mean before", "after", "most copies"]]
    for layer, (before, after) in enumerate(pairs):
        copies = sorted(range(len(after.copies)), key=lambda expert: -after.copies[expert])[:4]
        most = ", ".join(f"expert {expert} × {after.copies[expert]}" for expert in copies)
        table.append([str(layer), f"{before.imbalance:.3f}", f"{after.imbalance:.3f}", most])
    return aligned(table)


def _percent(error: float) -> str:
    return f"{100 * error:+.1f} %"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
