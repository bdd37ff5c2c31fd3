"""Every kernel against plain arithmetic in float64, at odd sizes: one token, empty experts, ragged ends."""

import pytest
import torch
import torch.nn.functional as F

from counterflow.kernels import head
from counterflow.kernels.attention import QUERY_BLOCK, attention
from counterflow.kernels.grouped import add_grouped_product, grouped_matmul
from counterflow.kernels.norm import rms_norm
from counterflow.kernels.product import add_product
from counterflow.kernels.swiglu import swiglu, swiglu_backward

BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}
"""Relative to the largest element: rounding times a few dozen operations; bf16 keeps 8 bits a pass."""
DTYPES = list(BOUNDS)


def near(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    scale = expected.double().abs().max().clamp_min(1e-3) if expected.numel() else 1.0
    return bool(((out.double() - expected.double()).abs() <= BOUNDS[dtype] * scale).all())


def reference_gradients(f, *inputs):
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out = f(*wide)
    dout = torch.randn_like(out)
    return out.detach(), dout, torch.autograd.grad(out, wide, dout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 7), (1, 2, QUERY_BLOCK), (2, 1, 2 * QUERY_BLOCK + 5)])
def test_attention_forward_and_gradients(shape, dtype):
    torch.manual_seed(0)
    q, k = (torch.randn(*shape, 12, dtype=dtype) for _ in range(2))
    v = torch.randn(*shape, 10, dtype=dtype)

    def plain(q, k, v):
        scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(
            torch.ones(shape[2], shape[2]).triu(1).bool(), -1e300
        )
        return torch.softmax(scores, -1) @ v

    expected, dout, gradients = reference_gradients(plain, q, k, v)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*inputs, 0.3)
    assert near(out.detach(), expected, dtype)
    for ours, theirs in zip(torch.autograd.grad(out, inputs, dout.to(dtype)), gradients):
        assert near(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 17, 0, 2]])
def test_grouped_products_with_empty_experts_and_rows_past_the_end(counts, dtype):
    torch.manual_seed(1)
    ends, rows = torch.tensor(counts).cumsum(0), sum(counts) + 2
    x, weight = torch.randn(rows, 6, dtype=dtype), torch.randn(4, 6, 9, dtype=dtype)
    out = grouped_matmul(x, weight, ends)
    dy, total = (
        torch.randn(rows, 9, dtype=dtype),
        torch.randn(4, 9, 6, dtype=torch.promote_types(dtype, torch.float32)),
    )
    expected_total = total.double()
    add_grouped_product(total, dy, x, ends)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        assert near(out[start:end], x[start:end].double() @ weight[expert].double(), dtype)
        expected_total[expert] += dy[start:end].double().t() @ x[start:end].double()
        start = end
    assert not out[start:].any()
    assert near(total, expected_total, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize("gated", [True, False])
def test_swiglu_and_its_gradients(rows, gated, dtype):
    torch.manual_seed(2)
    x, gates = torch.randn(rows, 14, dtype=dtype), torch.rand(rows)

    def plain(x, gates):
        a, b = x.chunk(2, -1)
        return F.silu(a) * b * (gates[:, None] if gated else 1) + 0 * gates[:, None]

    expected, dout, (dx, dgates) = reference_gradients(plain, x, gates)
    out = swiglu(x, gates if gated else None)
    ours, dgates_ours, again = swiglu_backward(dout.to(dtype), x, gates if gated else None)
    assert near(out, expected, dtype) and near(again, expected, dtype) and near(ours, dx, dtype)
    assert (dgates_ours is None) == (not gated)
    assert dgates_ours is None or near(
        dgates_ours, dgates, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 3, 16)])
def test_rms_norm_and_its_gradients(shape, dtype):
    torch.manual_seed(3)
    x, gain = torch.randn(shape, dtype=dtype), torch.rand(shape[-1]).add(0.5).to(dtype)

    def plain(x, gain):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    expected, dout, gradients = reference_gradients(plain, x, gain)
    inputs = [x.clone().requires_grad_(), gain.clone().requires_grad_()]
    out = rms_norm(*inputs, 1e-6)
    assert near(out.detach(), expected, dtype)
    for ours, theirs in zip(torch.autograd.grad(out, inputs, dout.to(dtype)), gradients):
        assert near(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 37])
def test_cross_entropy_and_both_gradients_over_several_blocks(tokens, dtype, monkeypatch):
    torch.manual_seed(4)
    monkeypatch.setattr(head, "BLOCK_BYTES", 4 * 50 * 8)  # eight tokens a block
    h, weight = torch.randn(tokens, 24, dtype=dtype), 0.2 * torch.randn(50, 24, dtype=dtype)
    targets = torch.randint(0, 50, (tokens,))
    wide = [x.detach().clone().double().requires_grad_() for x in (h, weight)]
    expected = F.cross_entropy(wide[0] @ wide[1].t(), targets, reduction="none")
    dh, dweight = torch.autograd.grad(0.7 * expected.sum(), wide)
    total = torch.ones(50, 24, dtype=torch.promote_types(dtype, torch.float32))
    nll, ours = head.cross_entropy(h, weight, targets, total, 0.7)
    assert near(nll, expected.detach(), dtype) and near(ours, dh, dtype) and near(total - 1, dweight, dtype)
    assert head.cross_entropy(h, weight, targets, None, 0.7)[1] is None


def test_cross_entropy_of_a_hopeless_target_is_finite():
    """A target some hundred nats down has a probability of 0 in fp32; its loss must still be right."""
    h, weight = torch.tensor([[200.0]]), torch.tensor([[1.0], [-1.0]])
    nll, _ = head.cross_entropy(h, weight, torch.tensor([1]), None, 1.0)
    assert nll.item() == 400.0


def test_add_product_accumulates_in_fp32():
    """2^-9 added to 1 vanishes in bf16, and must not here."""
    total, one = torch.ones(1, 1), torch.tensor([[1.0]], dtype=torch.bfloat16)
    add_product(total, one * 2**-9, one)
    assert total.item() == 1 + 2**-9


def test_grouped_products_take_rows_in_granules_and_stay_right():
    """bf16 rows run into the next expert's and off the end: every row must still be its own expert's."""
    torch.manual_seed(6)
    counts = [63, 0, 1, 130, 64, 5]
    ends, rows = torch.tensor(counts).cumsum(0), sum(counts) + 3
    x, weight = torch.randn(rows, 8).bfloat16(), torch.randn(6, 8, 4).bfloat16()
    out = grouped_matmul(x, weight, ends)
    owners = torch.repeat_interleave(torch.arange(6), torch.tensor(counts))
    expected = torch.einsum("pm,pmn->pn", x[: ends[-1]].double(), weight[owners].double())
    assert near(out[: ends[-1]], expected, torch.bfloat16) and not out[ends[-1] :].any()
