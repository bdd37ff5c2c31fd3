"""Is the planner right about what this machine can run? tiny on two CPU processes, predicted and then trained.

`counterflow bench rates` measures both processes at once; step, ops and memory are predicted from its file alone; then
two processes train the real thing under each schedule. Steps are told by the clock and in processor seconds, into which
other work on the machine enters less; ops by the clock; memory as the resident bytes that are in use, with the resident
ones phase by phase beside them: what the heap keeps between blocks of many sizes is not planned for. Best run alone:
`nice -n -10 python bench/plan_tiny.py --folder records/DATE-plan-tiny`.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch

from counterflow.benchmark.processes import on_processes
from counterflow.benchmark.rates import (
    RatesSettings,
    free_heap_bytes,
    measure_rates,
    most_in_use,
    rates_toml,
    resident_bytes,
)
from counterflow.benchmark.saved import save
from counterflow.comm.mesh import Mesh
from counterflow.config.load import load_run
from counterflow.config.run import RunConfig
from counterflow.kernels.memory import keep_freed_memory
from counterflow.pipeline.record import Recorder
from counterflow.plan.cost import Costs, Step, predict
from counterflow.plan.hardware import hardware
from counterflow.plan.job import Layout, job_of
from counterflow.plan.memory import Memory, memory
from counterflow.schedule.words import TRANSFERS, Op, Span
from counterflow.train.loop import open_samples
from counterflow.train.provenance import provenance
from counterflow.train.trainer import Trainer

SCHEDULES = ("dualpipe", "zb1p", "1f1b")
WARM_UP = 3
"""Steps that are not counted: products are compiled, memory grows."""


def _rank(mesh: Mesh, run: RunConfig, steps: int, folder: str) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    phases, clock, used = {"imports and group": resident_bytes()}, [], []
    samples = open_samples(run, mesh)
    phases["text"] = resident_bytes()
    trainer = Trainer(run, samples, mesh)
    phases["model and optimizer"] = resident_bytes()
    for number in range(WARM_UP + steps):
        if number == 1:
            phases["first step"] = resident_bytes("VmHWM")
        mesh.barrier()
        before = time.perf_counter(), time.process_time()
        trainer.step()
        clock.append(time.perf_counter() - before[0])
        used.append(time.process_time() - before[1])
    phases["peak"] = resident_bytes("VmHWM")
    phases["free in the heap between steps"] = free_heap_bytes()
    recorder = Recorder(torch.device("cpu"))
    trainer.step(recorder)
    phases["in use"] = most_in_use(trainer.step)
    ops = [(op.kind, op.part, op.layer, seconds) for op, seconds in ops_of(recorder.spans())]
    found = {
        "phases": phases,
        "clock_s": clock[WARM_UP:],
        "processor_s": used[WARM_UP:],
        "ops": ops,
    }
    (Path(folder) / f"{mesh.rank}.json").write_text(json.dumps(found))


def ops_of(spans: Iterable[Span]) -> list[tuple[Op, float]]:
    """Each op with its seconds."""
    return [(span.what, span.end - span.start) for span in spans if isinstance(span.what, Op)]


def trained(run: RunConfig, steps: int) -> list[dict]:
    """What each of the two ranks measured."""
    with tempfile.TemporaryDirectory() as folder:
        on_processes(_rank, run.parallel, "cpu", run, steps, folder)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in (0, 1)]


def by_op(step: Step, ranks: list[dict]) -> dict[str, dict[str, float]]:
    """Seconds of a step in each kind of op on both ranks, predicted and measured."""
    model = step.costs.job.model
    table: dict[str, dict[str, float]] = defaultdict(lambda: {"predicted_s": 0.0, "measured_s": 0.0})

    def name(kind: str, part: str, layer: int) -> str:
        return f"{part} {kind}" + (" dense" if part in ("ATTN", "MLP") and not model.is_moe(layer) else "")

    for op, seconds in ops_of(step.spans):
        if op.part not in TRANSFERS:
            table[name(op.kind, op.part, op.layer)]["predicted_s"] += seconds
    for rank in ranks:
        for kind, part, layer, seconds in rank["ops"]:
            if part not in TRANSFERS:
                table[name(kind, part, layer)]["measured_s"] += seconds
    return dict(table)


def compared(run: RunConfig, costs: Costs, steps: int) -> dict[str, object]:
    """Prediction and measurement of a schedule."""
    step = predict(costs)
    expected: Memory = max(memory(costs, step.schedule, step.plans), key=lambda one: one.total)
    busy = sum(span.end - span.start for span in step.spans) + step.schedule.ranks * step.update.adam_s
    ranks = trained(run, steps)
    clock = statistics.median(max(both) for both in zip(*(rank["clock_s"] for rank in ranks)))
    used = statistics.median(sum(both) for both in zip(*(rank["processor_s"] for rank in ranks)))
    planned = expected.total - expected.checkpoint  # none is written here
    peak, in_use = (max(rank["phases"][name] for rank in ranks) for name in ("peak", "in use"))
    print(
        f"{costs.layout.schedule:9} clock {step.seconds:.3f} s predicted, {clock:.3f} measured: "
        f"{step.seconds / clock - 1:+.0%}; processors {busy:.3f} and {used:.3f}: {busy / used - 1:+.0%}; memory "
        f"{planned / 1e6:.0f} and {in_use / 1e6:.0f} MB in use: {planned / in_use - 1:+.0%}, "
        f"{peak / 1e6:.0f} resident",
        flush=True,
    )
    for name, row in by_op(step, ranks).items():
        print(
            f"    {name:14} {1e3 * row['predicted_s']:7.1f} ms predicted {1e3 * row['measured_s']:7.1f} measured"
        )
    predicted = {
        "step_s": step.seconds,
        "processor_s": busy,
        "bytes": planned,
        "memory": vars(expected),
    }
    measured = {
        "step_s": clock,
        "processor_s": used,
        "bytes": in_use,
        "resident_bytes": peak,
        "ranks": [_short(rank) for rank in ranks],
    }
    ops = by_op(step, ranks)
    load = os.getloadavg()
    return {
        "schedule": costs.layout.schedule,
        "predicted": predicted,
        "measured": measured,
        "ops": ops,
        "load": load,
    }


def _short(rank: dict) -> dict:
    return {name: value for name, value in rank.items() if name != "ops"}


def main() -> None:
    """Measure, predict, train, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10, help="that are counted, of each schedule")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--schedules", nargs="*", default=SCHEDULES)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    settings = RatesSettings("tiny", 256, 4, asked.precision, processes=2, device="cpu")
    text = rates_toml(settings, measure_rates(settings))
    print(text)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cpu.toml"
        file.write_text(text)
        for name in asked.schedules:
            words = [f"parallel.schedule={name}", f"train.precision={asked.precision}", "train.device=cpu"]
            run = load_run("tiny", words)
            costs = Costs(job_of(run), Layout(2, 1, 1, 4, name), hardware(file=str(file)))
            rows.append(compared(run, costs, asked.steps))
    if asked.folder:
        save(asked.folder / "raw.json", {"rows": rows, "machine": provenance()})
        (asked.folder / "cpu.toml").write_text(text)


if __name__ == "__main__":
    main()
