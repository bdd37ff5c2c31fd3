"""Is the planner right about what this machine can run? tiny on two CPU processes, predicted and then trained.

First both processes measure at once what the planner needs (products, passes, attention, launches, the link), each with
one thread, as training has them; then step and memory are predicted from that; then the run is trained under each
schedule. Computation is timed in processor seconds, in the rates as in training, so that other work on the machine
hardly enters: a long run less a short one leaves the steps between them. Steps by the clock are shown beside, with the
machine's load, since on a busy machine they say more of it than of the planner.

python bench/plan_tiny.py --folder records/DATE-plan/tiny
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


def mean(act: Callable[[], object], least_s: float = 0.4) -> float:
    """Mean processor seconds of as many runs as fill some time."""
    act()
    start, runs = time.process_time(), 0
    while time.process_time() - start < least_s:
        act()
        runs += 1
    return (time.process_time() - start) / runs


def exchanged(act: Callable[[], object], repeats: int = 5) -> float:
    """Mean seconds by the clock; both processes do it as often."""
    start = time.perf_counter()
    for _ in range(repeats):
        act()
    return (time.perf_counter() - start) / repeats


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
        LINK * 4 / exchanged(lambda: dist.all_reduce(flat))
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


def trained(schedule: str, steps: int, folder: str, precision: str) -> tuple[float, list[float], float]:
    """Processor seconds of all processes, seconds of the steps after the first two, largest process's peak bytes."""
    words = [
        f"parallel.schedule={schedule}",
        f"train.tokens={steps * 16 * 256}",
        f"train.precision={precision}",
    ]
    words += [f"keep.folder={folder}/{schedule}", "keep.resume=never", "keep.checkpoint_every=1000"]
    words += [f"parallel.record_step={10 * steps}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "counterflow", "train", "tiny", *words]
    subprocess.run(command, check=True, timeout=500, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = (Path(folder) / schedule / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    seconds = [line["step_seconds"] for line in found if "step_seconds" in line][2:]
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, seconds, max(line.get("memory_bytes", 0) for line in found)


def compared(
    schedule: str, costs: Costs, steps: tuple[int, int], folder: str, precision: str
) -> dict[str, object]:
    """Prediction and measurement of a schedule."""
    step = predict(costs)
    peak = max(one.total for one in memory(costs, step.schedule, step.plans))
    busy = sum(span.end - span.start for span in step.spans) + step.schedule.ranks * step.update.adam_s
    short, _, _ = trained(schedule, steps[0], folder, precision)
    whole, seconds, resident = trained(schedule, steps[1], folder, precision)
    used = (whole - short) / (steps[1] - steps[0])
    clock = statistics.median(seconds)
    print(
        f"{schedule:9} processor predicted {busy:.3f} s a step, measured {used:.3f}: {busy / used - 1:+.0%}; clock "
        f"{step.seconds:.3f} and {clock:.3f}: {step.seconds / clock - 1:+.0%}; memory {peak / 1e6:.0f} and "
        f"{resident / 1e6:.0f} MB: {peak / resident - 1:+.0%}",
        flush=True,
    )
    predicted = {"processor_s": busy, "step_s": step.seconds, "bytes": peak}
    measured = {"processor_s": used, "steps_s": seconds, "bytes": resident}
    return {"schedule": schedule, "predicted": predicted, "measured": measured, "load": os.getloadavg()}


def main() -> None:
    """Measure, predict, train, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, nargs=2, default=(3, 13), help="of the short and of the long run"
    )
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    job = job_of(load_run("tiny"), arguments.precision)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (arguments.precision, folder), nprocs=2)
        both = [json.loads((Path(folder) / f"rates-{rank}.json").read_text()) for rank in (0, 1)]
        text = hardware_toml(
            {name: statistics.mean(one[name] for one in both) for name in both[0]}, arguments.precision
        )
        file = Path(folder) / "cpu.toml"
        file.write_text(text)
        print(text)
        rows = []
        for schedule in SCHEDULES:
            costs = Costs(job, Layout(2, 1, 1, 4, schedule), hardware(file=str(file)))
            rows.append(compared(schedule, costs, tuple(arguments.steps), folder, arguments.precision))
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        (arguments.folder / "cpu.toml").write_text(text)
        raw = {"rates": both, "rows": rows, "machine": provenance()}
        (arguments.folder / "raw.json").write_text(json.dumps(raw, indent=1) + "\n")


if __name__ == "__main__":
    main()
