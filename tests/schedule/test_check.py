"""Each class of mistake is found, and the message shows its cell."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from counterflow.errors import ScheduleError
from counterflow.schedule import SCHEDULES
from counterflow.schedule.check import check
from counterflow.schedule.text import ARROW, from_text
from counterflow.schedule.transfers import Channel, transfers
from counterflow.schedule.words import Carried, Chunk, Kind, Product, Schedule, StageId
from tests.schedule.cases import cases, made

pytestmark = pytest.mark.pure


def with_row(schedule: Schedule, rank: int, row) -> Schedule:
    rows = [*schedule.rows]
    rows[rank] = tuple(row)
    return Schedule(schedule.name, schedule.stages, tuple(rows))


def refused(schedule: Schedule) -> str:
    with pytest.raises(ScheduleError) as caught:
        check(schedule)
    return str(caught.value)


def assert_shows(message: str, rank: int, cell: str) -> None:
    """The arrow is on the rank's line and the cell is marked there."""
    (line,) = [line for line in message.splitlines() if line.endswith(ARROW)]
    assert line.startswith(f"  rank {rank}: ") and f">{cell}<" in line, message


@given(cases(), st.data())
def test_a_removed_cell_is_missed(case, data):
    schedule = made(case)
    rank = data.draw(st.integers(0, schedule.ranks - 1))
    row = schedule.rows[rank]
    at = data.draw(st.integers(0, len(row) - 1))
    assume(sum(map(len, schedule.rows)) > 2)  # of F0 B0 alone, F0 is a sound forward
    message = refused(with_row(schedule, rank, row[:at] + row[at + 1 :]))
    assert "nothing gives" in message or "no rank has stage" in message


@given(cases(), st.data())
def test_a_doubled_cell_is_found_where_it_comes_again(case, data):
    schedule = made(case)
    rank = data.draw(st.integers(0, schedule.ranks - 1))
    row = schedule.rows[rank]
    at = data.draw(st.integers(0, len(row) - 1))
    message = refused(with_row(schedule, rank, (*row[: at + 1], row[at], *row[at + 1 :])))
    assert f"rank {rank}, cell {at + 1}: the " in message and f"was given before, in cell {at}." in message
    (line,) = [line for line in message.splitlines() if line.endswith(ARROW)]
    assert line.startswith(f"  rank {rank}: ")


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "interleaved-1f1b", "dualpipe", "dualpipev"])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_backward_before_its_forward_is_a_deadlock(name, rank):
    schedule = SCHEDULES[name](4, 8)
    row = list(schedule.rows[rank])
    at = next(place for place, cell in enumerate(row) if cell[0].kind is not Kind.F)
    first = next(place for place, cell in enumerate(row) if cell[0].mb == row[at][0].mb)
    row[first], row[at] = row[at], row[first]
    message = refused(with_row(schedule, rank, row))
    assert "deadlock: it waits for the " in message and ARROW in message


def test_two_ranks_that_wait_for_each_other():
    text = "x, 2 stages\n0: F0 B0 F1 B1\n1: F0 F1 B0 B1\n"
    message = refused(from_text(text))
    assert message.startswith(
        "x, rank 0, cell 1: deadlock: it waits for the dx of micro-batch 0 at stage 1, which rank 1 gives in B0, and "
        "that waits in turn."
    )
    assert_shows(message, 0, "B0")


def test_a_stage_on_two_ranks():
    schedule = SCHEDULES["1f1b"](3, 3)
    rows = [*schedule.rows[:2], (*schedule.rows[2], schedule.rows[1][0])]
    message = refused(Schedule("1f1b", 3, tuple(rows)))
    assert message.startswith("1f1b, rank 2, cell 6: stage 1 is on rank 1 too; keep it on one.")
    assert_shows(message, 2, "F0@1")


def test_a_micro_batch_that_overlaps_with_its_own_backward():
    message = refused(from_text("x, 1 stages\n0: F0 F1&B0 F2&B2 B1\n"))
    assert message.startswith("x, rank 0, cell 2: a micro-batch cannot overlap with its own backward.")
    assert_shows(message, 0, "F2&B2")


