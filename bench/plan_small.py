"""Is the planner right about one GPU? `small` under three schedules, predicted first and then trained.

`counterflow bench rates` measures the GPU first. From its file the planner says seconds and bytes of a step; then the
step runs, executor, optimizer and all, on random tokens, and the two stand side by side. On one rank DualPipeV pairs
its two stages' chunks, ZB1P and 1F1B have one stage. So that a miss has a place, the plan's kernels and its seconds of
host and device stand beside those of a step: kernels and device by a profile of one step, the host by the time until
all is issued. Two GPUs are not here: with --rates FILE nothing is trained, and the predictions alone are printed.

python bench/plan_small.py --folder records/DATE-plan-small        (one GPU)
"""

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from counterflow.benchmark.profile import ON_DEVICE, profiled
from counterflow.benchmark.rates import RatesSettings, measure_rates, rates_toml
from counterflow.benchmark.saved import save
from counterflow.benchmark.steps import RandomTokens, seconds_of_steps
from counterflow.comm.mesh import Mesh
from counterflow.config.load import load_run
from counterflow.config.run import RunConfig
from counterflow.plan.cost import Costs, Step, predict
from counterflow.plan.hardware import hardware
from counterflow.plan.job import Layout, job_of
from counterflow.plan.memory import memory
from counterflow.schedule import SCHEDULES as RULES
from counterflow.schedule.words import TRANSFERS, Op
from counterflow.train import lr
from counterflow.train.pipelined import Pipelined
from counterflow.train.provenance import provenance
from counterflow.train.trainer import Trainer

SCHEDULES = ("dualpipev", "zb1p", "1f1b")


def trained(run: RunConfig, device: torch.device, steps: int) -> dict[str, Any]:
    """Seconds of the steps after the first three, the most bytes that were allocated, and where a step's time goes."""
    mesh = Mesh(device=device)
    trainer = Trainer(run, RandomTokens(run), mesh)
    pipelined = Pipelined(run, mesh)
    pipelined.model = trainer.model  # one rank holds the whole
    trainer.pipeline = pipelined
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {"steps_s": seconds_of_steps(trainer, 3, steps)}
    found["bytes"] = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    found |= issued(trainer)
    if device.type == "cuda":
        found |= watched(trainer)
    return found


def issued(trainer: Trainer) -> dict[str, float]:
    """Seconds until the host has issued a step's passes, and until the device has done them; the median of three."""
    train, both = trainer.run.train, []
    wait = torch.cuda.synchronize if trainer.device.type == "cuda" else lambda: None
    for _ in range(3):
        wait()
        start = time.perf_counter()
        trainer.accumulate(train.batch_size, lr.mtp_weight(train, trainer.done))
        host = time.perf_counter() - start
        wait()
        both.append((host, time.perf_counter() - start))
    host, passes = (statistics.median(column) for column in zip(*both))
    return {"host_s": host, "passes_s": passes}


def watched(trainer: Trainer) -> dict[str, float]:
    """Kernels of a step and copies, and how long they keep the device; a profile of one step."""
    found = [event for event in profiled(trainer.step) if event.get("cat") in ON_DEVICE]
    kernels = sum(event["cat"] == "kernel" for event in found)
    return {
        "kernels": kernels,
        "copies": len(found) - kernels,
        "device_s": sum(event["dur"] for event in found) / 1e6,
    }


def planned(step: Step) -> dict[str, float]:
    """Kernels of the step's passes, and seconds of host and device for them."""
    costs = step.costs
    ops = [span.what for span in step.spans if isinstance(span.what, Op)]
    places = [(op.kind, op.part, op.layer) for op in ops if op.part not in TRANSFERS]
    return {
        "kernels": sum(costs.work(*place).kernels for place in places),
        "host_s": sum(costs.issue_s(*place) for place in places),
        "device_s": sum(costs.seconds(*place, False) for place in places) + step.update.adam_s,
        "passes_s": step.pipeline_s,
    }


def file_of(run: RunConfig, device: torch.device, base: str) -> str:
    """The measured hardware."""
    length, size = run.data.sequence_length, run.train.micro_batch_size
    settings = RatesSettings(run.name, length, size, "bf16", device=device.type, base=base)
    return rates_toml(settings, measure_rates(settings))


def compared(run: RunConfig, file: Path, device: torch.device, steps: int) -> dict[str, object]:
    """Prediction, and with steps the measurement, of the run's schedule."""
    name, job = run.parallel.schedule, job_of(run, "bf16")
    costs = Costs(job, Layout(1, 1, 1, run.train.micro_batch_size, name), hardware(file=str(file)))
    step = predict(costs, schedule=RULES[name](1, costs.layout.microbatches(job), None))
    (rank,) = memory(costs, step.schedule, step.plans)
    expected, words = rank.total - rank.reserved - rank.averages - rank.checkpoint, ""
    row: dict[str, Any] = {"schedule": name, "memory": vars(rank)}
    plan = planned(step)
    row["predicted"] = {"step_s": step.seconds, "update_s": step.update.seconds, "bytes": expected, **plan}
    if steps:
        row["measured"] = found = trained(run, device, steps)
        clock, peak = statistics.median(found["steps_s"]), found["bytes"]
        words = f"; measured {clock:.3f} s ({step.seconds / clock - 1:+.0%}), {peak / 1e9:.2f} GB"
        words += f" ({expected / max(peak, 1) - 1:+.0%})"
    print(f"{name:10} predicted {step.seconds:.3f} s, {expected / 1e9:.2f} GB{words}", flush=True)
    for what, value in plan.items():
        seen = row.get("measured", {}).get(what)
        print(
            f"    {what:10} predicted {value:10.3f}" + (f"  measured {seen:10.3f}" if seen else ""),
            flush=True,
        )
    return row


def main() -> None:
    """Measure rates, predict, train, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="small")
    parser.add_argument(
        "--card", default="", help="whose memory and multiprocessors the machine has; empty: by its name"
    )
    parser.add_argument("--schedules", nargs="*", default=SCHEDULES, help="in this order")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--set", nargs="*", default=[], help="further settings, as section.name=value")
    parser.add_argument("--rates", type=Path, help="a hardware file measured before: predict only")
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = asked.microbatches * asked.micro_batch_size
    words = ["train.precision=bf16", f"train.batch_size={batch}", "train.batch_start=0"]
    words += [f"train.micro_batch_size={asked.micro_batch_size}", "train.ema_decay=0", *asked.set]
    text = (
        asked.rates.read_text() if asked.rates else file_of(load_run(asked.model, words), device, asked.card)
    )
    if not asked.rates:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rows: list[dict[str, object]] = []
    raw = {"rows": rows, "settings": words, "machine": provenance()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "card.toml"
        file.write_text(text)
        for name in asked.schedules:
            run = load_run(asked.model, [*words, f"parallel.schedule={name}"])
            rows.append(compared(run, file, device, 0 if asked.rates else asked.steps))
            if asked.folder:
                save(asked.folder / "raw.json", raw)
                (asked.folder / "card.toml").write_text(text)
            gc.collect()  # a trainer refers to itself: the next one's peak would hold this one's tensors
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
