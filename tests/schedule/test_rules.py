"""The rules against what is published: DualPipe's order, its counts, and what each rule refuses."""

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.errors import ScheduleError
from counterflow.schedule import SCHEDULES, forward_only
from counterflow.schedule.check import check
from counterflow.schedule.text import to_text, word
from counterflow.schedule.words import Kind
from tests.schedule.cases import cases, made

pytestmark = pytest.mark.pure

FIGURE_5 = {
    0: "F0 F1 F2 F3 F4 F5 F6 F0' I0' W0' F1' I1' W1' F2' I2' W2' F3' F7&B3' F4'&B0 F8&B4' F5'&B1 F9&B5' F6'&B2 "
    "B6' F7'&B3 B7' F8'&B4 B8' F9'&B5 B9' I6 W6 I7 W7 I8 W8 I9 W9",
    1: "F0 F1 F2 F3 F4 F0' F5 F1' I0' W0' F2' I1' W1' F3' F6&B2' F4'&B0 F7&B3' F5'&B1 F8&B4' F6'&B2 F9&B5' F7'&B3 "
    "B6' F8'&B4 B7' F9'&B5 B8' B6 I9' I7 W9' I8 W7 I9 W8 W9",
    2: "F0 F1 F2 F0' F3 F1' F4 F2' I0' W0' F3' F5&B1' F4'&B0 F6&B2' F5'&B1 F7&B3' F6'&B2 F8&B4' F7'&B3 F9&B5' "
    "F8'&B4 B6' F9'&B5 B7' B6 B8' I7 I9' I8 W7 I9 W9' W8 W9",
    3: "F0 F0' F1 F1' F2 F2' F3 F3' F4 B0' F4'&B0 F5&B1' F5'&B1 F6&B2' F6'&B2 F7&B3' F7'&B3 F8&B4' F8'&B4 F9&B5' "
    "F9'&B5 B6' B6 B7' B7 I8' I8 I9' I9 W8' W8 W9' W9",
    7: "F0' F1' F2' F3' F4' F5' F6' F0 I0 W0 F1 I1 W1 F2 I2 W2 F3 F7'&B3 F4&B0' F8'&B4 F5&B1' F9'&B5 F6&B2' "
    "B6 F7&B3' B7 F8&B4' B8 F9&B5' B9 I6' W6' I7' W7' I8' W8' I9' W9'",
}
"""Rows of the report's figure: 8 ranks, 20 micro-batches, as DeepSeek's own code gives them."""


def words(schedule, rank: int) -> list[str]:
    return [word(schedule, rank, cell) for cell in schedule.rows[rank]]


def prime_swapped(text: str) -> str:
    return re.sub(r"(\d+)('?)", lambda match: match[1] + ("" if match[2] else "'"), text)


def test_fig5_dualpipe_of_eight_ranks_and_twenty_micro_batches():
    schedule = check(SCHEDULES["dualpipe"](8, 20))
    for rank, row in FIGURE_5.items():
        assert " ".join(words(schedule, rank)) == row
    for rank in range(4):
        assert words(schedule, 7 - rank) == prime_swapped(" ".join(words(schedule, rank))).split()


def test_fig5_dualpipev_is_the_figures_upper_half():
    schedule = check(SCHEDULES["dualpipev"](4, 10))
    for rank in range(4):
        cells = [
            "&".join(f"{chunk.kind}{chunk.mb}{chr(39) * (chunk.stage.index >= 4)}" for chunk in cell)
            for cell in schedule.rows[rank]
        ]
        assert " ".join(cells) == FIGURE_5[rank]
    assert [schedule.held(rank) for rank in range(4)] == [[(0, rank), (0, 7 - rank)] for rank in range(4)]


def test_counts_of_the_reports_own_run():
    """16 stages, 120 micro-batches: 97 pairs at the ends, 103 in the middle."""
    schedule = SCHEDULES["dualpipe"](16, 120)
    counts = [Counter("".join(chunk.kind for chunk in cell) for cell in row) for row in schedule.rows]
    assert counts[0] == counts[15] == {"FB": 97, "F": 23, "B": 8, "I": 15, "W": 15}
    assert counts[7] == counts[8] == {"FB": 103, "F": 17, "B": 9, "I": 8, "W": 8}


