"""Is the planner right about one GPU? `small` under three schedules, predicted first and then trained.

`counterflow bench rates` measures the GPU first. From its file the planner says seconds and bytes of a step; then the
step runs, executor, optimizer and all, on random tokens, and the two stand side by side. On one rank DualPipeV pairs
its two stages' chunks, ZB1P and 1F1B have one stage. Two GPUs are not here: with --rates FILE nothing is trained, and
the predictions alone are printed.

python bench/plan_small.py --folder records/DATE-plan-small        (one GPU)
"""

import argparse
import gc
import statistics
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from counterflow.benchmark.rates import RatesSettings, measure_rates, rates_toml
from counterflow.benchmark.saved import save
from counterflow.benchmark.steps import RandomTokens, seconds_of_steps
from counterflow.comm.mesh import Mesh
from counterflow.config.load import load_run
from counterflow.config.run import RunConfig
from counterflow.plan.cost import Costs, predict
from counterflow.plan.hardware import hardware
from counterflow.plan.job import Layout, job_of
from counterflow.plan.memory import memory
from counterflow.schedule import SCHEDULES as RULES
from counterflow.train.pipelined import Pipelined
from counterflow.train.provenance import provenance
from counterflow.train.trainer import Trainer

SCHEDULES = ("dualpipev", "zb1p", "1f1b")


def trained(run: RunConfig, device: torch.device, steps: int) -> tuple[list[float], int]:
    """Seconds of the steps after the first three, and the most bytes that were allocated."""
    mesh = Mesh(device=device)
    trainer = Trainer(run, RandomTokens(run), mesh)  # pyright: ignore[reportArgumentType]
    pipelined = Pipelined(run, mesh)
    pipelined.model = trainer.model  # one rank holds the whole
    trainer.pipeline = pipelined
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of_steps(trainer, 3, steps)
    return seconds, torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


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
    expected, words = rank.total - rank.reserved - rank.averages, ""
    row: dict[str, object] = {"schedule": name, "memory": vars(rank)}
    row["predicted"] = {"step_s": step.seconds, "update_s": step.update.seconds, "bytes": expected}
    if steps:
        seconds, peak = trained(run, device, steps)
        clock = statistics.median(seconds)
        row["measured"] = {"steps_s": seconds, "bytes": peak}
        words = f"; measured {clock:.3f} s ({step.seconds / clock - 1:+.0%}), {peak / 1e9:.2f} GB"
        words += f" ({expected / max(peak, 1) - 1:+.0%})"
    print(f"{name:10} predicted {step.seconds:.3f} s, {expected / 1e9:.2f} GB{words}", flush=True)
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
        for name in SCHEDULES:
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
