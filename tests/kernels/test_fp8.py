"""FP8 for the wire: the Triton kernels give what the plain ops give, to the bit.

Triton's interpreter rounds to E4M3 and to bf16 in its own way, so that there only the scales and the way back to fp32
are held to the bit; the rest is, on a GPU.
"""

import pytest
import torch

from counterflow.kernels import fp8

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def kernels():
    pytest.importorskip("triton", reason="this PyTorch comes without Triton")
    from counterflow.kernels import fp8_triton

    return fp8_triton


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (5, 127), (3, 128), (2, 300), (3, 7168)])
def test_kernels_equal_the_plain_ops(shape, dtype):
    x = torch.randn(shape) * torch.logspace(-9, 9, shape[1])
    x[shape[0] // 2 :] *= 1e-20  # tiles below the smallest scale
    x = x.to(dtype)
    packed = fp8.quantise(x)
    found = kernels().quantise(x.to(DEVICE)).cpu()
    numbers = -(-shape[1] // 128) * 128
    assert found.shape == packed.shape and torch.equal(found[:, numbers:], packed[:, numbers:])
    assert torch.equal(found, packed) or not GPU
    out = torch.empty(shape, dtype=dtype, device=DEVICE)
    again = kernels().dequantise(packed.to(DEVICE), out)
    assert torch.equal(again.cpu(), fp8.dequantise(packed, shape[1], dtype))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_become_a_number(value, device):
    x = torch.randn(2, 256, device=device)
    x[1, 130] = value
    again = fp8.dequantise(fp8.quantise(x), 256, torch.float32)
    assert not again[1, 130].isfinite()
    assert again[0].isfinite().all() and again[1, :128].isfinite().all()
