"""From a layout to what starts it: a run's TOML that `counterflow train` accepts, and scripts for torchrun and Slurm.

What training cannot do yet is refused here by name rather than left out of the file: a plan that was priced with it
would not be what runs.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from math import gcd
from typing import Any

from counterflow.config import run as settings
from counterflow.config.backends import BACKENDS, backends
from counterflow.config.load import run_of, to_toml
from counterflow.config.run import Parallel, RunConfig, Train
from counterflow.errors import ConfigError
from counterflow.plan.hardware import Hardware
from counterflow.plan.job import Layout
from counterflow.plan.layout import allowed_microbatches, require_layout

TRAINED_AS = {"projections": "attention"}
"""Recomputation that training has under another name, or a little more of."""


def files(run: RunConfig, layout: Layout, precision: str, hardware: Hardware) -> Mapping[str, str]:
    """File names and their texts.   Fails: ConfigError where training cannot run the layout."""
    ready = configured(run, layout, precision, hardware)
    text = to_toml(ready)
    require_layout(run_of(tomllib.loads(text)))
    note = f"# {layout}: written by counterflow plan.\n"
    if ready.train.batch_start != run.train.batch_start:
        note += f"# train.batch_start was {run.train.batch_start}, with which this layout cannot begin.\n"
    per_node = min(layout.gpus, hardware.card.gpus_per_node)
    nodes = -(-layout.gpus // per_node)
    if layout.gpus % per_node:
        raise ConfigError(
            f"{layout.gpus} ranks on nodes of {per_node} cards; launchers start as many on each: take "
            f"{nodes * per_node} GPUs, or set card.gpus_per_node in a hardware file."
        )
    asked = "--cpus-per-task=1" if hardware.is_cpu else f"--gpus-per-node={per_node}"
    return {
        "run.toml": note + text,
        "torchrun.sh": TORCHRUN.format(nodes=nodes, per_node=per_node),
        "slurm.sh": SLURM.format(name=run.name, nodes=nodes, per_node=per_node, asked=asked),
    }


TORCHRUN = """#!/bin/sh
# Start this on each of {nodes} nodes, with HEAD the name of one of them that the others reach.
exec torchrun --nnodes {nodes} --nproc-per-node {per_node} --rdzv-backend c10d \\
  --rdzv-endpoint "${{HEAD:-localhost}}:29500" -m counterflow train "$(dirname "$0")/run.toml" "$@"
"""
SLURM = """#!/bin/sh
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={per_node}
#SBATCH {asked}
#SBATCH --requeue
# Submit this in its own folder: sbatch slurm.sh
exec srun counterflow train run.toml "$@"
"""


def configured(run: RunConfig, layout: Layout, precision: str, hardware: Hardware) -> RunConfig:
    """The run in a layout.   Fails: ConfigError."""
    if precision not in settings.PRECISIONS:
        raise ConfigError(
            f"training multiplies in {', '.join(settings.PRECISIONS[1:])}; plan with --precision bf16."
        )
    spread = replace(
        run.parallel,
        pipeline=layout.pipeline,
        data=layout.data,
        schedule=layout.schedule,
        stages_per_rank=layout.stages_per_rank or 0,
        expert=layout.expert,
        **_dispatch(run.parallel, layout, hardware),
    )
    recompute = TRAINED_AS.get(layout.recompute, layout.recompute)
    # What was planned is a number of tokens: a bound in minutes would end the run before them.
    train = replace(run.train, micro_batch_size=layout.micro_batch, recompute=recompute, minutes=0.0)
    train = replace(train, precision=precision)
    return replace(run, parallel=spread, train=replace(train, batch_start=_start(train, spread)))


def _dispatch(parallel: Parallel, layout: Layout, hardware: Hardware) -> dict[str, Any]:
    """The run's own backend; between nodes two hops, as the plan was priced, on as many multiprocessors."""
    card, backend = hardware.card, parallel.dispatch
    if layout.expert == 1:
        return {"dispatch": Parallel.dispatch, "node_ranks": 0, "multiprocessors": parallel.multiprocessors}
    taken = min(hardware.communication_multiprocessors, card.multiprocessors)
    found = {"dispatch": backend, "node_ranks": 0, "multiprocessors": parallel.multiprocessors or taken}
    on_node = gcd(min(layout.gpus, card.gpus_per_node), layout.expert)
    by_node = backends(lambda row: row.by_node)[0]
    if BACKENDS[backend].one_host and on_node < layout.expert:
        raise ConfigError(
            f"parallel.dispatch is {backend}, which joins the GPUs of one host, and {layout} shares experts among "
            f"{layout.expert} ranks on nodes of {card.gpus_per_node}; set parallel.dispatch={by_node}, or plan with "
            f"--expert {on_node}."
        )
    if backend == Parallel.dispatch and on_node < layout.expert:
        backend = by_node
    if BACKENDS[backend].by_node:
        return {**found, "dispatch": backend, "node_ranks": on_node}
    return found


def _start(train: Train, parallel: Parallel) -> int:
    """The first batch from the wished one on that the layout can run; 0 where there is no ramp."""
    multiple, least = allowed_microbatches(parallel)
    unit = train.micro_batch_size * parallel.data
    first = max(least * unit, -(-train.batch_start // (multiple * unit)) * multiple * unit)
    return min(first, train.batch_size) if train.batch_start else 0
