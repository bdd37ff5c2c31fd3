"""Seconds of ops and steps."""

from dataclasses import replace

import pytest

from counterflow.config.models import MODELS
from counterflow.plan.cost import Costs, cell_seconds, predict, without_transfers
from counterflow.plan.hardware import hardware
from counterflow.plan.job import Job, Layout
from counterflow.plan.routing import Routing
from counterflow.plan.stages import stage_plans
from counterflow.schedule.words import Kind, Op, Part

pytestmark = pytest.mark.pure
V3 = MODELS["v3-671b"]
JOB = Job(V3, 4096, 15360, 14.8e12, "fp8")
REPORT = Layout(16, 128, 64, 1, "dualpipe", None, "projections")
COSTS = Costs(JOB, REPORT, hardware("h800"))


def test_dispatched_rows_are_fp8_and_combined_ones_are_not():
    dispatch, combine = (COSTS.volumes(Kind.F, part).network for part in (Part.DISPATCH, Part.COMBINE))
    assert combine == pytest.approx(4096 * 7168 * 2 * Routing().places(V3, 8) * 7 / 8)
    assert dispatch < 0.53 * combine
    assert COSTS.volumes(Kind.I, Part.COMBINE).network < 0.53 * COSTS.volumes(Kind.I, Part.DISPATCH).network


def test_within_a_node_nothing_crosses_the_network():
    inside = replace(COSTS, layout=replace(REPORT, expert=8))
    assert inside.volumes(Kind.F, Part.DISPATCH).network == 0 < inside.volumes(Kind.F, Part.DISPATCH).nvlink
    assert replace(COSTS, layout=replace(REPORT, expert=1)).transfer(Kind.F, Part.DISPATCH) == 0


def test_beside_a_transfer_computation_has_fewer_multiprocessors():
    alone, beside = (COSTS.seconds(Kind.F, Part.MLP, 30, beside) for beside in (False, True))
    assert alone < beside < alone * 132 / 112 + 1e-9


def test_a_pair_hides_its_transfers_and_a_lone_chunk_does_not():
    schedule = REPORT.rule(120)
    plans = {stage: stage_plans(V3, 16)[stage.index] for stage in schedule.rank_of}
    pair = next(cell for cell in schedule.rows[3] if len(cell) == 2)
    forward, backward = sorted(pair, key=lambda chunk: chunk.kind is not Kind.F)
    free = without_transfers(COSTS)
    exposed = cell_seconds(COSTS, pair, plans) - cell_seconds(free, pair, plans) * 132 / 112
    lone = sum(
        cell_seconds(COSTS, (chunk,), plans) - cell_seconds(free, (chunk,), plans)
        for chunk in (forward, backward)
    )
    assert exposed < 0.1 * lone


SHORT = replace(COSTS, job=replace(JOB, batch_size=8 * 64), layout=replace(REPORT, pipeline=4, data=64))
"""Few ranks and micro-batches: a simulation whose every call is type-checked is slow."""


def test_free_transfers_bound_every_schedule_from_below():
    for schedule in ("dualpipe", "1f1b", "zb1p"):
        costs = replace(SHORT, layout=replace(SHORT.layout, schedule=schedule))
        assert predict(without_transfers(costs)).seconds < predict(costs).seconds


def test_tokens_and_seconds_agree():
    step = predict(SHORT)
    assert step.tokens_per_s * step.seconds * 256 == pytest.approx(8 * 64 * 4096)
    assert step.mfu(causal=False) > step.mfu()
    assert 0 < min(step.idle) <= step.idle_s <= max(step.idle) < step.pipeline_s


def test_a_small_model_is_bound_by_its_launches():
    """By all of them together: while the head keeps the device, the host issues what comes next."""
    costs = Costs(Job(MODELS["tiny"], 256, 16, 1e6, "bf16"), Layout(1, 1, 1, 4), hardware("h100"))
    assert costs.issue_s(Kind.W, Part.ATTN, 1) == pytest.approx(6 * 7.6e-6)
    step = predict(costs)
    ops = [span.what for span in step.spans if isinstance(span.what, Op)]
    host = sum(costs.issue_s(op.kind, op.part, op.layer) for op in ops)
    device = sum(costs.seconds(op.kind, op.part, op.layer, False) for op in ops)
    assert device < host <= step.pipeline_s < 1.01 * host
    on_cpu = replace(costs, hardware=hardware("cpu"))
    assert on_cpu.issue_s(Kind.W, Part.ATTN, 1) == 0.0


def test_skewed_loads_cost_time():
    skewed = replace(COSTS, routing=Routing(loads=tuple(float(1 + place % 8) for place in range(256))))
    piled = replace(COSTS, routing=Routing(loads=(50.0,) * 4 + (1.0,) * 252))
    assert COSTS.seconds(Kind.F, Part.MLP, 30, False) < piled.seconds(Kind.F, Part.MLP, 30, False)
    assert skewed.transfer(Kind.F, Part.COMBINE) < piled.transfer(Kind.F, Part.COMBINE)
