"""Times: no op before its need, Table 2's formulas where they are exact, and both resolutions alike."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.errors import ScheduleError
from counterflow.schedule import SCHEDULES, forward_only
from counterflow.schedule.relation import gives, needs
from counterflow.schedule.simulate import Costs, makespan, simulate, simulate_ops
from counterflow.schedule.text import from_text
from counterflow.schedule.weave import weave
from counterflow.schedule.words import TRANSFERS, Kind, Lane, Op
from tests.schedule.cases import cases, equal_plans, made, plans

pytestmark = pytest.mark.pure

COST = st.integers(0, 12).map(float)
LATENCY = st.sampled_from([0.0, 0.5, 3.0])


@settings(max_examples=40)
@given(cases(), COST, COST, COST, LATENCY)
def test_cells_wait_for_their_needs_and_for_nothing_else(case, f, inner, w, latency):
    """Each starts as soon as its rank is free and its needs have come, at one of these moments exactly."""
    schedule = made(case)
    costs = Costs(f, inner + w, w)
    spans = simulate(schedule, costs, latency)
    ready = {}
    for span in spans:
        for chunk in span.what:
            ready.update(dict.fromkeys(gives(chunk), (span.end, span.rank)))
    for rank, row in enumerate(schedule.rows):
        mine = [span for span in spans if span.rank == rank]
        assert tuple(span.what for span in mine) == row
        free = 0.0
        for span in mine:
            wanted = [ready[product] for chunk in span.what for product in needs(chunk, schedule.stages)]
            come = [end + latency * (maker != rank) for end, maker in wanted]
            assert span.start == max(free, *come, 0.0)
            assert span.end == span.start + costs(rank, span.what)
            free = span.end


def test_a_makespan_by_hand():
    """1F1B on two ranks: F0 | F1, F0 | B0 … with transfers of 0.5."""
    spans = simulate(SCHEDULES["1f1b"](2, 1), Costs(1.0, 2.0), 0.5)
    assert [(span.rank, str(span.what[0]), span.start, span.end) for span in spans] == [
        (0, "F0", 0.0, 1.0),
        (1, "F0", 1.5, 2.5),
        (1, "B0", 2.5, 4.5),
        (0, "B0", 5.0, 7.0),
    ]
    assert makespan(spans) == 7.0


def test_costs_of_a_cell():
    cells = {str(cell[0])[0] + "&" * (len(cell) - 1): cell for cell in SCHEDULES["dualpipe"](4, 8).rows[0]}
    costs = Costs(3.0, 7.0, 2.0, 8.5)
    found = {name: costs(0, cell) for name, cell in cells.items()}
    assert found == {"F": 3.0, "B": 7.0, "I": 5.0, "W": 2.0, "F&": 8.5}
    assert Costs(3.0, 7.0, 2.0)(0, cells["F&"]) == 10.0


@settings(max_examples=20)
@given(
    cases(most_ranks=4), st.lists(plans(), min_size=1, max_size=4), st.randoms(use_true_random=False), LATENCY
)
def test_ops_are_in_lane_order_and_never_overlap_in_a_lane(case, drawn, random, latency):
    schedule = made(case)
    plan_of = {stage: drawn[(stage.index + stage.pipe) % len(drawn)] for stage in schedule.rank_of}
    times = {}
    spans = simulate_ops(
        schedule, plan_of, lambda rank, op: times.setdefault((rank, op), random.randint(0, 5)), latency
    )
    for rank in range(schedule.ranks):
        for lane in Lane:
            mine = [span for span in spans if span.rank == rank and span.lane is lane]
            assert all(one.end <= other.start for one, other in pairwise(mine))
    assert len({(span.rank, span.what) for span in spans}) == len(spans)
    assert all(span.end - span.start == times[span.rank, span.what] for span in spans)


def op_cost(rank: int, op: Op) -> float:
    """Transfers cost nothing; every other part of every kind something of its own."""
    return 0.0 if op.part in TRANSFERS else 1.0 + len(op.part) / 4 + ord(str(op.kind)) % 7


@settings(max_examples=20)
@given(cases(("zb1p", "1f1b", "interleaved-1f1b", "dualpipe", "dualpipev"), 4))
def test_forward_passes_take_as_long_in_ops_as_in_cells(case):
    schedule = forward_only(made(case))
    assert_agree(schedule)


@settings(max_examples=20)
@given(cases(("zb1p",), 4))
def test_split_backwards_take_as_long_in_ops_as_in_cells(case):
    """Every chunk gives what travels at its end, so finer eyes see the same."""
    assert_agree(made(case))


def assert_agree(schedule):
    plan_of = equal_plans(schedule)
    spans = simulate_ops(schedule, plan_of, op_cost)
    sums: dict = {}
    ends: dict = {}
    for span in spans:
        key = span.rank, span.what.chunk
        sums[key] = sums.get(key, 0.0) + span.end - span.start
        ends[key] = max(ends.get(key, 0.0), span.end)
    for cell in simulate(schedule, lambda rank, cell: sum(sums[rank, chunk] for chunk in cell)):
        assert max(ends[cell.rank, chunk] for chunk in cell.what) == pytest.approx(cell.end)


@settings(max_examples=20)
@given(cases(most_ranks=4))
def test_ops_are_never_later_than_cells(case):
    """A whole backward sends its dx before its last weight gradient, which cells do not see."""
    schedule = made(case)
    plan_of = equal_plans(schedule)
    spans = simulate_ops(schedule, plan_of, op_cost)
    sums: dict = {}
    for span in spans:
        sums[span.rank, span.what.chunk] = sums.get((span.rank, span.what.chunk), 0.0) + span.end - span.start
    cells = simulate(schedule, lambda rank, cell: sum(sums[rank, chunk] for chunk in cell))
    assert makespan(spans) <= makespan(cells) + 1e-9


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_fig4_transfers_no_longer_than_computation_cost_nothing(layers):
    """From issue to end a pair in the steady state takes the same whether transfers take no time or an op's."""
    schedule = SCHEDULES["dualpipe"](2, 8)
    pair = [cell for cell in schedule.rows[0] if len(cell) == 2][2]

    def time_of_pair(transfer: float) -> float:
        spans = simulate_ops(
            schedule, equal_plans(schedule, layers), lambda _, op: transfer if op.part in TRANSFERS else 4.0
        )
        return makespan([span for span in spans if span.rank == 0 and span.what.chunk in pair])

    assert time_of_pair(0.0) == time_of_pair(1.0) == time_of_pair(4.0)


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_a_stage_without_ops_hands_on(name):
    """The MTP modules' stage where λ is 0: it takes no time, and its neighbours wait for each other through it."""
    schedule = SCHEDULES[name](4, 8)
    plan_of = equal_plans(schedule)
    for empty in (schedule.stages - 1, 1):
        some = {stage: () if stage.index == empty else plan for stage, plan in plan_of.items()}
        spans = simulate_ops(schedule, some, op_cost, 0.5)
        assert {span.what.chunk.stage.index for span in spans} == set(range(schedule.stages)) - {empty}
        assert len({span.what.chunk.stage for span in spans}) == len(plan_of) - schedule.pipes
        last = {span.what.chunk: span.end for span in spans if span.what.kind is Kind.F}
        for chunk, end in last.items():
            if empty == 1 and chunk.stage.index == 0:
                after = chunk._replace(stage=chunk.stage._replace(index=2))
                first = min(span.start for span in spans if span.what.chunk == after)
                assert first >= end + 0.5


