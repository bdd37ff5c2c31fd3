"""What is written is read back; what cannot be read is refused by line and word; the CSV is PyTorch's."""

import re

import pytest
from hypothesis import given

from counterflow.errors import ScheduleError
from counterflow.schedule import SCHEDULES, forward_only
from counterflow.schedule.text import from_csv, from_text, grid, to_csv, to_text
from tests.schedule.cases import cases, made

ONE_PIPE = tuple(name for name in SCHEDULES if name != "dualpipe")


@pytest.mark.pure
@given(cases())
def test_text_reads_back_as_it_was(case):
    schedule = made(case)
    assert from_text(to_text(schedule)) == schedule
    forward = forward_only(schedule)
    assert from_text(to_text(forward)) == forward


@pytest.mark.pure
@given(cases(ONE_PIPE))
def test_csv_reads_back_as_it_was(case):
    schedule = made(case)
    assert from_csv(to_csv(schedule), schedule.name) == schedule


@pytest.mark.parametrize("name", ONE_PIPE)
def test_csv_is_what_pytorch_prints_and_reads(name):
    """Every action is the repr of what torch's own parser makes of it."""
    torch_schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    schedule = SCHEDULES[name](4, 12)
    for row, line in zip(schedule.rows, to_csv(schedule).splitlines(), strict=True):
        for cell, text in zip(row, line.split(","), strict=True):
            action = torch_schedules._Action.from_str(text)
            assert repr(action) == text and action.is_compute_op
            every = [action] if action.sub_actions is None else action.sub_actions
            said = [(one.stage_index, one.computation_type.value, one.microbatch_index) for one in every]
            assert said == [(chunk.stage.index, chunk.kind.value, chunk.mb) for chunk in cell]


@pytest.mark.pure
def test_csv_as_pytorch_prints_it_is_read():
    torch_like = "0F0, 0F1,,(0F2;1B0)OVERLAP_F_B\n1F0,1I0,1W0,0B3\n"
    schedule = from_csv(torch_like, "theirs")
    assert to_csv(schedule) == "0F0,0F1,(0F2;1B0)OVERLAP_F_B\n1F0,1I0,1W0,0B3\n"
    assert (schedule.name, schedule.stages, schedule.ranks) == ("theirs", 2, 2)


@pytest.mark.pure
def test_a_second_pipe_has_no_csv():
    with pytest.raises(
        ScheduleError, match="knows one pipe; write it as text, or take a schedule of one pipe"
    ):
        to_csv(SCHEDULES["dualpipe"](2, 4))


@pytest.mark.pure
def test_comments_blank_lines_and_spaces_are_left_out():
    text = "# mine\n\n  two, 2 stages\n 0 1':  F0   F0'&B0 \n# more\n1 0': F0'\n"
    assert to_text(from_text(text)) == "two, 2 stages\n0 1': F0 F0'&B0\n0': F0'\n"


@pytest.mark.pure
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the schedule is empty"),
        ("0: F0", "line 1: '0: F0'; the first line must be 'NAME, N stages'"),
        ("x, 1 stages", "has no rows"),
        ("x, 1 stages\nF0 F1", "line 2: 'F0' is no stage"),
        ("x, 1 stages\n0 F0", "line 2: 'F0' is no stage"),
        ("x, 1 stages\n: F0", "line 2: a row begins with the stages"),
        ("x, 1 stages\n0: G0", "line 2: 'G0' is no chunk"),
        ("x, 1 stages\n0: F0&", "line 2: '' is no chunk"),
        ("x, 1 stages\n0: F0'", "line 2: 'F0'' on a rank that holds 0; no stage of pipe 1 fits"),
        ("x, 2 stages\n0 1: F0", "several stages fit: add @stage"),
        ("x, 1 stages\n0: F" + "9" * 5000, "is no chunk"),
    ],
)
def test_unreadable_text_is_refused_by_line_and_word(text, says):
    with pytest.raises(ScheduleError, match=re.escape(says)):
        from_text(text)


@pytest.mark.pure
@pytest.mark.parametrize("action", ["0SEND_F1", "0UNSHARD", "F0", "0F", "(0F1;1X2)OVERLAP_F_B"])
def test_actions_that_do_not_compute_are_refused(action):
    with pytest.raises(ScheduleError, match=r"row 1: .* is no action of the compute-only form"):
        from_csv(f"0F0\n{action}\n")


@pytest.mark.pure
def test_the_grid_marks_its_cell():
    schedule = SCHEDULES["dualpipe"](8, 20)
    lines = grid(schedule, 3, 10).splitlines()
    assert [line.split(":")[0].strip() for line in lines] == [f"rank {rank}" for rank in range(1, 6)]
    assert lines[2] == "  rank 3: … F3 F3' F4 B0' >F4'&B0< F5&B1' F5'&B1 F6&B2' F6'&B2 …  <--"
    assert [line.count("<--") for line in lines] == [0, 0, 1, 0, 0]
