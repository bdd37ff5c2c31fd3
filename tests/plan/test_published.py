"""The planner beside what was published: the step that nothing was fitted to, and the fit itself."""

import pytest

from counterflow.plan import published
from counterflow.plan.cost import Step, predict
from counterflow.plan.hardware import FITTED, Efficiencies
from counterflow.plan.published import PARTS_S, TRACE_OPS_S, Compared

pytestmark = pytest.mark.pure


@pytest.fixture(scope="module")
def step() -> Step:
    """The report's, simulated once: it takes seconds where every call is type-checked."""
    return predict(published.report_costs())


@pytest.fixture(scope="module")
def rows(step) -> dict[str, Compared]:
    return {row.name: row for row in published.step_rows(step)}


def test_fitted_efficiencies_are_the_fits():
    found, kept = published.fit(), Efficiencies()
    for name in FITTED:
        assert getattr(found, name) == pytest.approx(getattr(kept, name), abs=1e-4), name
    others = vars(kept).keys() - set(FITTED)
    assert all(getattr(found, name) == getattr(kept, name) for name in others)


def test_step_and_gpu_hours_are_within_five_percent(rows):
    assert abs(rows["step"].error) < 0.05
    assert abs(rows["GPU hours for 1 T tokens"].error) < 0.05


def test_every_published_part_is_compared_and_the_large_ones_are_near(rows):
    """F&B is 70 % of the step, the optimizer is outside of the pipeline; the others' errors stand in the record."""
    assert PARTS_S.keys() <= rows.keys()
    assert abs(rows["1F1B"].error) < 0.05 and abs(rows["optimizer"].error) < 0.05
    assert abs(rows["bubble"].error) < 0.15
    total = sum(rows[name].predicted for name in PARTS_S)
    assert total == pytest.approx(rows["step"].predicted, rel=0.02), (
        "but for transfers that run on into a cell"
    )


def test_the_bubbles_causes_add_up(step):
    found = dict(published.bubble_rows(step))
    schedule = found.pop("published chunk times through the schedule (F 49, I 75, W 32, F&B 144 ms)")
    rest = found.pop("published less predicted: unexplained")
    whole = found.pop("predicted")
    assert sum(found.values()) == pytest.approx(whole)
    assert whole + rest == pytest.approx(PARTS_S["bubble"])
    assert 0.9 < schedule < 1.1, "about half of the published bubble"


def test_the_traces_ops_are_within_a_quarter():
    """Three numbers cannot give eight; the largest miss is the experts' forward."""
    rows = published.trace_rows()
    assert len(rows) == len(TRACE_OPS_S) + 2
    assert all(abs(row.error) < (0.001 if row.note else 0.25) for row in rows)


def test_tab1_totals_are_the_published_ones(step):
    rows = published.table_1(step)
    assert [row.published for row in rows[-2:]] == [2788e3, 5.576e6]
    assert abs(rows[0].error) < 0.05


@pytest.mark.parametrize("run", published.RUNS, ids=lambda run: run.name)
def test_published_runs_can_be_predicted(run):
    """Not that they are right: the record says how far they are off."""
    microbatches = run.costs.layout.microbatches(run.costs.job)
    assert microbatches >= 1 and run.tokens_per_s > 0 and run.note
    assert run.costs.layout.gpus == int(
        run.name.replace(",", "").split(" H100")[0].split(" GB200")[0].split()[-1]
    )