def test_a_schedule_that_stops_says_who_knows_why():
    with pytest.raises(ScheduleError, match=r"schedule\.check says where"):
        simulate(from_text("x, 1 stages\n0: B0 F0\n"))


@settings(max_examples=20)
@given(cases(("1f1b", "zb1p", "dualpipev"), 1), st.randoms(use_true_random=False))
def test_a_host_runs_ahead_of_its_device(case, random):
    """A rank ends no sooner than its device's or its host's work, and no later than the longer of both op by op."""
    schedule = made(case)
    host, device = {}, {}
    spans = simulate_ops(
        schedule,
        equal_plans(schedule),
        lambda rank, op: device.setdefault(op, random.randint(0, 5)),
        issue=lambda op: host.setdefault(op, random.randint(0, 5)),
    )
    least = max(sum(host.values()), sum(device[op] for op in device if op.lane is Lane.COMPUTE))
    assert least <= max(span.end for span in spans) <= sum(max(host[op], device[op]) for op in host)


def test_a_long_op_hides_the_launches_of_those_behind_it():
    schedule = SCHEDULES["1f1b"](1, 1)
    plan_of = equal_plans(schedule)
    ops = [op for cell in schedule.rows[0] for op in weave(cell, plan_of)]
    spans = simulate_ops(
        schedule, plan_of, lambda rank, op: 100.0 if op == ops[0] else 0.0, issue=lambda op: 1.0
    )
    assert makespan(spans) == max(100.0, len(ops))
