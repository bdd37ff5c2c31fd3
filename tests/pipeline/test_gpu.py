"""The executor on a GPU, all ranks of a schedule on one device: losses exact, gradients up to the kernels' own noise.

Attention's backward adds with atomics there, so two runs of the plain loop differ as well; the bound is some times what
they were seen to differ by.
"""

import copy

import pytest
import torch

from counterflow.benchmark.equality import (
    Layout,
    compare,
    run_plain,
    samples_of,
    settings_of,
    small_model,
)
from counterflow.schedule import SCHEDULES

pytestmark = pytest.mark.gpu

SIZES = {
    "hidden_size": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "moe_intermediate_size": 32,
    "dense_intermediate_size": 64,
}
"""Multiples of 16, as the GPU's grouped products ask for."""
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(("name", "ranks"), [(name, 4) for name in SCHEDULES] + [("dualpipev", 1)])
def test_losses_and_gradients_of_a_step_are_the_plain_loops(name, ranks, dtype):
    model = small_model(SCHEDULES[name](ranks, 4 * ranks).stages, 1, **SIZES).cuda()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    worst = compare(Layout(name, ranks, 2 * ranks, length=12), model, bound=BOUND[dtype])
    print(f"{name} {dtype}: {worst}")


@pytest.mark.parametrize("dtype", BOUND)
def test_the_plain_loop_differs_from_itself_by_less_than_the_bound(dtype):
    model = small_model(4, 1, **SIZES).cuda()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    layout = Layout("1f1b", 2, 4)
    samples = samples_of(layout, model.config, 0)[0].cuda()
    (one, first), (two, second) = (
        run_plain(copy.deepcopy(model), samples, settings_of(layout)) for _ in range(2)
    )
    assert all(torch.equal(first.nll[depth], second.nll[depth]) for depth in first.nll)
    for name, gradient in one.items():
        assert (gradient - two[name]).abs().max() <= BOUND[dtype] * gradient.abs().max(), name