def test_1f1b_and_zb1p_written_out():
    assert to_text(SCHEDULES["1f1b"](2, 3)) == "1f1b, 2 stages\n0: F0 F1 B0 F2 B1 B2\n1: F0 B0 F1 B1 F2 B2\n"
    assert to_text(SCHEDULES["zb1p"](2, 3)) == (
        "zb1p, 2 stages\n0: F0 F1 I0 W0 F2 I1 W1 I2 W2\n1: F0 I0 F1 I1 W0 F2 I2 W1 W2\n"
    )
    assert to_text(SCHEDULES["interleaved-1f1b"](2, 2)).splitlines()[1] == (
        "0 2: F0@0 F1@0 F0@2 F1@2 B0@2 B1@2 B0@0 B1@0"
    )


@given(cases(most_ranks=10))
def test_every_schedule_is_sound_and_so_is_its_forward_half(case):
    schedule = made(case)
    check(schedule)
    forward = check(forward_only(schedule))
    assert forward.microbatches == schedule.microbatches
    assert {chunk.kind for _, _, chunk in forward.chunks()} == {Kind.F}
    assert sum(map(len, forward.rows)) == schedule.stages * sum(schedule.microbatches)


@given(cases(), st.integers(1, 12))
def test_evaluation_may_take_the_first_micro_batches(case, count):
    schedule = made(case)
    count = min(count, sum(schedule.microbatches))
    assert sum(check(forward_only(schedule, count)).microbatches) == count


@given(cases())
def test_each_rank_does_every_micro_batch_of_its_stages_once(case):
    schedule = made(case)
    done = Counter((chunk.kind, chunk.stage, chunk.mb) for _, _, chunk in schedule.chunks())
    assert set(done.values()) == {1}
    for pipe, count in enumerate(schedule.microbatches):
        stages = [stage for stage in schedule.rank_of if stage.pipe == pipe]
        assert len(stages) == schedule.stages
        for kinds in ((Kind.F,), (Kind.B, Kind.I), (Kind.B, Kind.W)):
            assert sum(done[kind, s, mb] for kind in kinds for s in stages for mb in range(count)) == (
                count * len(stages)
            )


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(-1, 12), st.integers(-1, 30))
def test_a_refusal_names_a_number_that_is_accepted(name, ranks, microbatches):
    """At most one number of each is wrong, so two refusals at most."""
    for _ in range(3):
        try:
            check(SCHEDULES[name](ranks, microbatches))
            return
        except ScheduleError as error:
            text = str(error)
        if taken := re.search(r"take (\d+)( or more)?( of each)?", text):
            number = int(taken[1])
            if taken[3]:
                ranks, microbatches = max(ranks, number), max(microbatches, number)
            elif re.match(r"-?\d+ ranks", text):
                ranks = number
            else:
                assert microbatches < number <= max(2 * ranks, microbatches + ranks)
                microbatches = number
    raise AssertionError(f"{name} refuses what it named: {text}")


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "per_rank", "says"),
    [
        ("dualpipe", 7, 20, None, "must be even: take 8"),
        ("dualpipe", 8, 14, None, "even number of at least 16: take 16"),
        ("dualpipe", 8, 21, None, "take 22"),
        ("dualpipev", 4, 7, None, "needs at least 8: take 8"),
        ("interleaved-1f1b", 4, 10, None, "rounds of 4, one a rank: take 12"),
        ("1f1b", 4, 8, 2, "1F1B has one: take interleaved-1f1b"),
        ("zb1p", 4, 8, 2, "ZB1P has one"),
        ("dualpipe", 4, 8, 1, "DualPipe has two"),
        ("dualpipev", 4, 8, 3, "DualPipeV has two"),
        ("interleaved-1f1b", 4, 8, 0, "take 1 or more"),
        ("1f1b", 0, 8, None, "take 1 or more of each"),
    ],
)
def test_refusals_say_what_is_allowed(name, ranks, microbatches, per_rank, says):
    with pytest.raises(ScheduleError, match=re.escape(says)):
        SCHEDULES[name](ranks, microbatches, per_rank)
