"""Is the planner right about what this machine can run? tiny on two CPU processes, predicted and then trained.

First both processes measure at once what the planner needs (products, passes, attention, launches, the link), each with
one thread, as training has them; then the step and the memory are predicted from that; then the run is trained for some
steps under each schedule. Rates are means and so is what is predicted; the median step is held against it.

python bench/plan_tiny.py --steps 12 --folder records/DATE-plan/tiny
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from counterflow.config.load import load_run
from counterflow.kernels.attention import attention
from counterflow.kernels.swiglu import swiglu
from counterflow.plan.cost import Costs, predict
from counterflow.plan.hardware import hardware
from counterflow.plan.job import Layout, job_of
from counterflow.plan.memory import memory
from counterflow.train import loop
from counterflow.train.provenance import provenance

SCHEDULES = ("dualpipe", "zb1p", "1f1b")
LINK = 4 << 20
"""Floats that are summed over both processes."""


def mean(act: Callable[[], object], least_s: float = 0.5) -> float:
    """Mean seconds of as many runs as fill some time: what else the machine does is in it, as it is in training."""
    act()
    start, runs = time.perf_counter(), 0
    while time.perf_counter() - start < least_s or runs < 3:
        act()
        runs += 1
    return (time.perf_counter() - start) / runs


def rates(precision: str) -> dict[str, float]:
    """What one process with one thread reaches beside the other, and what it holds before it trains."""
    loop.keep_freed_memory()
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    x, weight = torch.randn(1024, 256).to(kind), torch.randn(512, 256).to(kind)
    product = 2 * 1024 * 256 * 512 / mean(lambda: x @ weight.t())
    inner, gates = torch.randn(4096, 256).to(kind), torch.ones(4096)
    passes = (
        4096 * 128 * (4 + 2) * x.element_size() / mean(lambda: swiglu(inner, gates))
    )  # as plan.work counts them
    q, k, v = (torch.randn(4, 4, 256, 64).to(kind) for _ in range(3))
    core = 1024 * 4 * (64 + 64) * 256 / mean(lambda: attention(q, k, v, 0.125))
    small = torch.zeros(16)
    launch = mean(lambda: [small.add_(1.0) for _ in range(100)]) / 100
    flat = torch.zeros(LINK)
    link = (
        LINK * 4 / mean(lambda: dist.all_reduce(flat), 0.0)
    )  # half there and half back, for a sum and a gather
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "product": product,
        "passes": passes,
        "core": core,
        "launch": launch,
        "link": link,
        "resident": resident,
    }


def _rank(rank: int, precision: str, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29571", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    dist.barrier()
    found = rates(precision)
    (Path(folder) / f"rates-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def hardware_toml(found: dict[str, float], precision: str) -> str:
    """A hardware file of the measured rates."""
    return f"""base = "cpu"
[card]
{precision}_flops = {found["product"]:.4g}
memory_bytes_per_s = {found["passes"]:.4g}
nvlink_bytes_per_s = {found["link"]:.4g}
launch_s = {found["launch"]:.3g}
reserved_bytes = {found["resident"]:.4g}
source = "bench/plan_tiny.py"
[fabric]
bytes_per_s = {found["link"]:.4g}
[efficiencies]
{precision}_product = 1.0
attention = {min(1.0, found["core"] / found["product"]):.4g}
memory = 1.0
nvlink = 1.0
collective = 1.0
"""


def trained(schedule: str, steps: int, folder: str, precision: str) -> tuple[list[float], float]:
    """Seconds of the steps after the first two, and the largest process's peak bytes."""
    words = [
        f"parallel.schedule={schedule}",
        f"train.tokens={steps * 16 * 256}",
        f"train.precision={precision}",
    ]
    words += [f"keep.folder={folder}/{schedule}", "keep.resume=never", "keep.checkpoint_every=1000"]
    words += [f"parallel.record_step={10 * steps}"]
    subprocess.run([sys.executable, "-m", "counterflow", "train", "tiny", *words], check=True, timeout=500)
    lines = (Path(folder) / schedule / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    seconds = [line["step_seconds"] for line in found if "step_seconds" in line][2:]
    return seconds, max(line.get("memory_bytes", 0) for line in found)


def main() -> None:
    """Measure, predict, train, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    run, rows = load_run("tiny"), []
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (arguments.precision, folder), nprocs=2)
        both = [json.loads((Path(folder) / f"rates-{rank}.json").read_text()) for rank in (0, 1)]
        found = {name: statistics.mean(one[name] for one in both) for name in both[0]}
        text = hardware_toml(found, arguments.precision)
        file = Path(folder) / "cpu.toml"
        file.write_text(text)
        print(text)
        for schedule in SCHEDULES:
            costs = Costs(
                job_of(run, arguments.precision), Layout(2, 1, 1, 4, schedule), hardware(file=str(file))
            )
            step = predict(costs)
            peak = max(one.total for one in memory(costs, step.schedule, step.plans))
            seconds, resident = trained(schedule, arguments.steps, folder, arguments.precision)
            row = {"schedule": schedule, "predicted_s": step.seconds, "measured_s": seconds}
            rows.append(row | {"predicted_bytes": peak, "measured_bytes": resident})
            median = statistics.median(seconds)
            error, more = step.seconds / median - 1, peak / resident - 1
            print(
                f"{schedule:9} step predicted {step.seconds:.3f} s, measured {median:.3f} s (median): {error:+.0%};",
                end=" ",
            )
            print(f"memory {peak / 1e6:.0f} of {resident / 1e6:.0f} MB: {more:+.0%}", flush=True)
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        (arguments.folder / "cpu.toml").write_text(text)
        raw = {"rates": both, "rows": rows, "machine": provenance(), "load": os.getloadavg()}
        (arguments.folder / "raw.json").write_text(json.dumps(raw, indent=1) + "\n")


if __name__ == "__main__":
    main()
