"""Does any schedule, on any layout, change a step's losses or gradients? Runs the grid and random layouts, in process.

Usage: python bench/fuzz_equality.py [--draws 240] [--seed 0] [--grid] [--backends collective two_hop] [--json FILE]

Kernels of `nvlink` and `copy_engine`, if named among the backends, run in Triton's interpreter: seconds for each.
"""

import argparse
import os
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.progress import track

from counterflow.benchmark import equality_experts
from counterflow.benchmark.equality import Layout, compare, draw, small_model
from counterflow.benchmark.saved import save
from counterflow.schedule import SCHEDULES


def grid() -> list[tuple[Layout, int]]:
    """Every schedule × {2, 4, 8, 16} ranks × two counts of micro-batches × D = 0, 1, 2."""
    return [
        (Layout(name, ranks, ranks * times, length=6), depth)
        for name in SCHEDULES
        for ranks in (2, 4, 8, 16)
        for times in (2, 3)
        for depth in (0, 1, 2)
    ]


def main() -> int:
    """Run all, print the shares, write the raw rows; exit code 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--backends", nargs="+", default=["collective", "two_hop"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TRITON_INTERPRET"] = "1"  # all is on the CPU; read when Triton is imported
    generator = random.Random(arguments.seed)
    cases = [draw(generator, arguments.backends) for _ in range(arguments.draws)] + (
        grid() if arguments.grid else []
    )
    rows = []
    for number, (layout, depth) in enumerate(track(cases, "layouts")):
        stages = SCHEDULES[layout.schedule](layout.ranks, 4 * layout.ranks).stages
        start, failure, worst = time.perf_counter(), "", {}
        try:
            model = small_model(stages, depth, number)
            if layout.expert == 1:
                worst = compare(layout, model, number)
            else:
                worst = {"shared": equality_experts.compare(layout, model.double(), number)}
        except AssertionError as error:
            failure = str(error).splitlines()[0]
            print(f"FAILED: {layout}: {failure}")
        rows.append(
            {
                **asdict(layout),
                "depth": depth,
                **worst,
                "failure": failure,
                "seconds": time.perf_counter() - start,
            }
        )
    drawn = rows[: arguments.draws]
    shares = {
        "four ranks or more": sum(row["ranks"] >= 4 for row in drawn),
        "MTP": sum(row["depth"] >= 1 for row in drawn),
        "uneven plans": sum(bool(row["placement"]) for row in drawn),
        "recomputation": sum(row["recompute"] != "none" for row in drawn),
        "shared experts": sum(row["expert"] > 1 for row in drawn),
        **{
            name: sum(row["expert"] > 1 and row["dispatch"] == name for row in drawn)
            for name in arguments.backends
        },
        "data ranks": sum(row["data_ranks"] > 1 for row in drawn),
    }
    failed = sum(bool(row["failure"]) for row in rows)
    print(f"{len(rows)} layouts, {failed} failed; of {len(drawn)} drawn: {shares}")
    print(
        f"largest relative difference where the order of sums is another: {max(r.get('summed', 0) for r in rows):.2e}"
    )
    save(arguments.json, {"shares": shares, "failed": failed, "rows": rows})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
