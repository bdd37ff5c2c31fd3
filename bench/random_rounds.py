"""Does any of 1,000 random rounds with a late rank give other rows, outputs or gradients than one rank alone?

python bench/random_rounds.py --ranks 4 --backends collective two_hop --folder records/DATE-rounds
"""

import argparse
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from counterflow.benchmark.processes import on_processes
from counterflow.benchmark.random_rounds import RandomRounds, random_rounds
from counterflow.benchmark.saved import save
from counterflow.comm.mesh import Mesh
from counterflow.config.run import Parallel
from counterflow.train.provenance import provenance


def main() -> None:
    """Every backend in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="*", default=["collective", "two_hop"])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    for backend in asked.backends:
        wish = RandomRounds(backend, asked.rounds, seed=asked.seed)
        on_processes(bench, Parallel(data=asked.ranks, expert=asked.ranks), asked.device, wish, asked.folder)


def bench(mesh: Mesh, wish: RandomRounds, folder: Path | None) -> None:
    """All rounds of a backend; a mismatch ends them with an error that names the round."""
    start, rows = time.perf_counter(), []
    for row in random_rounds(wish, mesh):
        rows.append(row)
    if not mesh.first:
        return
    worst = max(row["worst"] for row in rows)
    routed = dict(Counter(row["routing"] for row in rows))
    print(
        f"{wish.backend}, {mesh.size} ranks: {len(rows)} rounds, none with a mismatch, largest relative error "
        f"{worst:.2e}, {time.perf_counter() - start:.0f} s; {routed}",
        flush=True,
    )
    if folder:
        whole = {"settings": asdict(wish), "ranks": mesh.size, "provenance": provenance(), "rows": rows}
        save(folder / f"{wish.backend}.json", whole)


if __name__ == "__main__":
    main()
