"""Copies of experts: the published example, and what holds for any load."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.errors import ConfigError
from counterflow.plan.placement import pack, place, replicate, unreplicated

pytestmark = pytest.mark.pure
LAYER_0 = [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]
LAYER_1 = [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]


@pytest.mark.parametrize(
    ("loads", "slots"),
    [
        (LAYER_0, (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1)),
        (LAYER_1, (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1)),
    ],
)
def test_sec3_4_redundant_experts_of_the_published_example(loads, slots):
    """EPLB's README: 16 replicas of 12 experts in 4 groups on 2 nodes of 4 GPUs."""
    assert place(loads, 16, 4, 2, 8).experts == slots


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=16, max_size=16), st.sampled_from([16, 24, 32]))
def test_every_expert_has_a_slot_and_groups_stay_on_a_node(loads, slots):
    found = place(loads, slots, 4, 2, 8)
    assert len(found.experts) == slots and min(found.copies) >= 1 and sum(found.copies) == slots
    half = slots // 2
    groups = [{expert // 4 for expert in found.experts[node * half : (node + 1) * half]} for node in (0, 1)]
    assert not groups[0] & groups[1]
    assert sum(found.gpu_loads) == pytest.approx(sum(loads))


def test_copies_even_out_a_skewed_load():
    draw = random.Random(1)
    loads = [draw.paretovariate(1.2) for _ in range(256)]
    before, after = unreplicated(loads, 32), place(loads, 288, 8, 4, 32)
    assert before.imbalance > 1.5 > after.imbalance
    assert place(loads, 288, 1, 1, 32).imbalance <= after.imbalance + 1e-9 or after.imbalance < 1.1


def test_no_greedy_step_is_worse_than_the_best_by_more_than_a_third():
    """Graham's bound for the heaviest first is 4/3; here against all splits of eight loads in two."""
    from itertools import combinations

    draw = random.Random(2)
    for _ in range(20):
        loads = [draw.random() for _ in range(8)]
        greedy = max(sum(loads[index] for index in one) for one in pack(loads, 2))
        best = min(
            max(sum(some), sum(loads) - sum(some))
            for some in (tuple(loads[i] for i in chosen) for chosen in combinations(range(8), 4))
        )
        assert greedy <= best * 4 / 3


def test_the_heaviest_a_copy_is_copied_next():
    assert replicate([10.0, 6.0, 1.0], 6) == [0, 1, 2, 0, 1, 0]


def test_what_gpus_bear_sums_to_what_experts_do_also_where_these_do_not_divide():
    loads = [10] * 8 + [100] * 4
    before, after = unreplicated(loads, 8), place(loads, 16, 4, 1, 8)
    assert before.gpu_loads == [20, 20, 20, 20, 100, 100, 100, 100]
    assert sum(before.gpu_loads) == sum(after.gpu_loads) == sum(loads)
    assert before.imbalance == pytest.approx(100 / 60) and after.imbalance < before.imbalance
    assert unreplicated([1] * 16, 20).gpu_loads == [1] * 16 + [0] * 4
    assert unreplicated([1] * 16, 20).imbalance == 1.25


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([1.0] * 12, 8, 4, 2, 8), "8 slots for 12 experts; every expert needs one: take 12"),
        (([1.0] * 12, 16, 5, 2, 8), "groups must divide the experts"),
        (([1.0] * 12, 18, 4, 2, 8), "GPUs the slots"),
        (([], 16, 4, 2, 8), "empty or negative"),
        (([1.0] * 11 + [float("inf")], 16, 4, 2, 8), "beyond all numbers"),
        (([1.0] * 11 + [float("nan")], 16, 4, 2, 8), "beyond all numbers"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(arguments, says):
    with pytest.raises(ConfigError, match=says):
        place(*arguments)
