"""Layouts that fit, and clear words where none does."""

from dataclasses import replace

import pytest

from counterflow.cli import main
from counterflow.config.models import MODELS
from counterflow.errors import ConfigError, ScheduleError
from counterflow.plan.answer import answer
from counterflow.plan.cost import Costs, predict
from counterflow.plan.hardware import hardware
from counterflow.plan.job import Job, Layout, require
from counterflow.plan.search import Pins, by_cells, search
from counterflow.schedule import SCHEDULES
from counterflow.schedule.method import Method
from counterflow.schedule.words import Chunk, Kind, Schedule, StageId

pytestmark = pytest.mark.pure
JOB = Job(MODELS["v3-671b"], 4096, 15360, 14.8e12, "fp8")
SMALL = Job(MODELS["small"], 2048, 128, 1e9, "bf16")


def test_all_found_fit_and_are_sorted_and_allowed():
    h100 = hardware("h100")
    found = search(SMALL, h100, 8)
    seconds = [one.seconds for one in found.best]
    assert found.best and seconds == sorted(seconds)
    for one in found.best:
        require(SMALL, one.layout)
        assert one.layout.gpus == 8 and one.peak.total <= h100.card.memory_bytes


def test_the_reports_layout_is_found_and_fits():
    pins = Pins(pipeline=16, expert=64, schedule="dualpipe", micro_batch=1, recompute="projections")
    found = search(JOB, hardware("h800"), 2048, pins)
    assert [one.layout for one in found.best] == [Layout(16, 128, 64, 1, "dualpipe", None, "projections")]


def test_cells_give_what_ops_give_within_three_percent():
    """Cells wait for all that a pair sends, ops for what they need."""
    for schedule in ("dualpipe", "zb1p", "1f1b"):
        layout = Layout(4, 64, 64, 1, schedule, None, "projections")
        costs = Costs(replace(JOB, batch_size=16 * 64), layout, hardware("h800"))
        assert by_cells(costs) == pytest.approx(predict(costs).seconds, rel=0.03)


def test_a_long_step_lies_on_the_line_through_two_short_ones():
    costs = Costs(replace(JOB, batch_size=128 * 400), Layout(8, 128, 64, 1, "dualpipe"), hardware("h800"))
    whole = by_cells(replace(costs, job=replace(costs.job, batch_size=128 * 60)))
    more = by_cells(replace(costs, job=replace(costs.job, batch_size=128 * 62)))
    assert by_cells(costs) == pytest.approx(whole + (more - whole) / 2 * (400 - 60), rel=0.005)


@pytest.mark.parametrize(
    ("gpus", "pins", "says"),
    [
        (0, Pins(), "--gpus is 0; a run needs at least 1"),
        (8, Pins(pipeline=3), "--pipeline is 3 of 8 GPUs; it must divide them: take 2"),
        (
            8,
            Pins(pipeline=4, data=4),
            "--pipeline 4 times --data 4 is 16 ranks and there are 8 GPUs; take --data 2",
        ),
        (8, Pins(pipeline=2, recompute="layer"), "take --recompute attention, or --pipeline 1"),
        (8, Pins(recompute="projections"), "with precision bf16; it is the report's, for --precision fp8"),
        (1, Pins(schedule="zb1p"), "--schedule zb1p with one pipeline rank, which has none; leave it out"),
        (64, Pins(pipeline=32), "--pipeline is 32 and the model has 15 units .* take at most 15"),
        (8, Pins(expert=6), "--expert is 6 and a layer has 32 experts; it must divide them: take 4"),
    ],
)
def test_impossible_wishes_are_answered(gpus, pins, says):
    with pytest.raises(ConfigError, match=says):
        search(SMALL, hardware("h100"), gpus, pins)


def test_a_model_that_fits_nowhere_is_told_what_would_fit():
    with pytest.raises(
        ConfigError, match=r"fits on no layout of 8 h100: .* GiB a card; 256 of them would do \(PP"
    ):
        answer(replace(JOB, batch_size=2048), hardware("h100"), 8, Pins(micro_batch=1, schedule="1f1b"))


def test_a_batch_that_no_layout_divides_is_said():
    with pytest.raises(ConfigError, match="no layout on 7 GPUs: the batch is no multiple"):
        answer(SMALL, hardware("h100"), 7, Pins(data=7))


def test_a_micro_batch_of_ones_own_is_planned_with():
    found = search(replace(SMALL, batch_size=96), hardware("h100"), 8, Pins(micro_batch=3))
    assert found.best and all(one.layout.micro_batch == 3 for one in found.best)


def test_a_trillion_cards_are_answered_at_once():
    with pytest.raises(ConfigError, match="no layout on 999999999999 GPUs: the batch is no multiple"):
        answer(SMALL, hardware("h100"), 999999999999)


def gpipe(ranks, microbatches, stages_per_rank=None):
    """All forwards, then all backwards; it takes four micro-batches or a multiple."""
    del stages_per_rank
    if microbatches % 4:
        raise ScheduleError(f"{microbatches} micro-batches; take a multiple of 4.")
    rows = [
        [(Chunk(kind, StageId(0, rank), mb),) for kind in (Kind.F, Kind.B) for mb in range(microbatches)]
        for rank in range(ranks)
    ]
    return Schedule("all forwards first", ranks, tuple(map(tuple, rows)))


def test_one_more_schedule_in_the_table_is_planned_with(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(SCHEDULES, "gpipe", Method(gpipe))
    found = search(SMALL, hardware("h100"), 8, Pins(schedule="gpipe", pipeline=2, micro_batch=1, expert=1))
    assert found.best and found.best[0].layout.microbatches(SMALL) == 32
    costs = Costs(SMALL, found.best[0].layout, hardware("h100"))
    assert found.best[0].seconds == pytest.approx(predict(costs).seconds, rel=0.05)
    assert main(["plan", "tiny", "--gpus", "4", "--html", str(tmp_path / "plan.html")]) == 0
    assert main(["plan", "tiny", "--gpus", "4", "--schedule", "gpipe", "--micro-batch", "16"]) == 2
    assert "the schedule's rule refuses these ranks or micro-batches" in capsys.readouterr().err
