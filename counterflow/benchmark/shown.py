"""What `bench` shows: tables as rows of words, whoever prints them, and curves over sizes as SVG."""

from collections.abc import Mapping
from typing import Any

from counterflow.config.backends import BACKENDS
from counterflow.plan.chart import curves

Result = Mapping[str, Any]
HEAD = ("", "wire MB", "transport", "GB/s", "of", "dispatch", "of", "combine", "of")


def ceiling_of(name: str, ceilings: Mapping[str, float]) -> str:
    """The ceiling that a backend is held against: the same means with the same budget, else the fastest."""
    backend, _, rest = name.partition(", ")
    budget, means = rest.split(" ")[0], BACKENDS[backend].ceiling
    budgeted = f"{means}, {budget} " if budget.isdigit() else means
    same = [one for one in ceilings if means and (one == means or one.startswith(budgeted))]
    return max(same, key=len) if same else max(ceilings, key=lambda one: ceilings[one])


def table(result: Result, tokens: int) -> list[tuple[str, ...]]:
    """Of one size: the ceilings, then the backends with their shares of one of them; the first row is the head."""
    rows = [row for row in result["rows"] if row["tokens"] == tokens]
    ceilings = {row["name"]: row["bytes_per_s"] for row in rows if row["what"] == "ceiling"}
    lines: list[tuple[str, ...]] = [HEAD]
    for row in rows:
        if row["what"] == "ceiling":
            words = (
                row["name"],
                f"{row['wire_bytes'] / 1e6:.1f}",
                _time(row),
                f"{row['bytes_per_s'] / 1e9:.4g}",
            )
            lines.append((*words, *[""] * (len(HEAD) - len(words))))
    for name in dict.fromkeys(row["name"] for row in rows if row["what"] != "ceiling"):
        mine = {row["what"]: row for row in rows if row["name"] == name}
        against = ceilings[ceiling_of(name, ceilings)]

        def share(what: str, mine: Mapping[str, Any] = mine, against: float = against) -> str:
            return f"{mine[what]['bytes_per_s'] / against:.2f}"

        first = mine["transport"]
        lines.append(
            (
                name,
                f"{first['wire_bytes'] / 1e6:.1f}",
                _time(first),
                f"{first['bytes_per_s'] / 1e9:.4g}",
                share("transport"),
                _time(mine["dispatch"]),
                share("dispatch"),
                _time(mine["combine"]),
                share("combine"),
            )
        )
    return lines


def focus(result: Result, wanted: int = 4096) -> int:
    """The size that the table is of: the report's, or the largest below it, or the smallest."""
    sizes = sorted({row["tokens"] for row in result["rows"]})
    return max([size for size in sizes if size <= wanted], default=sizes[0])


def picture(result: Result) -> str:
    """Transport's rate over sizes, as a share of the fastest rate that any ceiling reaches."""
    best = max(row["bytes_per_s"] for row in result["rows"] if row["what"] == "ceiling")
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in result["rows"]:
        if row["what"] in ("ceiling", "transport"):
            name = row["name"] + " (ceiling)" * (row["what"] == "ceiling")
            lines.setdefault(name, []).append((row["tokens"], row["bytes_per_s"] / best))
    ends = sorted(lines, key=lambda name: -lines[name][-1][1])
    return curves(
        {name: lines[name] for name in ends},
        "tokens of a rank",
        f"transport of dispatch, share of {best / 1e9:.4g} GB/s on the wire",
        1.0,
    )


def _time(row: Mapping[str, Any]) -> str:
    """Median, and behind it the 95th percentile."""
    return f"{row['median_s'] * 1e6:.0f} ({row['p95_s'] * 1e6:.0f}) µs"
