"""SwiGLU and its backward in Triton: each one pass over what it reads and writes; separate ops take four and eleven."""

from typing import no_type_check  # or jaxtyping's hook wraps what Triton reads as source

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor


def swiglu(gate_up: Tensor, gates: Tensor | None) -> Tensor:
    """As `swiglu.swiglu`, rounded once at the end."""
    gate_up, out = gate_up.contiguous(), gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    if out.numel():
        _forward[(len(out),)](gate_up, gates, out, **_sizes(out, gates))  # pyright: ignore[reportIndexIssue]
    return out


def swiglu_backward(
    dout: Tensor, gate_up: Tensor, gates: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As `swiglu.swiglu_backward`, rounded once at the end."""
    dout, gate_up = dout.contiguous(), gate_up.contiguous()
    dgate_up, out = torch.empty_like(gate_up), torch.empty_like(dout)
    dgates = None if gates is None else torch.zeros(len(out), dtype=torch.float32, device=out.device)
    if out.numel():
        sizes = _sizes(out, gates)
        _backward[(len(out),)](dout, gate_up, gates, dgate_up, dgates, out, **sizes)  # pyright: ignore[reportIndexIssue]
    return dgate_up, dgates, out


def _sizes(out: Tensor, gates: Tensor | None) -> dict[str, object]:
    block = min(2048, triton.next_power_of_2(out.shape[1]))
    return {
        "width": out.shape[1],
        "block": block,
        "weighed": gates is not None,
        "num_warps": max(1, min(8, block // 256)),
    }


@triton.jit
@no_type_check
def _forward(gate_up, gates, out, width: tl.constexpr, block: tl.constexpr, weighed: tl.constexpr):
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(gates + row).to(tl.float32) if weighed else 1.0
    for first in tl.static_range(0, width, block):
        at = first + tl.arange(0, block)
        left = tl.load(gate_up + row * (2 * width) + at, mask=at < width, other=0.0).to(tl.float32)
        right = tl.load(gate_up + row * (2 * width) + width + at, mask=at < width, other=0.0).to(tl.float32)
        value = left * tl.sigmoid(left) * right * gate
        tl.store(out + row * width + at, value.to(out.dtype.element_ty), mask=at < width)


@triton.jit
@no_type_check
def _backward(
    dout, gate_up, gates, dgate_up, dgates, out,
    width: tl.constexpr, block: tl.constexpr, weighed: tl.constexpr,
):  # fmt: skip
    """One row a program; what the forward gave is made again on the way."""
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(gates + row).to(tl.float32) if weighed else 1.0
    dgate = tl.zeros((block,), tl.float32)
    for first in tl.static_range(0, width, block):
        at = first + tl.arange(0, block)
        here = at < width
        left = tl.load(gate_up + row * (2 * width) + at, mask=here, other=0.0).to(tl.float32)
        right = tl.load(gate_up + row * (2 * width) + width + at, mask=here, other=0.0).to(tl.float32)
        dy = tl.load(dout + row * width + at, mask=here, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(left)
        silu = left * sigmoid
        dgate += dy * silu * right
        dy *= gate
        dleft = dy * right * sigmoid * (1.0 + left * (1.0 - sigmoid))
        kind = out.dtype.element_ty
        tl.store(out + row * width + at, (silu * right * gate).to(kind), mask=here)
        tl.store(dgate_up + row * (2 * width) + at, dleft.to(kind), mask=here)
        tl.store(dgate_up + row * (2 * width) + width + at, (dy * silu).to(kind), mask=here)
    if weighed:
        tl.store(dgates + row, tl.sum(dgate, 0))
