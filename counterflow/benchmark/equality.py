"""One training step under a schedule against the plain loop: the same losses, the same gradients.

All ranks run in this process, one executor each, taken in turns, over channels that assert their order. The reference
is the model's own forward and autograd, micro-batch by micro-batch, summed per pipe and data rank as the pipeline sums,
so a weight that one stage alone uses must come out bit for bit. Embedding and head are used at both ends of a model;
where both ends share an accumulator the order of sums is another, and a bound on rounding holds instead.
"""

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from counterflow.comm.channels import Links, LocalChannels
from counterflow.config.backends import BACKENDS, backends
from counterflow.config.model import ModelConfig
from counterflow.config.models import MODELS
from counterflow.config.run import Parallel
from counterflow.model.debts import Ledger, main_grad
from counterflow.model.transformer import Transformer, initialise
from counterflow.pipeline.execute import Executor
from counterflow.pipeline.stage import Stage, StepSettings, Sums
from counterflow.plan.layout import schedule_of
from counterflow.plan.stages import stage_plans, without_mtp
from counterflow.schedule import SCHEDULES
from counterflow.schedule.measure import held
from counterflow.schedule.transfers import transfers
from counterflow.schedule.words import Plan, Schedule

Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """A step to run both ways."""

    schedule: str
    ranks: int
    microbatches: int
    """Of each data rank, both pipes together."""
    data_ranks: int = 1
    micro_batch_size: int = 1
    length: int = 12
    mtp_weight: float = 0.3
    placement: str = ""
    recompute: str = "none"
    stages_per_rank: int | None = None
    expert: int = 1
    """Data ranks that share experts; above 1 it is `equality_experts` that compares."""
    dispatch: str = Parallel.dispatch
    node_ranks: int = 0


SMALL = replace(
    MODELS["tiny"],
    vocab_size=61,
    hidden_size=32,
    num_heads=2,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=12,
    q_lora_rank=20,
    kv_lora_rank=12,
    dense_intermediate_size=40,
    moe_intermediate_size=12,
    num_routed_experts=8,
    num_experts_per_token=3,
    max_positions=16,
    initializer_std=0.1,
)
"""A model of every feature and odd sizes, small enough for sixteen ranks on a laptop."""


def small_model(stages: int, depth: int, seed: int = 0, **sizes: Any) -> Transformer:
    """A random model with a unit for every one of `stages` stages, gains and biases off their starting values."""
    model = Transformer(replace(SMALL, num_layers=num_layers(stages), num_mtp_modules=depth, **sizes))
    initialise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.dim() == 1:
                value.add_(
                    torch.randn(value.shape, generator=generator), alpha=0.05 if "bias" in name else 0.2
                )
    return model


def num_layers(stages: int) -> int:
    """Of a small model with a unit for every stage."""
    return max(3, stages - 2)


ANYWHERE = backends(lambda row: not row.device)
"""Backends of every device."""


def draw(generator: random.Random, backends: Sequence[str] = ANYWHERE) -> tuple[Layout, int]:
    """A random layout and MTP depth: often of four ranks or more, with MTP, uneven plans, recomputation; where experts
    are shared, by one of `backends`."""
    name = generator.choice(list(SCHEDULES))
    ranks = generator.choice((2, 2, 2, 4, 4, 6, 8))
    depth = generator.choice((0, 0, 1, 1, 2))
    stages = SCHEDULES[name](ranks, 4 * ranks).stages
    allowed = SCHEDULES[name].allowed(ranks)
    microbatches = max(ranks, allowed.start) + generator.randrange(3) * max(2, allowed.step)
    data_ranks = generator.choice((1, 1, 2, 3))
    layers = num_layers(stages)
    placement = random_placement(generator, stages, layers, depth) if generator.random() < 0.5 else ""
    layout = Layout(
        name,
        ranks,
        microbatches,
        data_ranks,
        micro_batch_size=generator.choice((1, 2)),
        length=generator.choice((5, 8, 12)),
        mtp_weight=generator.choice((0.3, 0.3, 0.3, 0.0)),
        placement=placement,
        recompute=generator.choice(("none", "attention")),
    )
    return with_shared_experts(generator, layout, backends) if generator.random() < 0.35 else layout, depth


