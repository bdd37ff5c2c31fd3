"""The small Triton kernels of training against the plain ops they stand for; interpreted where no GPU is.

In fp32 both round alike but for the order of a sum; in bf16, on a GPU alone, kernels round once and plain ops several
times, which leaves them a few steps of 1/256 apart.
"""

import ast
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from counterflow.kernels import head, norm, rotate, swiglu

pytest.importorskip("triton", reason="this PyTorch comes without Triton")
from counterflow.kernels import grouped_triton, head_triton, rotate_triton, swiglu_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def test_no_hook_rewrites_what_triton_reads():
    """Types are checked by wrapping functions, and a wrapped kernel has lost the names around it."""
    for path in Path(norm.__file__).parent.glob("*_triton.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            words = [ast.unparse(word) for word in getattr(node, "decorator_list", ())]
            kernel = any(word.startswith("triton.jit") for word in words)
            assert not kernel or "no_type_check" in words, f"{path.name}: {node.name}"


def near(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    """Relative to the largest element."""
    assert a.shape == b.shape and a.dtype == b.dtype
    if not b.numel():
        return True
    scale = b.double().abs().max().clamp_min(1e-6)
    return bool((a.double().cpu() - b.double()).abs().max() <= BOUNDS[dtype] * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 48), (3, 300), (2, 2500)])
def test_swiglu_and_its_backward(shape, weighed, dtype):
    rows, width = shape
    x, dout = torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, width).to(dtype)
    gates = torch.rand(rows) if weighed else None
    given = None if gates is None else gates.to(DEVICE)
    assert near(swiglu_triton.swiglu(x.to(DEVICE), given), swiglu.swiglu(x, gates), dtype)
    found = swiglu_triton.swiglu_backward(dout.to(DEVICE), x.to(DEVICE), given)
    for ours, plain in zip(found, swiglu.swiglu_backward(dout, x, gates)):
        assert (ours is None and plain is None) or near(ours, plain, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", [0, 6, 128])
@pytest.mark.parametrize("shape", [(0, 3, 2), (1, 1, 1), (2, 3, 5), (1, 2, 19)])
def test_rotation_of_heads_that_lie_apart_and_its_backward(shape, keep, dtype):
    sequences, length, heads = shape
    table = torch.polar(torch.ones(length, 4), torch.randn(length, 4))
    x = torch.randn(sequences, length, heads, keep + 8 + 3).to(dtype)[..., : keep + 8]
    apart = torch.randn(sequences, length, heads, keep + 8 + 3).to(dtype).to(DEVICE)[..., : keep + 8].copy_(x)
    want = torch.cat([x[..., :keep], rotate.rotate_plainly(x[..., keep:], table)], dim=-1)
    found = rotate_triton.rotate(apart, table.to(DEVICE), keep)
    assert near(found, want, dtype)
    assert near(rotate_triton.rotate(found, table.to(DEVICE), keep, back=True), x, dtype)  # turned back
    given = x.to(DEVICE).requires_grad_()
    plain = x.clone().requires_grad_()
    dout = torch.randn(want.shape).to(dtype)
    (ours,) = torch.autograd.grad(rotate.rotate(given, table.to(DEVICE), keep), given, dout.to(DEVICE))
    (theirs,) = torch.autograd.grad(rotate.rotate(plain, table, keep), plain, dout)
    assert near(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 48), (3, 300), (2, 9001)])
def test_cross_entropy_and_its_gradient_in_the_logits_place(shape, dtype):
    rows, width = shape
    logits = (5 * torch.randn(rows, width)).to(dtype)
    targets = torch.randint(width, (rows,))
    want, gradient = head._entropy(logits.clone(), targets, 0.3)
    given = logits.to(DEVICE)
    assert near(head_triton.cross_entropy_(given, targets.to(DEVICE), None), want, torch.float32)
    assert torch.equal(given.cpu(), logits), "without a scale nothing is written"
    assert near(head_triton.cross_entropy_(given, targets.to(DEVICE), 0.3), want, torch.float32)
    assert near(given, gradient, dtype)


def test_a_target_some_hundred_nats_down_and_logits_that_are_no_numbers():
    logits = torch.tensor([[200.0, -200.0], [float("nan"), 1.0], [-2e4, -3e4]]).to(DEVICE)
    found = head_triton.cross_entropy_(logits, torch.tensor([1, 1, 0]).to(DEVICE), 1.0)
    assert found[0] == 400.0 and found[1].isnan() and found[2] == 0.0


@pytest.mark.parametrize("rows", [0, 1, 16, 37])
@pytest.mark.parametrize("end", [0, 1, 15, 16, 36, 37])
def test_only_rows_behind_the_last_expert_become_zeros(rows, end):
    out = torch.randn(rows, 1030)
    want = out.clone()
    want[end:] = 0
    ends = torch.tensor([0, min(end, rows)], device=DEVICE)
    assert torch.equal(grouped_triton.zero_tail(out.to(DEVICE), ends).cpu(), want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 8), (7, 512), (3, 5, 7168), (2048, 1024)])
def test_norm_and_its_backward_on_a_gpu(shape, dtype):
    x, gain, dy = (torch.randn(s).to(dtype) for s in (shape, shape[-1:], shape))
    results = []
    for device, f in (("cuda", norm.rms_norm), ("cpu", lambda x, g, e: F.rms_norm(x, g.shape, g, e))):
        kind = dtype if device == "cuda" else torch.float64
        given = [value.to(device, kind).requires_grad_() for value in (x, gain)]
        y = f(*given, 1e-6)
        gradients = torch.autograd.grad(y, given, dy.to(device, kind))
        results.append([value.detach().cpu().to(dtype) for value in (y, *gradients)])
    for ours, plain in zip(*results):
        assert near(ours, plain, dtype)
