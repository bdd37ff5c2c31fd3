"""Does `counterflow train small` stay balanced and keep stepping, as a user types it?

Three runs, one after another: all defaults, stopped after eight minutes; `train.tokens=1e8`, a checkpoint every 50
steps, stopped at step 150; `train.tokens=1e7`, whole. Each is judged from its metrics.jsonl: MaxVio of every layer over
windows of ten steps, experts without a token for two steps running, and the time from the first step to the last,
evaluation apart, over the sum of the steps' times.

python bench/train_small.py --folder records/DATE-train-small [RUN ...]
python bench/train_small.py --read runs/small/metrics.jsonl --aim 1 --quiet-from 50
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

WINDOW = 10
"""Steps that MaxVio is averaged over."""
JUDGED_FROM = 100
"""The step from which balance is judged, or the end of the warm-up if that comes first."""


@dataclass(frozen=True)
class Asked:
    """A command, when it is stopped, and what its balance must come to."""

    overrides: tuple[str, ...] = ()
    minutes: float = 0.0
    """Stopped after so many; 0: not by time."""
    steps: int = 0
    """Stopped at this step; 0: not by steps."""
    aim: float = 1.0
    """MaxVio of every layer stays below this."""
    quiet_from: int = 50
    """The step after which no expert may go without a token for two steps running."""
    last_window: bool = False
    """Judge the last window alone."""


RUNS = {
    "default": Asked(minutes=8),
    "1e8": Asked(("train.tokens=1e8", "keep.checkpoint_every=50"), steps=150),
    "1e7": Asked(("train.tokens=1e7",), aim=1.5, quiet_from=20, last_window=True),
}


def main() -> None:
    """Run, judge, print; the metrics and the verdicts go to the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", default=list(RUNS), metavar="RUN", help=", ".join(RUNS))
    parser.add_argument("--folder", type=Path, default=Path("small"))
    parser.add_argument("--runs-in", type=Path, default=Path("runs"), help="where the runs are kept")
    parser.add_argument("--read", type=Path, help="judge this metrics.jsonl, run nothing")
    parser.add_argument("--aim", type=float, default=1.0)
    parser.add_argument("--quiet-from", type=int, default=50)
    arguments = parser.parse_args()
    if arguments.read:
        asked = Asked(aim=arguments.aim, quiet_from=arguments.quiet_from)
        print(shown("read", judge(rows_of(arguments.read), asked)))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.runs:
        kept = arguments.runs_in / f"small-{name}"
        code = train(RUNS[name], kept, arguments.folder / f"{name}.txt")
        shutil.copy(kept / "metrics.jsonl", arguments.folder / f"{name}.jsonl")
        shutil.copy(kept / "run.toml", arguments.folder / f"{name}.toml")
        verdict = judge(rows_of(kept / "metrics.jsonl"), RUNS[name]) | {"exit": code}
        (arguments.folder / f"{name}.json").write_text(json.dumps(verdict, indent=1))
        print(shown(name, verdict), flush=True)


def train(asked: Asked, kept: Path, log: Path) -> int:
    """`counterflow train small` with these settings until its end or the stop asked for; its exit status."""
    command = [sys.executable, "-m", "counterflow", "train", "small", *asked.overrides, f"keep.folder={kept}"]
    start, stopped = time.monotonic(), False
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.2)
            late = asked.minutes and time.monotonic() - start > 60 * asked.minutes
            if not stopped and (late or (asked.steps and done(kept) >= asked.steps)):
                process.send_signal(signal.SIGINT)
                stopped = True
    return process.returncode


def done(kept: Path) -> int:
    """The last step in a run's metrics; 0 without one."""
    path = kept / "metrics.jsonl"
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The steps of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def judge(rows: list[dict[str, Any]], asked: Asked) -> dict[str, Any]:
    """Balance by layer from the step that counts, and what a step's time is of the whole time."""
    warm = next((row["step"] for row in rows if row["lr"] >= max(each["lr"] for each in rows)), len(rows))
    first = len(rows) - WINDOW if asked.last_window else min(warm, JUDGED_FROM)
    layers = list(rows[0]["load"])
    vio = {layer: [max(row["load"][layer]) * len(row["load"][layer]) / sum(row["load"][layer]) - 1
                   for row in rows if layer in row["load"]] for layer in layers}  # fmt: skip
    worst = {
        layer: max(
            (sum(all_[at : at + WINDOW]) / WINDOW for at in range(first, len(all_) - WINDOW + 1)),
            default=None,
        )
        for layer, all_ in vio.items()
    }
    return {
        "steps": len(rows),
        "warm_up_steps": warm,
        "judged_from": first,
        "worst_window": worst,
        "last_window": {layer: sum(all_[-WINDOW:]) / len(all_[-WINDOW:]) for layer, all_ in vio.items()},
        "missed": [layer for layer, value in worst.items() if value is None or value >= asked.aim],
        "without_token_twice": without_token(rows, asked.quiet_from),
        "loss": [row["loss"] for row in rows[9::20]],
        "time": times(rows),
    }


def without_token(rows: list[dict[str, Any]], after: int) -> list[str]:
    """Experts that got no token in two steps running after this step, as 'layer expert step'."""
    found = []
    for before, row in pairwise(rows):
        if before["step"] <= after:
            continue
        for layer in row["load"].keys() & before["load"].keys():
            pairs = enumerate(zip(before["load"][layer], row["load"][layer]))
            found += [f"{layer} expert {e} step {row['step']}" for e, (a, b) in pairs if a == b == 0]
    return found


def times(rows: list[dict[str, Any]]) -> dict[str, float]:
    """From the end of the first step to the end of the last, evaluation apart, over the sum of the steps between."""
    apart = sum(row.get("evaluation_seconds", 0.0) for row in rows[1:])
    steps = sum(row["step_seconds"] for row in rows[1:])
    whole = rows[-1]["seconds"] - rows[0]["seconds"] - apart
    tokens = rows[-1]["tokens"] - rows[0]["tokens"]
    return {"whole_s": whole, "steps_s": steps, "ratio": whole / steps, "evaluation_s": apart,
            "tokens_per_s_of_steps": tokens / steps, "tokens_per_s_of_all": tokens / (whole + apart)}  # fmt: skip


def shown(name: str, verdict: dict[str, Any]) -> str:
    """A few lines."""

    def by_layer(values: dict[str, float | None]) -> str:
        return " ".join("-" if value is None else f"{value:.2f}" for value in values.values())

    time_ = verdict["time"]
    return "\n".join(
        (
            f"{name}: {verdict['steps']} steps, warm-up {verdict['warm_up_steps']}, judged from step "
            f"{verdict['judged_from']}; {time_['ratio']:.3f} of the steps' time, {time_['tokens_per_s_of_steps']:,.0f} "
            f"tokens/s in steps, {time_['tokens_per_s_of_all']:,.0f} over all",
            f"  worst ten steps by layer  {by_layer(verdict['worst_window'])}",
            f"  last ten steps by layer   {by_layer(verdict['last_window'])}",
            f"  missed: {', '.join(verdict['missed']) or 'none'}; experts without a token twice running: "
            f"{len(verdict['without_token_twice'])} {verdict['without_token_twice'][:4]}",
        )
    )


if __name__ == "__main__":
    main()
