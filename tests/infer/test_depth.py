"""The depth that pays is found from times and acceptance, and left again when they change. Times here are drawn."""

import random
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from statistics import fmean

import pytest

from counterflow.infer.depth import Depth
from counterflow.infer.statistics import Statistics

pytestmark = pytest.mark.pure


def written(
    depth: Depth,
    sequences: int,
    step_s: Sequence[float],
    kept: Sequence[float],
    steps: int,
    dice: random.Random,
    noise: float = 0.0,
) -> list[tuple[int, float]]:
    """Depth, and seconds but for noise, of steps in which d drafts take `step_s[d]`, each kept as often as `kept` says.

    The first step of every depth compiles something for 50 steps' time, one step in a hundred takes three times as
    long, and modules that rested take two steps to catch up. The machine grows slower by half over the steps.
    """
    met, last, found = set(), depth.deepest, []
    for step in range(steps):
        d = depth.choose(sequences)
        extra = 50 * step_s[0] * (d not in met) + 2 * step_s[0] * (d > 0 and not last)
        seconds = step_s[d] * dice.lognormvariate(0, noise) * (3 if dice.random() < 0.01 else 1)
        seconds = seconds * (1 + 0.5 * step / steps) + extra
        stayed = []
        for _ in range(sequences):
            draws = [dice.random() < kept[position] for position in range(d)]
            stayed.append(next((position for position, stays in enumerate(draws) if not stays), d))
        depth.count([d] * sequences, stayed)
        depth.record(sequences, d, seconds, steady=not extra)
        met.add(d)
        last = d
        found.append((d, step_s[d] + extra))
    return found


TABLES = {
    "drafts pay": ([1, 1.18], [0.6]),
    "drafts hardly pay": ([1, 1.35], [0.4]),
    "none is a little faster": ([1, 1.46], [0.4]),
    "none is a tenth faster": ([1, 1.54], [0.4]),
    "none is far faster": ([1, 1.8], [0.3]),
    "two pay": ([1, 1.2, 1.4], [0.9, 0.9]),
    "one of two pays": ([1, 1.2, 1.5], [0.8, 0.2]),
    "none of three pays": ([1, 1.5, 2, 2.5], [0.4, 0.4, 0.4]),
}


@pytest.mark.parametrize("sequences", [1, 32])
@pytest.mark.parametrize("table", TABLES)
def test_from_the_64th_step_on_it_is_as_fast_as_the_best_fixed_depth(table, sequences):
    """Of 400 steps the rest against the best depth's own rate, in the mean of some texts: 3 % at most are lost, where
    times vary by 3 %."""
    step_s, kept = TABLES[table]
    expected = list(accumulate([1.0, *accumulate(kept, mul)]))
    best = max(expected[d] / step_s[d] for d in range(len(step_s)))
    shares = []
    for seed in range(6):
        depth, dice = Depth(len(kept), True), random.Random(seed)
        rest = written(depth, sequences, step_s, kept, 400, dice, noise=0.03)[64:]
        shares.append(sum(expected[d] for d, _ in rest) / sum(s for _, s in rest) / best)
    assert fmean(shares) > 0.97, shares


def test_another_batch_size_has_its_own_depth():
    depth, dice = Depth(2, True), random.Random(0)
    written(depth, 32, [1, 1.9, 2.8], [0.5, 0.5], 300, dice)
    written(depth, 1, [1, 1.1, 1.2], [0.5, 0.5], 300, dice)
    assert depth.best(32) == 0 and depth.best(1) == 2
    assert depth.needed(32) <= depth.needed(1) == 2


def test_texts_of_a_new_batch_size_are_ready_for_every_depth_that_is_to_be_tried():
    """Also where the size next to it drafts nothing, whose depth is tried first."""
    depth, dice = Depth(1, True), random.Random(0)
    written(depth, 8, [1, 1.9], [0.3], 100, dice)
    assert depth.best(8) == 0 and depth.needed(32) == 1
    written(depth, 32, [1, 1.2], [0.9], 100, dice)
    assert depth.best(32) == 1


def test_a_change_of_times_or_of_texts_is_found():
    depth, dice = Depth(1, True), random.Random(0)
    written(depth, 1, [1, 1.5], [0.1], 200, dice)
    assert depth.best(1) == 0
    written(depth, 1, [1, 1.5], [0.95], 1500, dice)
    assert depth.best(1) == 1
    written(depth, 1, [1, 2.5], [0.95], 1500, dice)
    assert depth.best(1) == 0


def test_texts_whose_modules_have_fallen_behind_are_asked_for_no_more_than_they_can():
    depth, dice = Depth(1, True), random.Random(0)
    written(depth, 4, [1, 1.1], [0.9], 100, dice)
    assert depth.best(4) == 1 and {depth.choose(4, 0) for _ in range(100)} == {0}


def test_without_adapting_the_depth_stays():
    depth = Depth(2, adapt=False)
    assert {d for d, _ in written(depth, 4, [1, 9, 18], [0, 0], 50, random.Random(0))} == {2}
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
