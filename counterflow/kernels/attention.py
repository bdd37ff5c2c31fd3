"""Causal attention with queries and keys wider than values, forward and backward, on any device.

The reference is PyTorch's `scaled_dot_product_attention`. On a GPU its cuDNN backend is chosen by name: the
memory-efficient one, PyTorch's pick for unequal widths, is several times slower. On a CPU PyTorch's fused
kernel is slower than two plain products and a softmax at the lengths that a CPU trains (8 × 4 heads × 256,
forward and backward: 12.9 against 4.4 ms in bf16, 11.9 against 11.1 in fp32,
records/2026-11-23-cpu-kernels; its scores are rounded to the operands' precision before the softmax, which
PyTorch's kernel does in fp32), so up to `EXPLICIT_LENGTH` the probabilities are made block of
queries by block of queries, only over the keys such a block may see, and kept for backward; above it memory
would grow with the square.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

EXPLICIT_LENGTH = 1024
QUERY_BLOCK = 128
GPU_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(
    q: Float[Tensor, "B N S HR"], k: Float[Tensor, "B N S HR"], v: Float[Tensor, "B N S V"], scale: float
) -> Float[Tensor, "B N S V"]:
    """softmax(scale · q kᵀ, causal) v for every head. [Eq. 10]"""
    if q.is_cuda:
        with sdpa_kernel(GPU_BACKENDS, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    if q.shape[2] > EXPLICIT_LENGTH:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return _Explicit.apply(q, k, v, scale)  # pyright: ignore[reportReturnType]


class _Explicit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale):
        batch, heads, length, _ = q.shape
        q, k, v = (x.reshape(batch * heads, length, x.shape[-1]) for x in (q, k, v))
        out = v.new_empty(batch * heads, length, v.shape[-1])
        probabilities = []
        for start in range(0, length, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, length)
            mask = torch.full((end - start, end), float("-inf"), dtype=q.dtype).triu_(start + 1)
            scores = torch.baddbmm(mask, q[:, start:end], k[:, :end].transpose(1, 2), alpha=scale)
            p = torch.softmax(scores, dim=-1)
            torch.bmm(p, v[:, :end], out=out[:, start:end])
            probabilities.append(p)
        ctx.scale, ctx.heads = scale, heads
        ctx.save_for_backward(q, k, v, *probabilities)
        return out.view(batch, heads, length, -1)

    @staticmethod
    def backward(ctx, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, *probabilities = ctx.saved_tensors
        dout = dout.reshape(len(q), *dout.shape[2:])
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block, p in enumerate(probabilities):
            start, end = block * QUERY_BLOCK, p.shape[-1]
            dp = torch.bmm(dout[:, start:end], v[:, :end].transpose(1, 2))
            dv[:, :end].baddbmm_(p.transpose(1, 2), dout[:, start:end])
            dscores = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            torch.bmm(dscores, k[:, :end], out=dq[:, start:end])
            dk[:, :end].baddbmm_(dscores.transpose(1, 2), q[:, start:end])
        dq.mul_(ctx.scale)
        dk.mul_(ctx.scale)
        shape = (-1, ctx.heads, *q.shape[1:])
        return dq.view(shape), dk.view(shape), dv.view(-1, ctx.heads, *v.shape[1:]), None
