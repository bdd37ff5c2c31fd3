"""The same run with one thing changed: what balancing does to load and loss, what MTP does to the main loss.

Variants differ by overrides alone and see the same samples in the same order, seed by seed; every run is
measured on the whole held-out part. Nothing is kept but numbers, so a study needs no folders.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from counterflow.comm.mesh import Mesh
from counterflow.config.load import load_run
from counterflow.config.run import Parallel, RunConfig
from counterflow.data.loader import Samples
from counterflow.progress import Progress
from counterflow.train import lr
from counterflow.train.loop import evaluate, resolve
from counterflow.train.trainer import Trainer

BALANCE: Mapping[str, Sequence[str]] = {
    "none": ["train.bias_speed=0", "model.balance.sequence_alpha=0"],
    "auxiliary": [
        "train.bias_speed=0",
        "model.balance.sequence_alpha=0",
        "model.balance.auxiliary=switch",
        "model.balance.auxiliary_alpha=0.01",
    ],
    "bias": [],
}
"""No balancing; the conventional loss; the bias with the sequence-wise loss (the run's own settings)."""

MTP: Mapping[str, Sequence[str]] = {"off": ["model.num_mtp_modules=0"], "on": []}


def study(
    base: str,
    overrides: Sequence[str],
    variants: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    jobs: int = 1,
    tell: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """One row a variant and seed: held-out loss and bits per byte, MaxVio over the run, and the course of both.

    `jobs` runs go at a time, each in a process of its own.
    """
    tasks = [
        (name, seed, load_run(base, [*overrides, *changes, f"train.seed={seed}"]))
        for seed in seeds
        for name, changes in variants.items()
    ]
    rows = []
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for (name, seed, _), measured in zip(tasks, pool.map(measure, [run for _, _, run in tasks])):
            rows.append({"variant": name, "seed": seed, **measured})
            tell(
                f"seed {seed} {name:10} held-out {measured['held_out_bpb']:.4f} bits per byte, MaxVio "
                f"{measured['max_vio']:.2f} (worst layer {measured['max_vio_worst']:.2f}), dead experts "
                f"{measured['dead_experts']}, {measured['seconds']:.0f} s"
            )
    return rows


def measure(run: RunConfig) -> dict[str, Any]:
    """Train a run without a folder; its final measurements, MaxVio the mean of the last tenth of steps."""
    run = resolve(dataclasses.replace(run, parallel=Parallel()))
    run = dataclasses.replace(run, train=lr.in_tokens(run.train, run.data.sequence_length))
    samples = Samples(run.data, run.model.vocab_size, run.train.seed, quiet=True)
    trainer, start, course = (
        Trainer(run, samples, Mesh(device=torch.device(run.train.device))),
        time.perf_counter(),
        [],
    )
    while trainer.sample < trainer.total:
        values = trainer.step()
        course.append(values)
    tail = course[-max(1, len(course) // 10) :]
    summed = {
        layer: [sum(step["load"][layer][e] for step in tail) for e in range(run.model.num_routed_experts)]
        for layer in tail[0]["load"]
    }
    return {
        **evaluate(trainer, None, Progress("", shown=False)),
        "max_vio": statistics.mean(step["max_vio"] for step in tail),
        "max_vio_worst": statistics.mean(step["max_vio_worst"] for step in tail),
        "dead_experts": sum(count == 0 for layer in summed.values() for count in layer),
        "final_load": summed,
        "steps": trainer.steps,
        "seconds": time.perf_counter() - start,
        "loss_course": [step["loss"] for step in course],
        "max_vio_course": [step["max_vio"] for step in course],
        "config": dataclasses.asdict(run),
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table: mean and standard deviation over seeds of each variant."""
    lines = [f"{'variant':12}{'runs':>5}{'bits per byte':>18}{'MaxVio':>16}{'worst layer':>16}{'dead':>6}"]
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name]
        cells = "".join(
            f"{mean_and_spread([row[key] for row in mine], digits):>{width}}"
            for key, digits, width in (("held_out_bpb", 4, 18), ("max_vio", 2, 16), ("max_vio_worst", 2, 16))
        )
        lines.append(
            f"{name:12}{len(mine):>5}{cells}{sum(row['dead_experts'] for row in mine) / len(mine):>6.1f}"
        )
    return "\n".join(lines)


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """mean ± standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"
