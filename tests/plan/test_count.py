"""The published sizes, from the formula and from the tensors themselves on the meta device."""

from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from counterflow.config.models import MODELS
from counterflow.kernels.attention import QUERY_BLOCK
from counterflow.model import experts, route
from counterflow.model.transformer import Transformer
from counterflow.plan.count import count_parameters, flops_per_token, forward_flops, matmul_weights


def test_v3_671b_has_the_published_counts():
    """671.03 B, 36.63 B active without the embedding look-up; MTP 11.61 B, with the head 2.54 B active."""
    counts, head = count_parameters(MODELS["v3-671b"]), 129280 * 7168
    assert round(counts.total / 1e9, 2) == 671.03
    assert round(counts.active / 1e9, 2) == 36.63
    assert round(counts.mtp / 1e9, 2) == 11.61
    assert round((counts.mtp_active + 2 * head) / 1e9, 2) == 2.54


def test_v3_16b_has_the_published_counts():
    """15.7 B; 2.4 B active as the paper truncates it, 2.45 B to two places."""
    counts = count_parameters(MODELS["v3-16b"])
    assert round(counts.total / 1e9, 1) == 15.7
    assert round(counts.active / 1e9, 2) == 2.45
    assert round(counts.mtp / 1e9, 2) == 0.59


@cache
def on_meta(name: str) -> Transformer:
    """The model of that name without memory."""
    with torch.device("meta"):
        return Transformer(MODELS[name])


@pytest.mark.parametrize("name", MODELS)
def test_formula_equals_the_tensors_on_the_meta_device(name):
    sizes = {key: parameter.numel() for key, parameter in on_meta(name).named_parameters()}
    counts = count_parameters(MODELS[name])
    assert sum(size for key, size in sizes.items() if not key.startswith("mtp.")) == counts.total
    assert sum(size for key, size in sizes.items() if key.startswith("mtp.")) == counts.mtp


class Products(TorchDispatchMode):
    """Counts the FLOPs of every matrix product that runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = self.batched = self.grouped = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            left, right = args[-2:] if name == "mm" else args[1:3]
            self.plain += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        if name in ("bmm", "baddbmm"):
            left, right = args[-2:] if name == "bmm" else args[1:3]
            self.batched += 2 * left.shape[0] * left.shape[1] * left.shape[2] * right.shape[2]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
def test_flops_equal_a_counter_on_the_meta_device(name, monkeypatch):
    """Every product of a forward pass is counted as it runs. The attention core there goes block of queries by block,
    so it does (1 + block / length) of the causal half; experts' groups, whose ends meta tensors do not know, are
    counted at their call."""
    config, length, counter = MODELS[name], 512, Products()

    def grouped(x, weight, ends):
        counter.grouped += 2 * len(x) * weight.shape[1] * weight.shape[2]
        return x.new_empty(len(x), weight.shape[-1])

    monkeypatch.setattr(experts, "grouped_matmul", grouped)
    monkeypatch.setattr(
        route, "loads", lambda ids, count: torch.zeros(count, dtype=torch.int64)
    )  # no meta kernel
    model, tokens = on_meta(name), torch.zeros(1, length, dtype=torch.int64, device="meta")
    with torch.no_grad(), torch.device("meta"), counter:
        model.logits(tokens)
    weights = counter.plain + counter.grouped
    assert weights == 2 * length * matmul_weights(config)
    core = forward_flops(config, length) * length - weights
    assert counter.batched == pytest.approx(core * (1 + QUERY_BLOCK / length), rel=1e-9)
    full = forward_flops(config, length, causal=False) - forward_flops(config, length)
    assert full * length == pytest.approx(core)


def test_v3_671b_takes_the_published_flops():
    """250 GFLOP a token, causal (arXiv 2505.09343, Table 2); 281 not, which is its 432 TFLOP/s beside 385."""
    config = MODELS["v3-671b"]
    causal, full = (flops_per_token(config, 4096, causal) for causal in (True, False))
    assert round(causal / 1e9) == 250
    assert full / causal == pytest.approx(432 / 385, rel=0.002)
    assert round(flops_per_token(config, 4096, with_mtp=True) / 1e9, 1) == 260.6
