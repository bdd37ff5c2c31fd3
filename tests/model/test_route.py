"""Routing and balancing, item by item of the paper."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.config.model import ModelConfig
from counterflow.model import balance, route
from tests.model.configs import BASE


def scores_of(tokens: int, config: ModelConfig, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return route.affinities(torch.randn(tokens, config.num_routed_experts, generator=generator))


def chosen_plainly(biased: list[float], config: ModelConfig) -> set[int]:
    size = config.experts_per_group
    group = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(config.num_groups)]
    kept = sorted(range(config.num_groups), key=lambda g: group[g])[-config.num_limited_groups :]
    allowed = [e for e in range(config.num_routed_experts) if e // size in kept]
    return set(sorted(allowed, key=lambda e: biased[e])[-config.num_experts_per_token :])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([(1, 1), (3, 1), (3, 2), (3, 3), (6, 4)]),
    st.sampled_from([0.0, 5.0]),
)
def test_eq14_eq16_choice_equals_a_plain_search(seed, groups, spread):
    config = replace(BASE, num_groups=groups[0], num_limited_groups=groups[1], num_experts_per_token=2)
    scores = scores_of(7, config, seed)
    bias = torch.randn(12, generator=torch.Generator().manual_seed(seed + 1)) * spread - spread
    ids = route.choose(scores, bias, config)
    for row, biased in zip(ids.tolist(), (scores + bias).tolist()):
        assert set(row) == chosen_plainly(biased, config)


def test_eq13_gates_sum_to_the_scaling_factor_even_when_scores_underflow():
    scores = torch.tensor([[0.9, 0.3, 0.6], [0.0, 0.0, 0.0]])
    gates = route.gates(scores, torch.tensor([[0, 2], [1, 2]]), 2.5)
    assert torch.allclose(gates[0], torch.tensor([1.5, 1.0]))
    assert torch.equal(gates[1], torch.zeros(2))


def test_eq15_affinities_are_sigmoids():
    logits = torch.tensor([[0.0, 100.0, -100.0]])
    assert torch.allclose(route.affinities(logits), torch.tensor([[0.5, 1.0, 0.0]]))


def test_eq16_bias_picks_but_does_not_weigh():
    config = replace(BASE, num_groups=1, num_limited_groups=1)
    scores = scores_of(5, config, 0)
    bias = torch.zeros(12)
    bias[7] = 10.0
    ids = route.choose(scores, bias, config)
    assert (ids == 7).any(-1).all()
    gates = route.gates(scores, ids, 1.0)
    chosen = scores.gather(1, ids)
    assert torch.allclose(gates, chosen / chosen.sum(-1, keepdim=True))


def test_losing_groups_stay_out_when_kept_scores_are_negative():
    """With every biased score below 0, a mask of 0 would let the losing groups win."""
    config = replace(BASE, num_groups=3, num_limited_groups=1, num_experts_per_token=3)
    scores, bias = scores_of(9, config, 1), torch.full((12,), -3.0)
    groups = route.choose(scores, bias, config) // config.experts_per_group
    assert (groups == groups[:, :1]).all()


def test_loads_are_exact_integers():
    ids = torch.tensor([[0, 2], [2, 1], [2, 0]])
    counts = route.loads(ids, 4)
    assert counts.dtype == torch.int64 and counts.tolist() == [2, 1, 3, 0]


def test_bias_step_moves_against_the_load_of_the_whole_batch():
    bias, counts = torch.zeros(2, 4), torch.tensor([[9, 1, 5, 5], [2**53, 2**53 + 4, 2**53 - 4, 2**53]])
    balance.step_bias(bias, counts, 0.25)
    assert bias.tolist() == [[-0.25, 0.25, 0.0, 0.0], [0.0, -0.25, 0.25, 0.0]]
    balance.step_bias(bias, counts, 0.0)
    assert bias[0, 0] == -0.25


def test_max_violation():
    violation = balance.max_violation(torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [0, 0, 0, 0]]))
    assert violation[:2].tolist() == [0.0, 3.0]


def test_eq17_to_20_sequence_loss_is_alpha_when_even_and_grows_when_not():
    even = torch.full((1, 4, 4), 0.5) + torch.eye(4)[None] * 0.1
    assert abs(balance.sequence_loss(even, 1, 0.1).item() - 0.1) < 1e-6
    skewed = torch.full((1, 4, 4), 0.1)
    skewed[..., 2] = 0.9
    f_times_p = 4 * 0.9 / 1.2
    assert abs(balance.sequence_loss(skewed, 1, 0.1).item() - 0.1 * f_times_p) < 1e-6


def test_auxiliary_losses_count_every_choice_or_the_first():
    scores = torch.tensor([[0.8, 0.4, 0.2, 0.2], [0.8, 0.2, 0.4, 0.2]])
    ids = torch.tensor([[1, 0], [2, 0]])
    normal = scores / scores.sum(-1, keepdim=True)
    every = torch.tensor([0.5, 0.25, 0.25, 0.0]) * 4
    first = torch.tensor([1.0, 0.0, 0.0, 0.0]) * 4
    for name, f in (("switch", every), ("gshard", first)):
        settings_ = balance.Balance(auxiliary=name, auxiliary_alpha=0.5)
        leaf = scores.double().requires_grad_()
        loss = balance.auxiliary_loss(leaf, ids, settings_)
        loss.backward()
        assert torch.allclose(loss.float(), 0.5 * (f * normal.mean(0)).sum())
        inverse = 1 / scores.double().sum(-1, keepdim=True)
        by_hand = 0.5 / 2 * inverse * (f - (f * normal.double()).sum(-1, keepdim=True))
        assert torch.allclose(leaf.grad, by_hand)  # f is a count and has no gradient
