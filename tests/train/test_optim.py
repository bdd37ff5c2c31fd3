"""The flat optimizer against PyTorch's per-parameter AdamW and clipping."""

from dataclasses import replace

import pytest
import torch

from counterflow.config.run import Train
from counterflow.model.debts import Ledger
from counterflow.train.optim import Optimizer
from tests.model.configs import BASE, random_model

CONFIG = replace(BASE, num_layers=2, num_mtp_modules=1)
DEVICE = torch.device("cpu")


def test_steps_equal_torch_adamw_with_decay_on_matrices_only():
    """Given the same gradients; exact but for the order of the norm's sum, 1e-6 relative."""
    train = Train(clip_norm=0.05)
    model, other = random_model(CONFIG), random_model(CONFIG)
    optimizer = Optimizer(list(model.named_parameters()), train, DEVICE)
    groups = [
        {"params": [p for p in other.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in other.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    in_order = [parameter for _, parameter in sorted(other.named_parameters())]
    for seed in range(3):
        samples = torch.randint(0, CONFIG.vocab_size, (2, 9), generator=torch.Generator().manual_seed(seed))
        model(samples, mtp_weight=0.3, ledger=Ledger()).total.backward()
        optimizer.drain()
        for (_, gradient), parameter in zip(sorted(optimizer.gradients()), in_order):
            parameter.grad = gradient.clone()
        expected = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.05)
        norm = optimizer.norm()
        assert torch.isclose(norm, expected, rtol=1e-6)
        optimizer.clip(norm)
        optimizer.step(0.01)
        adam.step()
        adam.zero_grad()
    assert not optimizer.buckets[0].grad.any()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters()):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7), name


def test_bf16_weights_are_the_rounded_masters_and_small_steps_are_not_lost():
    model = random_model(CONFIG)
    optimizer = Optimizer(list(model.named_parameters()), Train(precision="bf16", weight_decay=0.0), DEVICE)
    (bucket,) = optimizer.buckets
    before = bucket.master.clone()
    for _ in range(4):
        bucket.grad.fill_(1.0)
        optimizer.step(1e-5)  # far below bf16's resolution of most weights
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert torch.equal(bucket.weights, bucket.master.bfloat16())
    moved = torch.cat(
        [(before - bucket.master)[i.start : i.start + i.shape.numel()] for i in bucket.intervals]
    )
    assert torch.allclose(moved, torch.full_like(moved, 4e-5), atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_intervals_cover_every_parameter_once_and_carry_gradients(precision):
    model = random_model(CONFIG)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    optimizer = Optimizer(list(model.named_parameters()), Train(precision=precision), DEVICE)
    (bucket,) = optimizer.buckets
    assert {interval.name: interval.shape.numel() for interval in bucket.intervals} == sizes
    model(torch.randint(0, CONFIG.vocab_size, (1, 20)), mtp_weight=0.3, ledger=Ledger()).total.backward()
    optimizer.drain()
    untouched = [name for name, gradient in optimizer.gradients() if not gradient.any()]
    assert untouched == []
    assert len(optimizer.pieces()) == 3 * len(sizes) + 1
