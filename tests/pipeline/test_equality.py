"""One step under every schedule against the plain loop.

`python -m bench.campaign layouts` draws hundreds more.
"""

import random
from dataclasses import replace

import pytest
import torch

from counterflow.benchmark.equality import Layout, compare, draw, small_model
from counterflow.errors import ConfigError
from counterflow.plan.stages import stage_plans, units, without_mtp
from counterflow.schedule import SCHEDULES
from counterflow.schedule.words import Part

CASES = [(name, ranks, depth) for name in SCHEDULES for ranks, depth in ((2, 0), (2, 1), (4, 2))]
CASES += [("dualpipe", 8, 1), ("dualpipev", 1, 1)]


@pytest.mark.parametrize(("name", "ranks", "depth"), CASES)
def test_losses_and_gradients_of_a_step_are_the_plain_loops(name, ranks, depth):
    stages = SCHEDULES[name](ranks, 4 * ranks).stages
    model = small_model(stages, depth)
    worst = compare(Layout(name, ranks, 2 * ranks, length=6), model)
    assert worst["exact"] == 0.0
    if depth == 0 and not name.startswith("dual"):
        assert worst["summed"] == 0.0


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_too(name, dtype):
    stages = SCHEDULES[name](2, 8).stages
    model = small_model(stages, 1)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    assert compare(Layout(name, 2, 6 if name != "zb1p" else 3, data_ranks=2), model)["exact"] == 0.0


@pytest.mark.parametrize("seed", range(8))
def test_drawn_layouts(seed):
    generator = random.Random(seed)
    layout, depth = draw(generator)
    while layout.ranks * layout.data_ranks > 6:
        layout, depth = draw(generator)
    stages = SCHEDULES[layout.schedule](layout.ranks, 4 * layout.ranks).stages
    compare(layout, small_model(stages, depth, seed), seed)


def test_placement_says_what_it_means():
    config = replace(small_model(4, 2).config, num_layers=4)
    assert [unit.name for unit in units(config)] == ["embed", *["layer"] * 4, "head", "mtp", "mtp"]
    plans = stage_plans(config, 3, "embed 1 | 3 head | 2mtp")
    assert [part for part, _ in plans[0]] == [Part.EMBED, Part.ATTN, Part.MLP]
    assert plans[2][0] == (Part.MERGE, 1) and plans[2][-1] == (Part.HEAD, 2)
    assert without_mtp(plans[2], config) == () and without_mtp(plans[1], config) == plans[1]
    for wrong in (
        "embed 4 head 2mtp",
        "embed 5 | head | 2mtp",
        "4 embed | head | 2mtp",
        "embed | | 4 head 2mtp",
        "e",
    ):
        with pytest.raises(ConfigError, match=r"parallel\.placement is"):
            stage_plans(config, 3, wrong)
    with pytest.raises(ConfigError, match="take fewer stages or more layers"):
        stage_plans(config, 9)


def test_the_default_cut_is_the_lightest():
    plans = stage_plans(small_model(8, 1).config, 4)
    assert sum(plans, ()) == sum(stage_plans(small_model(8, 1).config, 1), ())
