"""Losses, counts and every gradient against the plain loop in float64; what must not count does not."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from counterflow.config.model import Balance
from counterflow.errors import ConfigError
from counterflow.model.debts import Ledger
from counterflow.model.transformer import Transformer
from tests.model.configs import BASE, random_model
from tests.model.plain import Plain

TINY = replace(
    BASE, num_layers=2, hidden_size=24, num_heads=2, kv_lora_rank=12, q_lora_rank=10, vocab_size=31
)
CONFIGS = {
    "latent": replace(TINY, num_mtp_modules=1, balance=Balance(sequence_alpha=0.03)),
    "no_latent": replace(TINY, q_lora_rank=0, num_shared_experts=0, balance=Balance(sequence_alpha=0.0)),
    "two_depths": replace(TINY, num_mtp_modules=2, num_dense_layers=2),
    "three_depths": replace(TINY, num_mtp_modules=3, num_dense_layers=0, num_shared_experts=2),
}
BOUND = 1e-9
"""float64 against float64 through some thousand operations; measured 1e-14 to 1e-12."""


def double(name: str) -> tuple[Transformer, torch.Tensor]:
    model = random_model(CONFIGS[name]).double()
    return model, torch.randint(0, TINY.vocab_size, (2, 8), generator=torch.Generator().manual_seed(3))


def plain_gradients(model: Transformer, samples: torch.Tensor):
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    plain = Plain(model.config, weights)
    results = [plain.sample(sample, mtp_weight=0.3) for sample in samples]
    total = sum(total + sum(losses) for total, _, _, losses in results) / len(samples)
    total.backward()
    counts = torch.tensor([counts for _, _, counts, _ in results]).sum(0)
    return total.detach(), weights, counts, [sum(sums) for sums in zip(*(sums for _, sums, _, _ in results))]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= BOUND * b.abs().max().clamp_min(1e-6))


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_counts_and_gradients_equal_the_plain_loop(name):
    model, samples = double(name)
    total, weights, counts, sums = plain_gradients(model, samples)
    losses = model(samples, mtp_weight=0.3)
    losses.total.backward()
    assert close(losses.total.detach(), total)
    assert torch.equal(losses.counts, counts) if counts.numel() else losses.counts.numel() == 0
    for ours, theirs in zip(losses.nll, sums, strict=True):
        assert close(ours, theirs.detach())
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert close(parameter.grad, weights[parameter_name].grad), parameter_name


@pytest.mark.parametrize("owing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_owed_gradients_equal_those_paid_at_once(name, owing):
    model, samples = double(name)
    _, weights, _, _ = plain_gradients(model, samples)
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    ledger = Ledger(owing)
    model(samples, mtp_weight=0.3, ledger=ledger).total.backward()
    matrices = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    on_the_spot = {"embed.weight", "head"}
    if owing:
        assert len(ledger) == len(matrices) - len(on_the_spot)
        assert all(not p.main_grad.any() for name, p in matrices.items() if name not in on_the_spot)
        ledger.pay()
    assert len(ledger) == 0
    for parameter_name, parameter in model.named_parameters():
        gradient = parameter.main_grad if parameter.dim() > 1 else parameter.grad
        assert close(gradient, weights[parameter_name].grad), parameter_name


def test_microbatches_add_up_to_the_batch():
    model, samples = double("latent")
    whole = torch.autograd.grad(model(samples, mtp_weight=0.3).total, list(model.parameters()))
    scale = 1.0 / (samples.shape[0] * (samples.shape[1] - 1))
    parts = [model(sample[None], scale=scale, mtp_weight=0.3) for sample in samples]
    summed = torch.autograd.grad(sum(part.total for part in parts), list(model.parameters()))
    assert all(close(a, b) for a, b in zip(summed, whole))
    assert torch.equal(sum(part.counts for part in parts), model(samples, mtp_weight=0.3).counts)


def gradients_of(model: Transformer, samples: torch.Tensor, ledger: Ledger | None):
    """Every weight's gradient, the counts, and the bytes kept between forward and backward."""
    kept = {}
    for parameter in model.parameters():
        wide = torch.promote_types(parameter.dtype, torch.float32)
        parameter.main_grad, parameter.grad = torch.zeros_like(parameter, dtype=wide), None

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(samples, mtp_weight=0.3, ledger=ledger)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    size = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in weights)
    losses.total.backward()
    if ledger is not None:
        ledger.pay()
    both = [p.main_grad if p.grad is None else p.main_grad + p.grad for p in model.parameters()]
    return both, losses.counts, size


