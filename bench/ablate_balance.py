"""What do the ways of balancing expert load do to MaxVio and to held-out loss?

python bench/ablate_balance.py --seeds 0 1 2 3 4 --json records/DATE-balance/raw.json train.tokens=1e6
"""

import argparse
from pathlib import Path

from counterflow.benchmark.ablate import BALANCE, study, summary
from counterflow.benchmark.saved import save
from counterflow.train.provenance import provenance


def main() -> None:
    """Train every variant with every seed; print the table; keep the raw numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="settings of the run all variants share, KEY=VALUE")
    parser.add_argument("--run", default="tiny")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = study(arguments.run, arguments.overrides, BALANCE, arguments.seeds, arguments.jobs)
    print("\n" + summary(rows))
    save(arguments.json, {"provenance": provenance(), "rows": rows})


if __name__ == "__main__":
    main()