def with_shared_experts(generator: random.Random, layout: Layout, backends: Sequence[str]) -> Layout:
    """The layout with two or four data ranks that share experts, by one of `backends`."""
    expert = generator.choice((2, 2, 4))
    blocks = generator.choice((1, 1, 2)) if expert == 2 else 1
    dispatch = generator.choice(backends)
    node = generator.choice([size for size in (1, 2, 4) if expert % size == 0])
    return replace(
        layout,
        data_ranks=expert * blocks,
        expert=expert,
        dispatch=dispatch,
        node_ranks=node if BACKENDS[dispatch].by_node else 0,
    )


def random_placement(generator: random.Random, stages: int, layers: int, depth: int) -> str:
    """The units of a model of so many layers and MTP modules, cut anywhere."""
    words = ["embed", *["1"] * layers, "head", *["1mtp"] * depth]
    cuts = sorted(generator.sample(range(1, len(words)), stages - 1))
    return " | ".join(" ".join(words[a:b]) for a, b in zip([0, *cuts], [*cuts, len(words)]))


def samples_of(layout: Layout, config: ModelConfig, seed: int) -> Tensor:
    """The step's samples, (data ranks, micro-batches, micro-batch size, length + 1)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.data_ranks, layout.microbatches, layout.micro_batch_size, layout.length + 1)
    return torch.randint(config.vocab_size, shape, generator=generator)


def with_accumulators(model: Transformer) -> Transformer:
    """The model with a zero fp32 (or wider) accumulator at every weight."""
    for parameter in model.parameters():
        wide = torch.promote_types(parameter.dtype, torch.float32)
        parameter.main_grad = torch.zeros_like(parameter, dtype=wide)  # pyright: ignore[reportAttributeAccessIssue]
        parameter.grad = None
    return model


def settings_of(layout: Layout) -> StepSettings:
    """Scales of the global batch."""
    batch = layout.data_ranks * layout.microbatches * layout.micro_batch_size
    return StepSettings(
        layout.micro_batch_size, layout.length, 1.0 / (batch * layout.length), layout.mtp_weight
    )


def run_plain(model: Transformer, samples: Tensor, settings: StepSettings) -> tuple[Gradients, Sums]:
    """Gradients and sums of the given micro-batches, (M, B, S + 1), in order, by the plain loop."""
    model = with_accumulators(copy.deepcopy(model))
    sums = Sums()
    for micro in samples:
        losses = model(micro, settings.scale, settings.mtp_weight, Ledger())
        losses.total.backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                main_grad(parameter).add_(parameter.grad)
                parameter.grad = None
        for depth, nll in enumerate(losses.nll):
            sums.nll[depth] = sums.nll[depth] + nll if depth in sums.nll else nll
        sums.balance.append(losses.balance)
        for row, counts in enumerate(losses.counts):
            index = row + model.config.num_dense_layers
            sums.counts[index] = sums.counts[index] + counts if index in sums.counts else counts
    return {name: main_grad(p) for name, p in model.named_parameters()}, sums


@dataclass(frozen=True)
class RankResult:
    """What one rank of a pipeline has after a step."""

    rank: int
    gradients: Gradients
    sums: Sums
    executor: Executor


def run_pipeline(
    model: Transformer, samples: Tensor, settings: StepSettings, schedule: Schedule, plans: tuple[Plan, ...]
) -> list[RankResult]:
    """One data rank's micro-batches, (M, B, S + 1), through all ranks of a schedule."""
    links = Links(schedule, transfers(schedule))
    first = [sum(schedule.microbatches[:pipe]) for pipe in range(schedule.pipes)]
    results, running = [], []
    for rank in range(schedule.ranks):
        own = with_accumulators(copy.deepcopy(model))
        stages = {stage: Stage(own, plans[stage.index]) for stage in schedule.held(rank)}
        executor, sums = Executor(schedule, rank, stages, LocalChannels(links)), Sums()
        running.append(executor.steps(lambda pipe, mb: samples[first[pipe] + mb], settings, sums))
        gradients = {name: main_grad(p) for name, p in own.named_parameters()}
        results.append(RankResult(rank, gradients, sums, executor))
    alive = list(running)
    while alive:
        alive = [steps for steps in alive if next(steps, "done") != "done"]
    assert not any(links.queues.values()), "every product sent is received"
    return results


