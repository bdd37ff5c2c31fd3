"""What checkpoints cost a training: from the first step to the last over the sum of the steps' times, behind and not.

The same run with a checkpoint every few steps, written behind it and with the training waiting, in turn. The last
checkpoint, for which any run waits, is apart: metrics end with the last step.

python bench/checkpoint_behind.py tiny --every 20 --repeats 5 --folder records/DATE-checkpoints train.tokens=4e5
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from counterflow.train.metrics import read


def main() -> None:
    """Run, judge, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", default="tiny")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for repeat in range(arguments.repeats):
        for behind in (True, False) if repeat % 2 else (False, True):
            rows.append(
                {"behind": behind} | once(arguments.run, arguments.every, behind, arguments.overrides)
            )
            print(json.dumps(rows[-1]), flush=True)
    (arguments.folder / "behind.json").write_text(json.dumps(rows, indent=1))


def once(run: str, every: int, behind: bool, overrides: list[str]) -> dict[str, float]:
    """One run's times, the first step and the evaluations apart."""
    with tempfile.TemporaryDirectory() as place:
        own = [
            f"keep.folder={place}/run",
            f"keep.checkpoint_every={every}",
            f"keep.checkpoint_async={behind}",
        ]
        words = [sys.executable, "-m", "counterflow", "train", run, *own, *overrides]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        first, *rest = read(Path(place) / "run")
        size = sum(path.stat().st_size for path in next(Path(place).glob("run/checkpoints/step-*")).iterdir())
    steps = sum(row["step_seconds"] for row in rest)
    apart = sum(row.get("evaluation_seconds", 0.0) for row in rest)
    whole = rest[-1]["seconds"] - first["seconds"] - apart
    waited = sum(row["checkpoint_seconds"] for row in rest)
    return {"whole_s": whole, "steps_s": steps, "waited_s": waited, "ratio": whole / steps, "bytes": size}


if __name__ == "__main__":
    main()
