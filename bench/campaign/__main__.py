"""What no test can cover alone: random layouts, kills, corrupted files and malformed requests, by the thousand.

    python -m bench.campaign layouts --seed 0 --count 100
    python -m bench.campaign kills --seed 0 --count 20 --minutes 10 --json kills.jsonl
    python -m bench.campaign corruption --seed 0 --count 2000
    python -m bench.campaign requests --seed 0 --count 5000
    python -m bench.campaign layouts --seed 0 --only 17

Run it in the project's folder. Of every seed the same cases are drawn again; `--only` makes one of them. A line of JSON
with counts and failures is printed and, with `--json`, added to a file. Processes are forked from a server in which
torch is imported already (tests/processes.py), but for those that are said to be executed. A few cases of each part
are tests (tests/test_campaign.py).
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # small products are slower on several; before torch is imported

from bench.campaign import corruption, kills, layouts, requests
from counterflow.progress import Progress
from counterflow.train.provenance import provenance

Case = Callable[[random.Random], tuple[str, ...]]
"""Draws a case and tries it; the words under which it is counted.   Fails: with anything, where a property does."""
PARTS: Mapping[str, Callable[[Path], AbstractContextManager[Case]]] = {
    "layouts": layouts.opened,
    "processes": layouts.opened_processes,
    "kills": kills.opened,
    "corruption": corruption.opened,
    "commands": corruption.opened_commands,
    "requests": requests.opened,
    "http": requests.opened_http,
}
"""What is opened in a folder of its own for as long as cases are tried."""


def campaign(
    part: str, seed: int, count: int, minutes: float = 1e9, first: int = 0, shown: bool = True
) -> dict[str, Any]:
    """The seed's cases from `first` on, until `count` or the time is over: what was counted and what failed."""
    counts, failures, start, done = Counter[str](), [], time.monotonic(), 0
    with (
        tempfile.TemporaryDirectory() as place,
        PARTS[part](Path(place)) as case,
        Progress(part, count, shown=shown) as progress,
    ):
        for number in range(first, first + count):
            if time.monotonic() - start > 60 * minutes:
                break
            try:
                counts.update(case(random.Random(f"{part} {seed} {number}")))
            except Exception as error:
                where = traceback.format_exc().strip().splitlines()
                failures.append({"case": number, "what": str(error) or repr(error), "where": where[-8:]})
                progress.note(f"FAILED {part} --seed {seed} --only {number}: {failures[-1]['what'][:300]}")
            done += 1
            progress.update(done, f"{done}/{count}", f"{len(failures)} failed")
    seconds = round(time.monotonic() - start, 1)
    found = {"part": part, "seed": seed, "cases": done, "failed": len(failures), "seconds": seconds}
    return found | {"counts": dict(sorted(counts.items())), "failures": failures}


def main() -> int:
    """One seed of one part; 1 if any case failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=1e9, help="no case begins after so many")
    parser.add_argument("--only", type=int, help="the number of one case")
    parser.add_argument("--json", type=Path, help="a file to which a line is added")
    asked = parser.parse_args()
    first, count = (0, asked.count) if asked.only is None else (asked.only, 1)
    found = campaign(asked.part, asked.seed, count, asked.minutes, first)
    print(json.dumps(found, indent=1))
    if asked.json:
        with asked.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found | {"provenance": provenance()}) + "\n")
    return int(bool(found["failed"]))


if __name__ == "__main__":
    sys.exit(main())
