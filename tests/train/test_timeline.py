"""A step's timeline: whole where its ops have room, else its cells and one part of the middle op by op."""

import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from counterflow.config.load import load_run
from counterflow.schedule import SCHEDULES, trace
from counterflow.schedule.simulate import makespan, simulate_ops
from counterflow.schedule.words import Lane, Op
from counterflow.train.loop import recorded_steps
from counterflow.train.timeline import (
    SHOWN,
    TIMELINE,
    TRACE,
    cell_spans,
    middle,
    predict,
    write_timeline,
)
from tests.schedule.cases import equal_plans

SPACE = "{http://www.w3.org/2000/svg}"


def step_of(name: str, ranks: int, microbatches: int):
    """(schedule, plans, spans of its ops), with every rank a little slower than the one before."""
    schedule = SCHEDULES[name](ranks, microbatches)
    plans = equal_plans(schedule)
    return schedule, plans, simulate_ops(schedule, plans, lambda rank, op: 1e-3 * (1 + rank + len(op.part)))


def test_cells_span_their_ops_and_do_not_overlap():
    schedule, _, spans = step_of("dualpipe", 4, 8)
    cells = cell_spans(schedule, spans)
    for rank, row in enumerate(schedule.rows):
        mine = [cell for cell in cells if cell.rank == rank]
        assert [cell.what for cell in mine] == list(row)
        assert all(before.end <= after.start for before, after in pairwise(mine))
    assert makespan(cells) == pytest.approx(makespan(spans))


@pytest.mark.parametrize(("name", "pairs"), [("dualpipe", 1), ("zb1p", 0)])
def test_the_middle_is_an_overlapped_cell_or_a_forward_and_what_follows(name, pairs):
    schedule = SCHEDULES[name](4, 12)
    rank, cells = middle(schedule)
    assert rank == 1 and [len(cell) for cell in cells] == ([2] if pairs else [1, 1])
    at = schedule.rows[rank].index(cells[0])
    assert abs(at - len(schedule.rows[rank]) / 2) < len(schedule.rows[rank]) / 4


def test_a_long_step_is_drawn_by_cells_and_its_middle_by_ops(tmp_path):
    schedule, plans, spans = step_of("dualpipe", 4, 12)
    write_timeline(tmp_path, schedule, plans, spans, 7)
    root = ElementTree.fromstring((tmp_path / TIMELINE).read_text())
    titles = [text.text for text in root.iter(f"{SPACE}text") if "t" in (text.get("class") or "").split()]
    assert len(titles) == 4 and titles[1].startswith("step 7, measured: ") and "op by op" in titles[3]
    assert len([box for box in root.iter(f"{SPACE}rect") if box.get("class") == "z"]) == 2
    groups = [group for group in root.iter(f"{SPACE}g") if group.get("class") == "m"]
    whole, part = groups[:8], groups[8:]
    assert len(part) == 16, "two pictures of four ranks with two lanes"
    drawn = [title.text.split(" ")[0] for group in whole[4:] for title in group.iter(f"{SPACE}title")]
    assert set(drawn) == {"&".join(map(str, cell)) for row in schedule.rows for cell in row}
    measured_rank_1 = part[8 + 2]
    ops = [title.text for title in measured_rank_1.iter(f"{SPACE}title")]
    assert 0 < len(ops) <= SHOWN and all(re.match(r"(EMBED|ATTN|MLP|HEAD)\d+ [FIW]\d", op) for op in ops)
    assert len(trace.read((tmp_path / TRACE).read_text())) == len(spans)


def test_a_short_step_is_drawn_whole(tmp_path):
    schedule, plans, spans = step_of("1f1b", 2, 1)
    write_timeline(tmp_path, schedule, plans, spans, 3)
    text = (tmp_path / TIMELINE).read_text()
    computing = [span for span in spans if isinstance(span.what, Op) and span.lane is Lane.COMPUTE]
    assert 'class="z"' not in text and text.count("<title>ATTN") >= 2 * sum(
        "ATTN" in str(s.what) for s in computing
    )


def test_equal_op_times_are_predicted_as_they_were():
    schedule, plans, spans = step_of("dualpipe", 2, 8)
    assert makespan(predict(schedule, plans, spans)) == pytest.approx(makespan(spans))


@pytest.mark.parametrize(
    ("steps", "chosen", "recorded"),
    [(1, 0, (1, 1)), (2, 0, (2, 2)), (5, 0, (3, 3)), (15, 0, (3, 7)), (1000, 0, (3, 50)), (1000, 9, (9,))],
)
def test_the_recorded_step_is_past_the_slow_first_ones_and_exists(steps, chosen, recorded):
    words = [f"train.tokens={steps * 16 * 256}", "train.batch_size=16", "data.sequence_length=256"]
    run = load_run("tiny", [*words, f"parallel.record_step={chosen}"])
    assert recorded_steps(run) == recorded
