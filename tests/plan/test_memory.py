"""Bytes of a rank: held against the real modules' tensors and the schedule's own count."""

from dataclasses import replace

import pytest
import torch

from counterflow.config.backends import BACKENDS
from counterflow.config.models import MODELS
from counterflow.config.run import Train
from counterflow.model.transformer import Transformer, initialise
from counterflow.plan.cost import Costs, held_parameters
from counterflow.plan.hardware import hardware
from counterflow.plan.job import Job, Layout
from counterflow.plan.memory import in_flight, memory
from counterflow.plan.published import REPORT_JOB, REPORT_LAYOUT, report_costs
from counterflow.plan.stages import stage_plans
from counterflow.plan.work import Workload, kept
from counterflow.schedule import SCHEDULES
from counterflow.schedule.measure import held
from counterflow.schedule.words import Part
from counterflow.train.behind import size_of
from counterflow.train.optim import Optimizer
from counterflow.train.pipelined import parts_of

LAYER = replace(
    MODELS["small"],
    vocab_size=256,
    num_routed_experts=8,
    num_groups=1,
    num_limited_groups=1,
    num_layers=2,
    num_mtp_modules=0,
)
SEQUENCES, LENGTH = 2, 1536
"""Longer than what the CPU's attention keeps the probabilities of."""


def saved_bytes(model, make):
    """What `make` gives, and the bytes autograd keeps for it: each storage once, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, torch.Tensor] = {}

    def keep(tensor):
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in weights:
            seen[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = make()
    return out, {pointer: tensor.untyped_storage().nbytes() for pointer, tensor in seen.items()}


@pytest.mark.parametrize("recompute", ["none", "attention"])
def test_kept_bytes_are_what_autograd_saves(recompute):
    """But for the probabilities that attention on a CPU keeps, and for values, which are a copy there."""
    model = Transformer(LAYER)
    initialise(model, 0)
    model.recompute = recompute
    context, layer = model.context(SEQUENCES, LENGTH), model.layers[1]
    tokens = SEQUENCES * LENGTH
    h = torch.randn(tokens, LAYER.hidden_size, requires_grad=True)
    flow, attn = saved_bytes(model, lambda: layer.attn(h, context))
    _, mlp = saved_bytes(model, lambda: layer.mlp(layer.dispatch(flow)))
    load = Workload(
        Job(LAYER, LENGTH, SEQUENCES, 1e6, "fp32"), Layout(1, 1, 1, SEQUENCES, recompute=recompute)
    )
    real = sum(size for pointer, size in attn.items() if pointer != flow.u.untyped_storage().data_ptr())
    if recompute == "none":
        heads = LAYER.num_heads * tokens * 4
        real += heads * LAYER.qk_nope_head_dim - SEQUENCES * LAYER.num_heads * LENGTH**2 * 4
    assert kept(load, Part.ATTN, True).whole == pytest.approx(real, rel=0.01)
    assert kept(load, Part.MLP, True).whole == pytest.approx(sum(mlp.values()), rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_copy_of_a_checkpoint_is_what_one_is_made_of(precision):
    """On a CPU among the rank's own memory, which can do without it; beside a GPU in its host's."""
    model = Transformer(MODELS["tiny"])
    pieces = Optimizer(
        list(model.named_parameters()), Train(precision=precision), torch.device("cpu")
    ).pieces()
    job, layout = Job(MODELS["tiny"], 256, 16, 1e6, precision), Layout(1, 1, 1, 4, "1f1b")
    for averaged in (False, True):
        for card in ("cpu", "h800"):
            costs = Costs(replace(job, averaged=averaged), layout, hardware(card))
            schedule = layout.rule(4)
            (rank,) = memory(costs, schedule, stage_plans(job.model, schedule.stages))
            weights = sum(value.numel() for value in model.parameters())
            copy = size_of(pieces) + averaged * 4 * weights
            kept = (
                (rank.checkpoint, 0)
                if card == "cpu"
                else (rank.host - averaged * 4 * weights, rank.checkpoint)
            )
            assert kept == (pytest.approx(copy, rel=1e-3), 0)
            assert rank.needed == rank.total - rank.checkpoint


@pytest.mark.parametrize(("schedule", "ranks"), [("dualpipe", 2), ("1f1b", 3), ("dualpipev", 2)])
def test_held_parameters_are_the_real_ones(schedule, ranks):
    config = MODELS["tiny"]
    with torch.device("meta"):
        named = list(Transformer(config).named_parameters())
    found = SCHEDULES[schedule](ranks, 2 * ranks)
    plans = stage_plans(config, found.stages)
    for rank in range(ranks):
        mine = {part for stage in found.held(rank) for part in plans[stage.index]}
        real = sum(
            value.numel()
            for name, value in named
            if mine & parts_of(name, config.num_layers, config.num_mtp_modules)
        )
        assert sum(held_parameters(config, plans, found.held(rank), 1)) == real


@pytest.mark.pure
@pytest.mark.parametrize("name", SCHEDULES)
def test_micro_batches_in_flight_are_the_schedules_count(name):
    schedule = SCHEDULES[name](4, 16)
    for rank, expected in enumerate(held(schedule)):
        states = in_flight(schedule, rank)
        most = max(sum(whole + owed for _, whole, owed in state.counts) for state in states)
        assert most == expected.activations


@pytest.mark.pure
def test_sec3_2_3_the_reports_run_fits_by_fp8_and_recomputation_alone():
    """Of 80 GB. Without either it would not, and the peak is in the pipeline's fullest moment."""
    costs = report_costs()
    schedule = REPORT_LAYOUT.rule(120)
    plans = stage_plans(REPORT_JOB.model, 16)

    def peak(changed: Costs) -> float:
        return max(one.total for one in memory(changed, schedule, plans))

    assert 60e9 < peak(costs) < 80e9
    assert peak(replace(costs, job=replace(REPORT_JOB, precision="bf16"))) > 80e9
    assert peak(replace(costs, layout=replace(REPORT_LAYOUT, recompute="none"))) > 80e9


@pytest.mark.pure
def test_zero1_shares_what_is_owned_and_only_that():
    costs = Costs(Job(MODELS["small"], 2048, 128, 1e9, "bf16"), Layout(1, 1), hardware("h100"))
    plans = stage_plans(costs.job.model, 1)
    one, eight = (
        memory(replace(costs, layout=Layout(1, data)), Layout(1, data).rule(4), plans)[0] for data in (1, 8)
    )
    assert one.weights == eight.weights and one.gradients == eight.gradients
    assert eight.masters == pytest.approx(one.masters / 8) and eight.moments == pytest.approx(one.moments / 8)


@pytest.mark.pure
def test_a_worst_case_arena_costs_what_decision_5_says():
    """Four regions for every token of all ranks, against rows that arrive."""
    costs = report_costs()
    schedule, plans = REPORT_LAYOUT.rule(32), stage_plans(REPORT_JOB.model, 16)
    sizes = {name: memory(costs, schedule, plans, name)[3].buffers for name in BACKENDS}
    assert sizes["local"] < sizes["deep_ep"] < sizes["collective"] < sizes["two_hop"] < sizes["nvlink"]
    assert sizes["nvlink"] - sizes["local"] == pytest.approx(4 * 64 * 4096 * 7168 * 2)