def compare(layout: Layout, model: Transformer, seed: int = 0, bound: float = 0.0) -> dict[str, float]:
    """Largest difference of losses and gradients between both ways, relative to the gradient's largest; 0.0 is exact.

    Fails (AssertionError) where a difference is above its bound: `bound` for sums of equal order, which is 0 unless
    the device's own sums have none; else 1e-5 of the largest in fp32, which some hundred roundings of 6e-8 stay far
    below.
    """
    config = model.config
    parallel = Parallel(layout.ranks, schedule=layout.schedule, stages_per_rank=layout.stages_per_rank or 0)
    schedule = schedule_of(parallel, layout.microbatches)
    plans = stage_plans(config, schedule.stages, layout.placement)
    if not layout.mtp_weight:
        plans = tuple(without_mtp(plan, config) for plan in plans)
    model.recompute = layout.recompute
    settings, samples = settings_of(layout), samples_of(layout, config, seed).to(model.head.device)
    worst = {"exact": 0.0, "summed": 0.0}
    totals: dict[str, list[Tensor]] = {}
    expected: dict[str, list[Tensor]] = {}
    most = held(schedule, {stage: plans[stage.index] for stage in schedule.rank_of})
    for data_rank in range(layout.data_ranks):
        results = run_pipeline(model, samples[data_rank], settings, schedule, plans)
        for result in results:
            peaks = result.executor.peaks
            assert peaks == most[result.rank][:3], f"rank {result.rank} held {peaks}, not {most[result.rank]}"
            _append(totals, result.gradients)
        start = 0
        for pipe, count in enumerate(schedule.microbatches):
            gradients, sums = run_plain(model, samples[data_rank, start : start + count], settings)
            start += count
            _compare_pipe(schedule, plans, pipe, results, (gradients, sums), worst, bound)
            _append(expected, gradients)
    worst["summed"] = _compare_sums(totals, expected, bound)
    return worst


def _append(lists: dict[str, list[Tensor]], values: Gradients) -> None:
    for name, value in values.items():
        lists.setdefault(name, []).append(value)


def _compare_sums(
    totals: Mapping[str, list[Tensor]], expected: Mapping[str, list[Tensor]], least: float
) -> float:
    """The largest error of the gradients summed over all that hold a weight."""
    worst = 0.0
    for name, values in totals.items():
        error = relative_error(torch.stack(values).sum(0), torch.stack(expected[name]).sum(0))
        worst = max(worst, error)
        bound = max(least, 1e-5 if values[0].dtype == torch.float32 else 1e-11)
        assert error < bound, f"the summed gradient of {name} is off by {error:.2e}"
    return worst


def _compare_pipe(
    schedule: Schedule,
    plans: tuple[Plan, ...],
    pipe: int,
    results: list[RankResult],
    plain: tuple[Gradients, Sums],
    worst: dict[str, float],
    bound: float,
) -> None:
    """Every weight of the pipe's stages bit for bit on the rank that holds it, and the losses there."""
    gradients, sums = plain
    for stage, rank in schedule.rank_of.items():
        if stage.pipe != pipe:
            continue
        mine = results[rank]
        own = named_here(mine, stage.index, plans)
        for name in own:
            error = relative_error(mine.gradients[name], gradients[name])
            worst["exact"] = max(worst["exact"], error)
            same = torch.equal(mine.gradients[name], gradients[name])
            assert same or error < bound, f"{name} at stage {stage}: off by {error:.2e}"
        both_pipes = len(schedule.held(rank)) > 1 and schedule.pipes > 1
        for part, index in plans[stage.index]:
            if part == "HEAD" and not both_pipes:
                assert torch.equal(mine.sums.nll[index], sums.nll[index]), f"loss of depth {index} differs"


def named_here(result: RankResult, index: int, plans: tuple[Plan, ...]) -> list[str]:
    """The weights that only this stage of the model uses, by the prefix of its layers."""
    prefixes = []
    layers = sum(name.endswith("attn_norm.weight") and name.startswith("layers") for name in result.gradients)
    for part, layer in plans[index]:
        if part == "ATTN":
            prefixes.append(f"layers.{layer}." if layer < layers else f"mtp.{layer - layers}.layer.")
        elif part == "MERGE":
            prefixes += [f"mtp.{layer - 1}.{name}." for name in ("embed_norm", "hidden_norm", "join")]
        elif part == "HEAD":
            prefixes.append("norm." if layer == 0 else f"mtp.{layer - 1}.norm.")
    return [name for name in result.gradients if name.startswith(tuple(prefixes))]


def relative_error(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest element of the second."""
    scale = other.abs().max().item() or 1.0
    return (one - other).abs().max().item() / scale
