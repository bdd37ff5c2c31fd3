"""The planner's answers as they stand in the record: published runs, sizes, schedules, the search, and its time.

python bench/plan_record.py records/DATE-plan
"""

import contextlib
import io
import json
import platform
import sys
import time
from pathlib import Path

from counterflow.cli import main as counterflow
from counterflow.config.models import MODELS
from counterflow.plan.hardware import hardware
from counterflow.plan.job import Job
from counterflow.plan.search import search

REPORT = ["v3-671b", "--precision", "fp8", "--gpus", "2048"]
ANSWERS = {
    "published.txt": ["--published"],
    "scale.txt": [*REPORT[:3], "--scale", "--svg", "{folder}/scale.svg"],
    "schedules.txt": [*REPORT, "--schedules", "--expert", "64", "train.batch_size=16384"],
    "search.txt": [*REPORT, "--json", "{folder}/search.json"],
    "report-layout.txt": [
        *REPORT,
        *("--pipeline", "16", "--expert", "64", "--schedule", "dualpipe", "--micro-batch", "1"),
        *("--recompute", "projections", "--html", "{folder}/report-layout.html"),
    ],
}
SIZES = (2048, 16384, 98304)


def main() -> None:
    """Write every answer, then time the search at three sizes."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, words in ANSWERS.items():
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            code = counterflow(["plan", *(word.format(folder=folder) for word in words)])
        assert code == 0, f"{name}: exit code {code}"
        (folder / name).write_text(said.getvalue())
    rows = []
    for gpus in SIZES:
        job = Job(MODELS["v3-671b"], 4096, 15360 * max(1, gpus // 2048), 14.8e12, "fp8")
        start = time.process_time(), time.perf_counter()
        found = search(job, hardware("h800"), gpus)
        cpu, wall = time.process_time() - start[0], time.perf_counter() - start[1]
        layouts = found.fitting + sum(found.fell_out.values())
        rows.append(
            {"gpus": gpus, "layouts": layouts, "fitting": found.fitting, "cpu_s": cpu, "wall_s": wall}
        )
        print(rows[-1])
    (folder / "search-time.json").write_text(
        json.dumps({"python": platform.python_version(), "rows": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
