"""What a kernel costs the host: a narrow model's step on few tokens through the executor, over its kernels.

Products and passes of so few, so narrow rows take next to nothing, so the time is that of Python, autograd, the ledger
and the driver, in the mix of parts that a step has. On a GPU kernels are those that `plan.eager` counts, so that a
kernel too many or too few there drops out of the prediction; on a CPU, where their number depends on how many rows
an expert gets, they are watched. Not taken: one bare kernel in a loop, which costs a fifth of one that autograd makes.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from counterflow.benchmark.timing import Bench
from counterflow.comm.channels import Links, LocalChannels
from counterflow.config.model import ModelConfig
from counterflow.config.models import MODELS
from counterflow.model.transformer import Transformer, initialise
from counterflow.pipeline.execute import Executor
from counterflow.pipeline.stage import Stage, StepSettings
from counterflow.plan.eager import eager
from counterflow.plan.job import Job, Layout
from counterflow.plan.stages import stage_plans
from counterflow.plan.work import Workload
from counterflow.schedule import PLAIN_LOOP, SCHEDULES
from counterflow.schedule.transfers import transfers
from counterflow.schedule.words import Op, Part

FEW = 8
"""Tokens of a micro-batch."""
NARROW = replace(
    MODELS["tiny"],
    vocab_size=64,
    hidden_size=64,
    num_layers=3,
    dense_intermediate_size=64,
    moe_intermediate_size=32,
    num_routed_experts=8,
)
"""All kinds of parts: a dense layer, two with experts, a head, and a module with one of its own."""
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
NO_PASS = ("detach", "alias", "_unsafe_view", "empty", "empty_like", "new_empty", "_local_scalar_dense")
FEW_TOUCHED = ("scatter_add_", "gather", "index_add_", "index_put_")
"""Of their operands a few elements a token: their bytes are next to nothing."""
CORE = ("_softmax", "_softmax_backward_data", "triu_", "full")
"""The attention core's, which its own rate pays for."""


class Watcher(TorchDispatchMode):
    """Bytes read and written outside of products, and kernels, of what runs on a CPU meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.kernels = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """An op, counted."""
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if func.is_view or name in NO_PASS:
            return out
        self.kernels += 1
        if name.rstrip("_") in PRODUCTS or name in (*CORE, *FEW_TOUCHED):
            return out
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = sum(_touched(leaf) for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        read = made if name in ("index_select", "index") else sum(map(_touched, given))
        self.bytes += made if name in ("zero_", "fill_", "zeros_like", "ones_like") else made + read
        return out


def _touched(tensor: torch.Tensor) -> int:
    """Bytes of the elements that are there: an expanded axis is read once."""
    shown = tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]
    return shown.numel() * tensor.element_size()


def launch_seconds(bench: Bench) -> float:
    """Of the host for one kernel."""
    executor, step = _narrow(bench)
    step()
    if bench.device.type == "cuda":
        kernels = _counted(executor, bench.settings.precision)
    else:
        with Watcher() as watcher:
            step()
        kernels = watcher.kernels
    return bench.seconds(lambda: step) / kernels


def _narrow(bench: Bench) -> tuple[Executor, Callable[[], object]]:
    """A micro-batch of the narrow model, forward and backward, as a step's executor makes it."""
    model = Transformer(NARROW)
    initialise(model, 0)
    model.to(bench.device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(bench.dtype)
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # pyright: ignore[reportAttributeAccessIssue]
    schedule = SCHEDULES[PLAIN_LOOP](1, 1)
    (stage,) = schedule.held(0)
    stages = {stage: Stage(model, stage_plans(NARROW, 1)[0])}
    executor = Executor(schedule, 0, stages, LocalChannels(Links(schedule, transfers(schedule))))
    samples = torch.randint(NARROW.vocab_size, (1, FEW + 1)).to(bench.device)
    settings = StepSettings(1, FEW, 1.0, mtp_weight=0.1)
    return executor, lambda: executor.run(lambda pipe, mb: samples, settings)


def _counted(executor: Executor, precision: str) -> float:
    """Kernels of the executor's row on a GPU."""
    load = Workload(Job(NARROW, FEW, 1, 1.0, precision), Layout(1, 1))
    return sum(kernels_of(load, NARROW, op) for _, _, op in executor.actions if op is not None)


def kernels_of(load: Workload, model: ModelConfig, op: Op) -> float:
    """Of an op of this system's."""
    moe = op.part in (Part.ATTN, Part.MLP) and model.is_moe(op.layer)
    return eager(load, op.kind, op.part, moe, load(op.kind, op.part, op.layer)).kernels
