"""The depth that pays is found from times and acceptance, and left again when they change. Times here are given."""

import pytest

from counterflow.infer.depth import Depth
from counterflow.infer.statistics import Statistics

pytestmark = pytest.mark.pure


def settle(depth: Depth, sequences: int, draft_s: float, verify_s, kept, steps: int = 400) -> list[int]:
    """Steps in which every draft costs `draft_s`, a verify of r rows `verify_s(r)`, and `kept(d)` drafts of d stay."""
    chosen = []
    for _ in range(steps):
        d = depth.choose(sequences)
        chosen.append(d)
        depth.record(sequences, d, draft_s * d, verify_s(1 + d))
        depth.count([d] * sequences, [kept(d)] * sequences)
    return chosen


def test_cheap_drafts_that_are_kept_go_to_the_full_depth():
    depth = Depth(3, adapt=True)
    chosen = settle(depth, 1, 0.1, lambda rows: 1.0, lambda d: d)
    assert chosen.count(3) > 350 and depth.best(1) == 3
    assert depth.speed_up(1, 3) == pytest.approx(4 / 1.3)
    assert depth.speed_up(1, 0) == 1.0


def test_drafts_get_shorter_where_the_second_is_never_kept():
    depth = Depth(3, adapt=True)
    settle(depth, 1, 0.1, lambda rows: 1.0, lambda d: min(d, 1))
    assert depth.best(1) == 1 and depth.expected(3) == 2.0


def test_drafts_stop_where_a_verify_costs_its_rows_and_go_on_at_another_size():
    depth = Depth(2, adapt=True)
    settle(depth, 32, 0.1, lambda rows: float(rows), lambda d: d // 2)
    chosen = settle(depth, 1, 0.1, lambda rows: 1.0, lambda d: d // 2)
    assert depth.best(32) == 0 and depth.best(1) > 0
    assert chosen[-1] == depth.best(1) or chosen.count(depth.best(1)) > 300


def test_other_depths_are_tried_again_and_a_change_is_found():
    depth = Depth(1, adapt=True)
    assert set(settle(depth, 1, 5.0, lambda rows: 1.0, lambda d: d)) == {0, 1}
    assert depth.best(1) == 0
    settle(depth, 1, 0.1, lambda rows: 1.0, lambda d: d, steps=2000)
    assert depth.best(1) == 1


def test_without_adapting_the_depth_stays():
    depth = Depth(2, adapt=False)
    assert set(settle(depth, 4, 9.0, lambda rows: 9.0 * rows, lambda d: 0)) == {2}
    assert Depth(0, adapt=True).choose(5) == 0


def test_statistics_by_position():
    statistics = Statistics()
    for drafted, kept in ((3, 0), (3, 3), (3, 1), (0, 0), (1, 1)):
        statistics.count(drafted, kept)
    assert (statistics.reached, statistics.kept) == ([4, 2, 1], [3, 1, 1])
    assert statistics.acceptance == [0.75, 0.5, 1.0] and statistics.accepted_length == 9 / 4


def test_a_position_that_no_draft_reached_has_no_acceptance():
    statistics = Statistics()
    statistics.count(2, 0)
    assert statistics.acceptance == [0.0, 0.0] and statistics.accepted_length == 1.0