@pytest.mark.parametrize("cell", ["F1&F2", "B0&B1", "F1&W0", "F1&B0&W0"])
def test_cells_that_are_no_cells(cell):
    message = refused(from_text(f"x, 1 stages\n0: F0 {cell}\n"))
    assert "x, rank 0, cell 1: a cell is one chunk, or one forward and one backward" in message
    assert_shows(message, 0, cell)


def test_a_need_that_nothing_gives():
    message = refused(from_text("x, 2 stages\n0: F0 B0\n1: F0 F1 B0\n"))
    assert "x, rank 1, cell 1: it needs the x of micro-batch 1 at stage 0, which nothing gives." in message
    assert_shows(message, 1, "F1")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x, 2 stages\n0: F0 B0\n", "no rank has stage 1"),
        ("x, 1 stages\n0: F0 B0\n1: F0 B0\n", "stage 1 is beyond the last, 0"),
        (
            "x, 1 stages\n0: F0 F1 B0\n",
            "nothing gives the dx of micro-batch 1 at stage 0; what its forward keeps",
        ),
        ("x, 1 stages\n0: F0 F1 I0 W0 I1\n", "nothing gives the dw of micro-batch 1"),
        ("x, 1 stages\n0: F0 F2 B0 B2\n", "nothing gives the x of micro-batch 1 at stage 0: add F1"),
        ("x, 1 stages\n0:\n", "there is nothing to do"),
    ],
)
def test_what_is_left_out(text, says):
    assert says in refused(from_text(text))


def test_sound_schedules_by_hand_are_accepted():
    for text in (
        "x, 1 stages\n0: F0 B0\n",
        "x, 2 stages\n0 1: F0@0 F0@1 F1@0&B0@1 B0@0 F1@1 I1@1 I1@0 W1@0 W1@1\n",
        "x, 2 stages\n0 1': F0 F0' F1 F1' B0' B0 B1' B1\n1 0': F0' F0 F1' F1 B0 B0' B1 B1'\n",
    ):
        check(from_text(text))


def test_a_link_that_would_deliver_out_of_order():
    message = refused(from_text("x, 2 stages\n0: F0 F1 B0 B1\n1: F1 F0 B0 B1\n"))
    assert message.startswith(
        "rank 1 needs x of micro-batch 1 at stage 0 where rank 0 sends x of micro-batch 0 at stage 0; a link delivers "
        "in order"
    )
    assert_shows(message, 1, "F1")


@given(cases())
def test_channels_carry_every_product_that_another_rank_needs_once(case):
    schedule = made(case)
    found = transfers(schedule)
    every = [product for products in found.values() for product in products]
    assert len(every) == len(set(every))
    crossing = [
        (stage, StageId(stage.pipe, stage.index + 1))
        for stage in schedule.rank_of
        if stage.index + 1 < schedule.stages
        and schedule.rank_of[stage] != schedule.rank_of[StageId(stage.pipe, stage.index + 1)]
    ]
    assert len(every) == 2 * sum(schedule.microbatches[stage.pipe] for stage, _ in crossing)
    for channel, products in found.items():
        assert {product.what for product in products} == {channel.what}
        assert {schedule.rank_of[product.stage] for product in products} == {channel.sender}


def test_one_link_for_x_and_dx_would_be_out_of_order_and_two_are_not():
    """Why channels are kept apart: rank 0 of DualPipe on 8 ranks makes x5 x6 dx0', rank 1 needs x5 dx0' … x6."""
    found = transfers(SCHEDULES["dualpipe"](8, 20))
    forward, backward = found[Channel(0, 1, Carried.X)], found[Channel(0, 1, Carried.DX)]
    assert forward == tuple(Product(Carried.X, StageId(0, 0), mb) for mb in range(10))
    assert backward == tuple(Product(Carried.DX, StageId(1, 7), mb) for mb in range(10))
    row = SCHEDULES["dualpipe"](8, 20).rows[1]
    order = [chunk for cell in row for chunk in cell]
    assert order.index(Chunk(Kind.I, StageId(1, 6), 0)) < order.index(Chunk(Kind.F, StageId(0, 1), 6))
