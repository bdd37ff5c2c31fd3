"""Is the measured bubble the simulated one? Real processes, real transfers, sleeps for computation.

Simulated op by op, as the executor runs: the backward of a pair goes first, so its dx leaves before the forward is done
and some schedules end sooner than by whole cells, whose products leave at a cell's end.

python bench/bubble.py --ranks 8 --microbatches 16 --unit 0.5 --repeats 5 --folder records/DATE-bubble
"""

import argparse
import statistics
from pathlib import Path

from counterflow.benchmark.bubble import PLAN, idle_of, measure, seconds
from counterflow.benchmark.saved import save
from counterflow.schedule import SCHEDULES, picture
from counterflow.schedule.measure import idle
from counterflow.schedule.simulate import Costs, makespan, simulate, simulate_ops
from counterflow.train.provenance import provenance
from counterflow.train.timeline import from_zero


def main() -> None:
    """Measure every schedule; print the largest deviation of any rank's idle time, in shares of the makespan."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("schedules", nargs="*", default=list(SCHEDULES))
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--unit", type=float, default=0.5, help="seconds of F, I and W each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    costs = Costs(arguments.unit, 2 * arguments.unit, arguments.unit)
    rows, made = {}, provenance()
    for name in arguments.schedules:
        ranks = arguments.ranks // 2 if name == "dualpipev" else arguments.ranks
        schedule = SCHEDULES[name](ranks, arguments.microbatches)
        predicted = simulate_ops(
            schedule, dict.fromkeys(schedule.rank_of, PLAN), lambda _, op: seconds(costs, op)
        )
        by_cells = makespan(simulate(schedule, costs))
        whole, expected = makespan(predicted), idle(predicted, ranks)
        repeats = measure(schedule, costs, arguments.repeats)
        measured = [idle_of(spans, ranks) for spans in repeats]
        worst = max(abs(a - b) / whole for _, idles in measured for a, b in zip(idles, expected))
        mean = statistics.mean(span for span, _ in measured)
        rows[name] = {
            "ranks": ranks,
            "predicted": {"makespan": whole, "idle": expected, "makespan_by_cells": by_cells},
            "measured": [{"makespan": span, "idle": idles} for span, idles in measured],
            "worst": worst,
        }
        print(
            f"{name:17} {ranks} ranks: makespan {whole:.2f} s simulated ({by_cells:.2f} by whole cells), {mean:.2f} s "
            f"measured; idle {statistics.mean(expected):.2f} s; worst rank off by {worst:.2%} of the makespan",
            flush=True,
        )
        if arguments.folder:
            arguments.folder.mkdir(parents=True, exist_ok=True)
            both = {"simulated": predicted, "measured": from_zero(repeats[0])}
            (arguments.folder / f"{name}.svg").write_text(picture.compare(both, ranks))
    if arguments.folder:
        raw = {
            "settings": {k: str(v) for k, v in vars(arguments).items()},
            "provenance": made,
            "rows": rows,
        }
        save(arguments.folder / "raw.json", raw)


if __name__ == "__main__":
    main()
