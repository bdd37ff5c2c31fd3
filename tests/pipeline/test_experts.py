"""One step with shared experts under schedules, in float64; `python -m bench.campaign layouts` draws many more."""

import random

import pytest
import torch

from counterflow.benchmark.equality import Layout, draw, small_model
from counterflow.benchmark.equality_experts import compare
from counterflow.schedule import SCHEDULES

CASES = [
    Layout("dualpipe", 2, 4, 2, expert=2),
    Layout("dualpipe", 4, 8, 2, expert=2, length=7),
    Layout("1f1b", 4, 5, 2, expert=2, micro_batch_size=2),
    Layout("1f1b", 2, 3, 4, expert=4, dispatch="two_hop", node_ranks=2, recompute="attention"),
    Layout("zb1p", 2, 3, 4, expert=2, dispatch="two_hop", node_ranks=1),
    Layout("dualpipev", 1, 4, 8, expert=8, dispatch="two_hop", node_ranks=4),
    Layout("interleaved-1f1b", 2, 4, 2, expert=2),
]


@pytest.mark.parametrize(
    "layout", CASES, ids=lambda layout: f"{layout.schedule}-{layout.ranks}x{layout.expert}"
)
def test_losses_gradients_and_routing_are_the_plain_loops(layout):
    stages = SCHEDULES[layout.schedule](layout.ranks, 4 * layout.ranks).stages
    assert 0 < compare(layout, small_model(stages, 1).double()) < 1e-10


@pytest.mark.parametrize("dispatch, depth", [("nvlink", 0), ("copy_engine", 1)])
def test_our_kernels_carry_a_step_of_dualpipe(dispatch, depth):
    """In Triton's interpreter, some milliseconds a row; their gates travel as fp32."""
    layout = Layout("dualpipe", 2, 4, 2, expert=2, dispatch=dispatch, length=3)
    assert 0 < compare(layout, small_model(SCHEDULES["dualpipe"](2, 8).stages, depth).double()) < 1e-6


def test_drawn_layouts_share_experts():
    generator, seen = random.Random(5), 0
    torch.set_num_threads(1)
    while seen < 3:
        layout, depth = draw(generator)
        if layout.expert > 1 and layout.ranks * layout.data_ranks <= 8:
            stages = SCHEDULES[layout.schedule](layout.ranks, 4 * layout.ranks).stages
            compare(layout, small_model(stages, depth, seen).double(), seen)
            seen += 1
