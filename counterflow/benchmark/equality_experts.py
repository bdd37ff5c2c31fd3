"""One training step with experts shared between ranks against the plain loop: `equality` with a thread for every rank.

Ranks that share experts wait for each other in the middle of a step, so each runs in a thread of its own and tokens
travel through mailboxes. A token's experts are summed rank by rank instead of in the order of its ids, so nothing is
bit-identical; in float64 the bound is some thousand roundings. Routing is not replayed: it is compared, and a flip
fails.
"""

import copy
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from counterflow.benchmark.equality import (
    Layout,
    RankResult,
    named_here,
    relative_error,
    run_plain,
    samples_of,
    settings_of,
    with_accumulators,
)
from counterflow.comm import open_dispatcher
from counterflow.comm.channels import Links, LocalChannels
from counterflow.comm.dispatch import Terms
from counterflow.comm.peers import thread_peers
from counterflow.config.backends import BACKENDS
from counterflow.config.run import Parallel
from counterflow.model.debts import main_grad
from counterflow.model.transformer import Transformer, keep_experts
from counterflow.pipeline.execute import Executor
from counterflow.pipeline.stage import Stage, StepSettings, Sums
from counterflow.plan.layout import schedule_of
from counterflow.plan.stages import stage_plans, without_mtp
from counterflow.schedule.transfers import transfers
from counterflow.schedule.words import Plan, Schedule

BOUND = 1e-10
"""Relative to the largest element, in float64."""
BOUND_OF_KERNELS = 1e-6
"""The same where gates travel as fp32, each rounded by up to 6e-8."""
EXPERTS = ".experts."


def compare(layout: Layout, model: Transformer, seed: int = 0) -> float:
    """The largest relative difference of a loss or gradient.   Fails (AssertionError) above the bound, or on a flip."""
    parallel = Parallel(layout.ranks, schedule=layout.schedule, stages_per_rank=layout.stages_per_rank or 0)
    schedule = schedule_of(parallel, layout.microbatches)
    plans = stage_plans(model.config, schedule.stages, layout.placement)
    if not layout.mtp_weight:
        plans = tuple(without_mtp(plan, model.config) for plan in plans)
    model.recompute = layout.recompute
    settings, samples = settings_of(layout), samples_of(layout, model.config, seed)
    worst, bound = 0.0, BOUND_OF_KERNELS if BACKENDS[layout.dispatch].gates_fp32 else BOUND
    for start in range(0, layout.data_ranks, layout.expert):
        some = samples[start : start + layout.expert]
        block = run_block(layout, model, some, settings, schedule, plans)
        worst = max(worst, _compare_block(model, some, settings, schedule, plans, block, bound))
    return worst


def run_block(
    layout: Layout,
    model: Transformer,
    samples: Tensor,
    settings: StepSettings,
    schedule: Schedule,
    plans: tuple[Plan, ...],
) -> list[list[RankResult]]:
    """All ranks of the data ranks that share experts, by data rank and row; `samples` are (data ranks, M, B, S + 1)."""
    size, ways = len(samples), transfers(schedule)
    peers = [thread_peers(size, layout.node_ranks) for _ in range(schedule.ranks)]
    links = [Links(schedule, ways) for _ in range(size)]
    first = [sum(schedule.microbatches[:pipe]) for pipe in range(schedule.pipes)]

    def play(place: tuple[int, int]) -> RankResult:
        index, row = place
        own = part_of(model, index, size)
        terms = Terms(model.config.num_routed_experts)
        own.dispatcher = open_dispatcher(layout.dispatch, peers[row][index], terms)
        stages = {stage: Stage(own, plans[stage.index]) for stage in schedule.held(row)}
        executor = Executor(schedule, row, stages, LocalChannels(links[index]))
        sums = executor.run(lambda pipe, mb: samples[index, first[pipe] + mb], settings)
        gradients = {name: main_grad(p) for name, p in own.named_parameters()}
        return RankResult(row, gradients, sums, executor)

    places = [(index, row) for index in range(size) for row in range(schedule.ranks)]
    with ThreadPoolExecutor(len(places)) as pool:
        results = list(pool.map(play, places))
    return [results[index * schedule.ranks : (index + 1) * schedule.ranks] for index in range(size)]


def part_of(model: Transformer, index: int, parts: int) -> Transformer:
    """A copy that holds one part of the experts, with accumulators."""
    own, whole = copy.deepcopy(model), dict(model.named_parameters())
    keep_experts(own, index, parts)
    for name, weight in own.named_parameters():
        if EXPERTS in name:
            weight.data = whole[name].data.chunk(parts)[index].clone()
    return with_accumulators(own)


def _compare_block(
    model: Transformer,
    samples: Tensor,
    settings: StepSettings,
    schedule: Schedule,
    plans: tuple[Plan, ...],
    block: list[list[RankResult]],
    bound: float,
) -> float:
    worst, start = 0.0, 0
    for pipe, count in enumerate(schedule.microbatches):
        plain = [run_plain(model, some[start : start + count], settings) for some in samples]
        start += count
        for stage, row in schedule.rank_of.items():
            if stage.pipe != pipe:
                continue
            results = [ranks[row] for ranks in block]
            for name in named_here(results[0], stage.index, plans):
                want = [gradients[name] for gradients, _ in plain]
                got = [result.gradients[name] for result in results]
                if EXPERTS in name:
                    want, got = [torch.stack(want).sum(0)], [torch.cat(got)]
                errors = [relative_error(a, b) for a, b in zip(got, want, strict=True)]
                worst = max(worst, *errors)
                assert max(errors) < bound, f"{name} at stage {stage}: off by {max(errors):.2e}"
    _compare_counts(model, samples, settings, block, bound)
    return worst


def _compare_counts(
    model: Transformer, samples: Tensor, settings: StepSettings, block: list[list[RankResult]], bound: float
) -> None:
    """Every token goes to the experts that it goes to in the plain loop: no flip, so equal counts and losses."""
    for some, ranks in zip(samples, block):
        _, sums = run_plain(model, some, settings)
        assert_same_sums([result.sums for result in ranks], sums, bound)


def assert_same_sums(ranks: list[Sums], plain: Sums, bound: float) -> None:
    """Counts exactly and losses within the bound, summed over ranks."""
    for index, counts in plain.counts.items():
        mine = sum(sums.counts[index] for sums in ranks if index in sums.counts)
        assert isinstance(mine, Tensor) and torch.equal(mine, counts), f"layer {index} routed otherwise"
    for depth, nll in plain.nll.items():
        mine = sum(sums.nll[depth] for sums in ranks if depth in sums.nll)
        assert isinstance(mine, Tensor) and relative_error(mine, nll) < bound, f"loss of depth {depth}"
