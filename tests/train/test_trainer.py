"""One step: what it adds up, what it moves, what it refuses."""

import pytest
import torch

from counterflow.comm.mesh import Mesh
from counterflow.data.loader import Samples
from counterflow.errors import NonFiniteError
from counterflow.train.trainer import Trainer
from tests.train.runs import small_run


def trainer(folder, *more: str) -> Trainer:
    run = small_run(folder, *more)
    return Trainer(run, Samples(run.data, run.model.vocab_size, 0, quiet=True), Mesh())


def test_loss_falls_and_counts_cover_every_token(tmp_path):
    one = trainer(tmp_path, "train.tokens=6144")
    losses = [one.step() for _ in range(40)]
    assert losses[-1]["loss"] < 0.8 * losses[0]["loss"]
    assert losses[-1]["mtp_loss"][0] < 0.9 * losses[0]["mtp_loss"][0]
    load = losses[0]["load"]
    assert list(load) == ["layers.1", "mtp.0"]
    assert sum(load["layers.1"]) == 4 * 32 * 4 and sum(load["mtp.0"]) == 4 * 31 * 4


def test_gradient_accumulation_does_not_change_the_gradient(tmp_path):
    """One micro-batch of 4 or four of 1: the same sums, in another order; fp32."""
    gradients = []
    for micro in (4, 1):
        one = trainer(tmp_path, f"train.micro_batch_size={micro}")
        totals = one.accumulate(4, 0.3)
        gradients.append((one.optimizer.buckets[0].grad.clone(), totals))
    (a, first), (b, second) = gradients
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    assert torch.equal(first.counts, second.counts)


def test_bias_moves_by_gamma_after_the_step_and_not_in_evaluation(tmp_path):
    one = trainer(tmp_path, "train.bias_speed=0.25")
    one.held_out_loss(2)
    assert not any(bias.any() for _, _, bias in one.routers)
    load = one.step()["load"]
    for _, name, bias in one.routers:
        counts = torch.tensor(load[name])
        assert torch.equal(bias, 0.25 * torch.sign(counts.sum() - counts * len(counts)).float())


def test_ema_follows_the_masters(tmp_path):
    one = trainer(tmp_path)
    name, master = next(iter(one.optimizer.masters()))
    start = master.value.clone()
    one.step()
    one.step()
    expected = start
    again = trainer(tmp_path)
    for _ in range(2):
        again.step()
        expected = expected + 0.1 * (dict(again.optimizer.masters())[name].value - expected)
    assert torch.allclose(one.ema.averages[name], expected, atol=1e-7)


@pytest.mark.parametrize("where", ["layers.1.experts.down", "layers.0.attention.out.weight"])
def test_nan_weights_stop_with_step_place_and_remedy(tmp_path, where):
    one = trainer(tmp_path)
    one.step()
    dict(one.model.named_parameters())[where].data[0] = float("nan")
    (bucket,) = one.optimizer.buckets
    before = bucket.master.clone()
    with pytest.raises(NonFiniteError, match=rf"step 2: weight '{where}' is not finite.*train.lr.peak"):
        one.step()
    assert torch.equal(bucket.master.nan_to_num(), before.nan_to_num()) and one.steps == 1


@pytest.mark.parametrize("where", ["layers.1.attention.kv_up.weight", "layers.0.ffn_norm.weight"])
def test_a_gradient_that_is_not_finite_is_named_and_nothing_moves(tmp_path, where, monkeypatch):
    one = trainer(tmp_path)
    accumulate = one.accumulate

    def spoilt(*arguments):
        totals = accumulate(*arguments)
        dict(one.optimizer.gradients())[where].view(-1)[0] = float("nan")
        return totals

    monkeypatch.setattr(one, "accumulate", spoilt)
    before = one.optimizer.buckets[0].master.clone()
    with pytest.raises(NonFiniteError, match=rf"step 1: the gradient of '{where}' and of 0 before it"):
        one.step()
    assert torch.equal(one.optimizer.buckets[0].master, before)


def test_overflow_names_the_layer(tmp_path):
    one = trainer(tmp_path)
    dict(one.optimizer.masters())["layers.1.shared.gate_up"].value.fill_(3e38)
    with pytest.raises(NonFiniteError, match="output of layer 1 is not finite"):
        one.step()
