"""The record's page and lines: tables made of the numbers in raw.json and of nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from counterflow.benchmark.shown import table

Row = Mapping[str, Any]
EQUALITY = (
    "step",
    "largest difference of a gradient",
    "bound",
    "where",
    "bit for bit",
    "of the losses",
    "flips",
)
STEPS = (
    "steps",
    "tokens/s",
    "step, s (range)",
    "predicted",
    "pipeline, s",
    "predicted",
    "idle a rank, s",
    "simulated",
    "predicted",
    "waits for tokens, s",
    "predicted",
    "waits for the pipeline, s",
    "memory, GB, by rank",
    "predicted, by pipeline rank",
)
WORDS = """\
*step*: the slowest rank's, optimizer included, the median. *pipeline*: forward and backward of all micro-batches in one
recorded step, first op to last. *idle a rank*: its mean time without an op in that step; *simulated* beside it is the
schedule with this step's own op times and no transfers. *predicted*: by the planner, before the run, from the rates
measured at the start; the sign behind it is the error, predicted over measured. *waits for tokens* (exposed all-to-all
time): how long computation stood still for dispatch and combine, late peers included, on the rank that stood longest;
*predicted* there is what transfers add to the pipeline. *waits for the pipeline* (exposed pipeline transfers): what
ranks waited for products in the recorded step beyond the simulated idle time, the mean. With the *overlap off* each
dispatch and combine is waited for as soon as it is issued, and is predicted cell by cell, every op after the other; the
pipeline's sends still run ahead. *forced balanced* routing is none that a router chose. Weights and tokens are random.
"""


def difference(predicted: float, measured: float) -> str:
    """Of a prediction, as a share."""
    return f"{predicted / measured - 1:+.0%}" if measured else ""


def holds(row: Row) -> bool:
    """Whether a compared step is the plain loop's, within its bound."""
    return row["worst"] <= row["bound"] and max(row["loss_errors"]) <= row["bound"] and row["same_counts"]


def said(row: Row) -> str:
    """A row in one line, whatever it is of."""
    name = row["name"]
    if "failed" in row:
        return f"{name}: DOES NOT RUN, {row['failed']}"
    if "worst" in row:
        verdict = "equal" if holds(row) else "NOT EQUAL"
        return (
            f"{name}: {verdict}, off by {row['worst']:.1e} (bound {row['bound']:.0e}), {row['flips']} flips"
        )
    if "step_s" in row:
        errors = ", ".join(f"{what} {error:+.0%}" for what, error in row["errors"].items())
        return f"{name}: {row['tokens_per_s']:,.0f} tokens/s, step {row['step_s']:.3f} s (planner: {errors})"
    if "toml" in row:
        rates = row["rates"]
        return (
            f"{name}: products {rates['product_flops_per_s'] / 1e12:.3g} TFLOP/s, link "
            f"{rates['link_bytes_per_s'] / 1e9:.3g} GB/s, launch {rates['launch_s'] * 1e6:.1f} µs"
        )
    fastest = max(row["rows"], key=lambda one: one["bytes_per_s"])
    return f"{name}: up to {fastest['bytes_per_s'] / 1e9:.3g} GB/s on the wire ({fastest['name']}, {fastest['what']})"


def readme(raw: Row) -> str:
    """The page."""
    settings, rows = raw["settings"], list(raw["rows"].values())
    made = raw["provenance"]
    device = made.get("gpu", "") if settings["device"] == "cuda" else f"{made['cpu']}, {made['cores']} cores"
    lines = [
        f"# DualPipe with expert parallelism on {settings['ranks']} ranks, {made['started'][:10]}",
        "",
        f"{device}; torch {made['torch']}, commit {made['commit']}. {settings['steps']} steps of each way behind "
        f"{settings['warmups']} that do not count. This page is made of raw.json.",
    ]
    if settings["device"] == "cpu":
        lines += ["", "**On a CPU over gloo: that everything runs, and nothing about speed.**"]
    for title, kind, lines_of in (
        ("One step against the plain loop, routing replayed", "worst", _equality),
        ("Steps", "step_s", _steps),
        ("Dispatch and combine", "tokens", _dispatch),
        ("Rates that the predictions stand on", "toml", _rates),
    ):
        some = [row for row in rows if kind in row]
        if some:
            lines += ["", f"## {title}", "", *lines_of(some)]
    if raw["not_run"]:
        lines += ["", "## Not run", "", *(f"- {name}: {why}" for name, why in raw["not_run"].items())]
    return "\n".join(lines) + "\n"


def _equality(rows: Sequence[Row]) -> Iterator[str]:
    yield from markdown(EQUALITY, [_compared(row) for row in rows])
    yield ""
    yield (
        "Of every weight's gradient, summed over its holders: the largest difference relative to its largest element. "
        "*bit for bit*: weights whose gradients are equal so. *flips*: choices of experts that the router would not "
        "have made itself, of all that were replayed."
    )


def _compared(row: Row) -> Sequence[str]:
    verdict = f"{row['worst']:.1e}" if holds(row) else f"**{row['worst']:.1e}, NOT EQUAL**"
    return (
        row["name"].removeprefix("equality, "),
        verdict,
        f"{row['bound']:.0e}",
        row["worst_name"],
        f"{row['exact']} of {row['weights']}",
        f"{max(row['loss_errors']):.1e}",
        f"{row['flips']} of {row['choices']:,}",
    )


def _steps(rows: Sequence[Row]) -> Iterator[str]:
    yield from markdown(STEPS, [_step(row) for row in rows])
    yield from ("", WORDS)
    for row in rows:
        if "by_collective" in row:
            yield f"- {row['name']}: tokens went by `collective`, since {row['by_collective']}"


def _step(row: Row) -> Sequence[str]:
    predicted, measured, simulated = row["predicted"], row["measured"], row["simulated"]
    steps, peaks, expected = row["steps_s"], row["memory_bytes"], predicted["memory_bytes"]
    idle, rest = (sum(some["idle_s"]) / len(some["idle_s"]) for some in (measured, simulated))

    def against(value: float, of: float) -> str:
        return f"{value:.3f} ({difference(value, of)})"

    return (
        row["name"],
        f"{row['tokens_per_s']:,.0f}",
        f"{row['step_s']:.3f} ({min(steps):.3f}–{max(steps):.3f})",
        against(predicted["step_s"], row["step_s"]),
        f"{measured['pipeline_s']:.3f}",
        against(predicted["pipeline_s"], measured["pipeline_s"]),
        f"{idle:.3f}",
        f"{rest:.3f}",
        f"{predicted['idle_s']:.3f}",
        f"{row['exposed_all_to_all_s']:.4f}",
        f"{predicted['all_to_all_s']:.4f}",
        f"{row['exposed_pipeline_s']:.4f}",
        " ".join(f"{peak / 1e9:.3g}" for peak in peaks),
        " ".join(f"{peak / 1e9:.3g}" for peak in expected) + f" ({difference(max(expected), max(peaks))})",
    )


def _dispatch(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        head, *lines = table(row, row["tokens"])
        yield from (
            f"{row['name']} of a rank; the first lines are ceilings, `of` is a share of one of them:",
            "",
        )
        yield from markdown(head, lines)
        yield ""
    for line in dict.fromkeys(line for row in rows for line in row["notes"]):
        yield f"- {line}"


def _rates(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        yield f"- {said(row)}"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table; numbers to the right."""
    width = len(head)
    yield "| " + " | ".join(head) + " |"
    yield "|---|" + "---:|" * (width - 1)
    for line in lines:
        yield "| " + " | ".join([*line, *[""] * (width - len(line))]) + " |"
