"""How fast is a run under each schedule, and how long do its ranks stand still? Contenders take turns, each anew.

A contender is SCHEDULE:RANKS, or `one` for one process. The bubble of one recorded step stands beside the simulation
fed with that step's own op times; what is left between them is exposed transfers. With torchrun's elastic launch on
the machine at hand: two processes on two cores, or one a GPU.

python bench/pipeline_speed.py tiny --folder records/DATE-pipeline-speed-cpu
python bench/pipeline_speed.py small --contenders one dualpipe:2 1f1b:2 zb1p:2 --words train.batch_size=64 --folder ...
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.progress import track

from counterflow.benchmark.saved import save
from counterflow.config.load import load_run
from counterflow.plan.layout import schedule_of
from counterflow.plan.stages import stage_plans
from counterflow.schedule import trace
from counterflow.schedule.measure import idle
from counterflow.schedule.simulate import makespan
from counterflow.train.provenance import provenance
from counterflow.train.timeline import predict

CHILD = (
    "import sys; from counterflow.config.load import load_run; from counterflow.train.launch import start; \
words = sys.argv[1:]; sys.exit(start(load_run(words[0], words[1:]), words))"
)


def words_of(contender: str, arguments: argparse.Namespace, folder: Path) -> list[str]:
    """The run's overrides."""
    schedule, _, ranks = contender.partition(":")
    tokens = arguments.steps * arguments.batch * load_run(arguments.run, []).data.sequence_length
    layout = ["parallel.pipeline=1"]
    if ranks:
        layout = [f"parallel.pipeline={ranks}", f"parallel.schedule={schedule}"]
    return [
        *layout,
        f"train.tokens={tokens}",
        f"train.batch_size={arguments.batch}",
        "train.batch_start=0",
        f"parallel.record_step={arguments.steps - 1}",
        f"keep.folder={folder}",
        "keep.eval_every=100000",
        "keep.eval_samples=16",
        "keep.checkpoint_every=100000",
        *arguments.words,
    ]


def measure(contender: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run: median step, tokens per second, seconds that each rank stood still, and the recorded step's bubbles."""
    words = words_of(contender, arguments, folder)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, arguments.run, *words], env=os.environ, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{contender}: {done.stderr[-3000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_seconds" in line][arguments.skip : arguments.steps - 2]
    seconds = statistics.median(step["step_seconds"] for step in steps)
    found: dict[str, Any] = {
        "tokens_per_s": steps[0]["tokens_per_s"] * steps[0]["step_seconds"] / seconds,
        "step_seconds": [step["step_seconds"] for step in steps],
    }
    if "pipeline_wait_seconds" in steps[0]:
        waits = zip(*(step["pipeline_wait_seconds"] for step in steps))
        found["wait_seconds"] = [statistics.median(rank) for rank in waits]
        found |= bubbles(load_run(arguments.run, words), folder)
    return found


def bubbles(run: Any, folder: Path) -> dict[str, float]:
    """Of the recorded step, measured and simulated: the step and its mean idle time in it, in seconds."""
    spans = trace.read((folder / "trace.json").read_text())
    micro = run.train.micro_batch_size * run.parallel.data
    schedule = schedule_of(run.parallel, run.train.batch_size // micro)
    plans = stage_plans(run.model, schedule.stages, run.parallel.placement)
    predicted = predict(schedule, {stage: plans[stage.index] for stage in schedule.rank_of}, spans)
    found = {}
    for name, some in (("measured", spans), ("simulated", predicted)):
        found[f"{name}_pipeline_s"] = makespan(some)
        found[f"{name}_idle_s"] = sum(idle(some, schedule.ranks)) / schedule.ranks
    return found


def main() -> None:
    """All contenders in turn, `repeats` times; medians, and all raw numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", default="tiny")
    parser.add_argument("--contenders", nargs="*", default=["one", "dualpipe:2", "1f1b:2"])
    parser.add_argument("--words", nargs="*", default=[], help="more settings, KEY=VALUE")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--skip", type=int, default=5, help="first steps that do not count")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    made = provenance()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.contenders}
    for repeat in track(range(arguments.repeats), "rounds"):
        for contender in arguments.contenders:
            with tempfile.TemporaryDirectory() as folder:
                rows[contender].append(measure(contender, arguments, Path(folder) / "run"))
                timeline = Path(folder) / "run" / "timeline.svg"
                if repeat == 0 and timeline.exists():
                    shutil.copy(timeline, arguments.folder / f"{contender.replace(':', '-')}.svg")
    for contender, some in rows.items():
        speeds = [row["tokens_per_s"] for row in some]
        line = f"{contender:14} {statistics.median(speeds):8.0f} tokens/s ({min(speeds):.0f} to {max(speeds):.0f})"
        if "wait_seconds" in some[0]:
            middle = {
                key: statistics.median(row[key] for row in some) for key in some[0] if key.endswith("_s")
            }
            line += (
                f"; pipeline {middle['measured_pipeline_s']:.3f} s, idle {middle['measured_idle_s']:.3f} s a rank; "
                f"simulated from its ops {middle['simulated_pipeline_s']:.3f} s, {middle['simulated_idle_s']:.3f} s"
            )
        print(line)
    settings = {key: str(value) for key, value in vars(arguments).items()}
    raw = {"settings": settings, "provenance": made, "rows": rows}
    save(arguments.folder / "raw.json", raw)


if __name__ == "__main__":
    main()
