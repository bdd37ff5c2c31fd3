"""Table 2: the bubbles and the memory, formula against simulation and count."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from counterflow.errors import ScheduleError
from counterflow.schedule import SCHEDULES, table2
from counterflow.schedule.measure import busy, cell_seconds, held, idle, mean_costs
from counterflow.schedule.simulate import Costs, simulate, simulate_ops
from counterflow.schedule.words import Schedule, Span
from tests.schedule.cases import cases, equal_plans, made

pytestmark = pytest.mark.pure

STAGES = st.integers(1, 8).map(lambda half: 2 * half)
COST = st.integers(0, 12)


TABLE_2 = tuple(table2.table())
KNOWN = sorted(name for name, row in SCHEDULES.items() if row.bubble)


def sized(name: str, stages: int, microbatches: int) -> Schedule:
    """A rule's schedule of so many stages."""
    return SCHEDULES[name](stages // SCHEDULES[name].stages_per_rank, microbatches)


def formula_of(schedule: Schedule, costs: Costs) -> float:
    return SCHEDULES[schedule.name].bubble(schedule.ranks, schedule.stages, costs)


@pytest.mark.parametrize(("name", "bubble"), [("1f1b", 21), ("zb1p", 7), ("dualpipe", 6), ("dualpipev", 6)])
def test_tab2_bubbles_of_eight_stages(name, bubble):
    schedule, costs = sized(name, 8, 20), Costs(1.0, 2.0, 1.0)
    assert formula_of(schedule, costs) == bubble
    assert idle(simulate(schedule, costs), schedule.ranks) == [bubble] * schedule.ranks
    assert SCHEDULES[name].exactness(costs) == "exact"


@st.composite
def exact_costs(draw, name: str):
    """(F, B, W, pair) that satisfy the condition under which the formula of `name` is exact."""
    f, w, more = draw(COST), draw(COST), draw(COST)
    if name in ("1f1b", "interleaved-1f1b"):
        return f, w + more, w, None
    if name == "zb1p":
        return w + draw(COST), 2 * w + more, w, None
    return w + f, 2 * w + f, w, draw(st.sampled_from([None, 3 * w + 2 * f]))


@pytest.mark.parametrize("name", KNOWN)
@settings(max_examples=40)
@given(st.data(), STAGES, st.integers(0, 4))
def test_tab2_bubbles_are_exact_where_the_note_says_so(name, data, stages, more):
    costs = Costs(*data.draw(exact_costs(name)))
    assert SCHEDULES[name].exactness(costs) == "exact"
    schedule = sized(name, stages, 2 * stages + more * max(2, SCHEDULES[name].allowed(stages // 2).step))
    waits = idle(simulate(schedule, costs), schedule.ranks)
    assert waits == pytest.approx([formula_of(schedule, costs)] * schedule.ranks)


@given(st.sampled_from(KNOWN), STAGES, COST, COST, COST, st.none() | st.integers(1, 30))
def test_tab2_the_note_is_true_of_any_costs(name, stages, f, inner, w, pair):
    costs, schedule = Costs(f, inner + w, w, pair), sized(name, stages, 2 * stages)
    ranks, waits = schedule.ranks, idle(simulate(schedule, costs), schedule.ranks)
    formula, note = formula_of(schedule, costs), SCHEDULES[name].exactness(costs)
    if note == "exact":
        assert waits == pytest.approx([formula] * ranks)
    elif note.startswith("exact on the middle ranks"):
        middle = waits[-1:] if schedule.pipes == 1 else waits[ranks // 2 - 1 : ranks // 2 + 1]
        assert middle == pytest.approx([formula] * len(middle))
    elif note.startswith("too low"):
        assert min(waits) >= formula - 1e-9
    else:
        assert note.startswith("approximate")


@pytest.mark.parametrize(("name", "w"), [("zb1p", 8.0), ("zb1p", 2.0), ("dualpipe", 8.0)])
def test_tab2_conditions_are_needed(name, w):
    """One case beyond each condition where the formula is wrong: W > F, W > B - W."""
    costs = Costs(3.0, w + 1.0, w)
    schedule = SCHEDULES[name](8, 20)
    assert SCHEDULES[name].exactness(costs) != "exact"
    assert min(idle(simulate(schedule, costs), 8)) > formula_of(schedule, costs)


def test_equal_up_to_rounding_is_equal():
    assert SCHEDULES["dualpipe"].exactness(Costs(1.0, 2.2, 1.2 - 0.2, None)) != "exact"
    assert SCHEDULES["dualpipe"].exactness(Costs(1.1, 2.2 - 0.1, 1.0, 3.2)) == "exact"


@settings(max_examples=20)
@given(STAGES, st.integers(0, 4))
def test_tab2_activations(stages, more):
    microbatches = 2 * stages + 2 * more
    for name, row in table2.table().items():
        found = held(sized(name, stages, microbatches))
        peaks = [one.activations for one in found]
        assert max(peaks) == row.activations(stages)
        assert {one.stages for one in found} == {row.parameters}
        if name in ("1f1b", "zb1p"):
            assert peaks[0] == stages
        else:
            assert set(peaks) == {stages + 1}, "DualPipe holds PP + 1 on every rank"


def test_owed_weight_gradients_do_not_raise_the_peak():
    found = held(SCHEDULES["dualpipe"](8, 20))
    assert [one.owed for one in found] == [1, 2, 3, 4, 4, 3, 2, 1]
    assert all(one.whole <= 9 for one in found)
    assert [one.owed for one in held(SCHEDULES["zb1p"](4, 8))] == [1, 2, 3, 4]


@settings(max_examples=20)
@given(cases(most_ranks=4))
def test_woven_pairs_hold_no_more_than_forward_first(case):
    schedule = made(case)
    for whole, woven in zip(held(schedule), held(schedule, equal_plans(schedule))):
        assert woven.activations <= whole.activations and woven.stages == whole.stages


@settings(max_examples=40)
@given(cases(), st.integers(0, 9), st.integers(0, 9))
def test_idle_and_work_make_the_makespan(case, f, b):
    schedule = made(case)
    spans = simulate(schedule, Costs(f, b + 1.0, 1.0))
    waits = idle(spans, schedule.ranks)
    work = sum(span.end - span.start for span in spans)
    whole = max(span.end for span in spans) - min(span.start for span in spans)
    assert sum(waits) + work == pytest.approx(whole * schedule.ranks)


def test_a_transfer_beside_computation_counts_once():
    schedule = SCHEDULES["dualpipe"](2, 4)
    spans = simulate_ops(schedule, equal_plans(schedule), lambda rank, op: 1.0)
    assert min(idle(spans, 2)) >= 0.0
    cell = schedule.rows[0][0]
    assert busy([Span(0, cell, 0.0, 4.0), Span(0, cell, 1.0, 2.0), Span(0, cell, 3.0, 5.0)]) == 5.0
    assert busy([Span(0, cell, 0.0, 1.0), Span(0, cell, 3.0, 5.0)]) == 3.0


@pytest.mark.parametrize("name", TABLE_2)
def test_tab2_a_recorded_run_gives_its_costs_and_its_row(name):
    ranks = 4
    schedule, costs = SCHEDULES[name](ranks, 8), Costs(1.0, 2.5, 1.0, 3.0 if "dual" in name else None)
    recorded = simulate(schedule, costs)
    found = table2.rows_of_run(recorded)
    assert (found.schedule, found.microbatches) == (schedule, 8)
    assert sorted(found.measured, key=recorded.index) == recorded
    assert sorted(found.predicted, key=recorded.index) == recorded
    if name != "1f1b":
        assert found.costs == costs == mean_costs(schedule, recorded)
    row = next(row for row in found.rows if row.name == name)
    assert row.measured == row.simulated == idle(recorded, ranks)
    assert [other.measured for other in found.rows if other.name != name] == [()] * 3


def test_a_recorded_run_of_ops_of_several_steps():
    schedule = SCHEDULES["1f1b"](2, 4)
    first = simulate_ops(schedule, equal_plans(schedule), lambda rank, op: 3.0)
    second = simulate_ops(schedule, equal_plans(schedule), lambda rank, op: 2.0)
    later = [Span(span.rank, span.what, span.start + 1000.0, span.end + 1000.0) for span in second]
    found = table2.rows_of_run(first + later)
    assert sorted(found.measured, key=second.index) == second and found.schedule == schedule
    # two MoE layers and an end: F has 9 ops in a row; B as many and 4 of W, 3 of which run beside a transfer
    assert found.costs == Costs(18.0, 20.0, 8.0)
    assert cell_seconds(second)(0, schedule.rows[0][0]) == 18.0


def test_rows_that_a_rule_refuses_say_so():
    found = {row.name: row for row in table2.rows(4, 6, Costs())}
    assert found["1f1b"].simulated == [9.0] * 4 and found["1f1b"].refused == ""
    assert found["dualpipe"].simulated == [] and "take 8" in found["dualpipe"].refused


def test_a_trace_of_another_schedule_is_refused():
    with pytest.raises(ScheduleError, match="is of no schedule of Table 2"):
        table2.rows_of_run(simulate(SCHEDULES["interleaved-1f1b"](2, 4)))
    with pytest.raises(ScheduleError, match="is of no schedule of Table 2"):
        table2.rows_of_run([])


@given(st.sampled_from(TABLE_2), st.integers(2, 6))
def test_incomplete_steps_are_refused(name, missing):
    spans = [span for span in simulate(SCHEDULES[name](2, 4)) if span.what[0].kind != "W"]
    assume(missing < len(spans))
    with pytest.raises(ScheduleError):
        table2.rows_of_run(spans[:-missing])