@pytest.mark.parametrize("how", ["attention", "layer"])
@pytest.mark.parametrize(
    "ledger", [lambda: None, Ledger, lambda: Ledger(owing=True)], ids=["none", "paid", "owed"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_recomputation_changes_neither_counts_nor_gradients_and_keeps_less(how, ledger, dtype):
    model, samples = double("three_depths")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    bias = [buffer.clone() for buffer in model.buffers()]
    plain, counts, most = gradients_of(model, samples, ledger())
    model.recompute = how
    again, counts_again, less = gradients_of(model, samples, ledger())
    assert torch.equal(counts, counts_again)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert less < (0.4 if how == "layer" else 0.8) * most
    with torch.no_grad():
        model(samples)
    assert all(torch.equal(a, b) for a, b in zip(bias, model.buffers()))


def test_recomputation_lets_go_of_what_a_layer_made():
    """Between forward and backward only the layers' inputs live: what was dispatched is made again."""
    model, samples = double("latent")
    model.recompute = "layer"
    seen = []
    plain = model.dispatcher.dispatch
    model.dispatcher.dispatch = lambda x, route: (seen.append(weakref.ref(x)), plain(x, route))[1]
    losses = model(samples, mtp_weight=0.3)
    gc.collect()
    assert seen and all(reference() is None for reference in seen)
    losses.total.backward()


def test_evaluation_makes_no_gradient():
    model, samples = double("latent")
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    with torch.no_grad():
        model(samples, mtp_weight=0.3, ledger=Ledger())
    assert not any(parameter.main_grad.any() for parameter in model.parameters())


def test_a_sequence_beyond_the_models_positions_is_refused():
    model, _ = double("latent")
    with pytest.raises(ConfigError, match="has 65 tokens; the model has 64 positions"):
        model.logits(torch.zeros(1, 65, dtype=torch.int64))


def test_mtp_keeps_the_causal_chain_at_every_depth():
    """A draft of depth k at position i may see tokens 0 … i + k, and no later one."""
    model, _ = double("three_depths")
    tokens = torch.randint(0, TINY.vocab_size, (1, 12))
    drafts = model.draft_logits(tokens)
    for depth, draft in enumerate(drafts, start=1):
        assert draft.shape == (1, 12 - depth, TINY.vocab_size)
        for changed in (5, 8, 11):
            other = tokens.clone()
            other[0, changed] = (other[0, changed] + 1) % TINY.vocab_size
            moved = (model.draft_logits(other)[depth - 1] - draft).abs().amax(-1)[0] > 1e-9
            assert moved.nonzero().min().item() == changed - depth


def test_embedding_and_head_are_shared_by_all_depths():
    model, samples = double("two_depths")
    names = [name for name, _ in model.named_parameters()]
    assert sum(name in ("embed.weight", "head") for name in names) == 2
    assert not any("embed" in name and "norm" not in name for name in names if name.startswith("mtp"))
    without = torch.autograd.grad(model(samples, mtp_weight=0.0).total, [model.embed.weight, model.head])
    with_mtp = torch.autograd.grad(model(samples, mtp_weight=0.3).total, [model.embed.weight, model.head])
    assert all((a - b).abs().max() > 1e-6 for a, b in zip(without, with_mtp))


@pytest.mark.parametrize("auxiliary", ["switch", "gshard"])
def test_auxiliary_losses_reach_the_router(auxiliary):
    config = replace(TINY, balance=Balance(sequence_alpha=0.0, auxiliary=auxiliary, auxiliary_alpha=0.1))
    model = random_model(config).double()
    samples = torch.randint(0, TINY.vocab_size, (2, 8))
    losses = model(samples)
    assert losses.balance > 0
    gradient = torch.autograd.grad(losses.total, model.layers[1].router.score.weight)[0]
    plain = random_model(replace(config, balance=Balance(sequence_alpha=0.0))).double()
    assert (
        gradient - torch.autograd.grad(plain(samples).total, plain.layers[1].router.score.weight)[0]
    ).any()
