"""Products of rows grouped by expert with each expert's own matrix, forward and for the weight gradient.

Rows come sorted by expert and `ends[e]` is where expert e's rows end, so an expert may have none. On a GPU
this is PyTorch's `grouped_mm`, which reads `ends` on the device; on a CPU a loop of plain products into one
output is as fast (835 against 810 GFLOP/s in bf16 at 16 × 512 × 256 × 256) and accepts every dtype, odd sizes
and empty experts. The padded alternative (a capacity per expert) drops or wastes rows and is not taken.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterflow.kernels.product import add_product

GROUPED_ALIGNMENT = 16
"""Bytes; CUDA's grouped product wants strides in multiples of it."""


def grouped_matmul(
    x: Float[Tensor, "P M"], weight: Float[Tensor, "E M N"], ends: Int[Tensor, "E"]
) -> Float[Tensor, "P N"]:
    """Row p times the matrix of the expert it belongs to; rows past `ends[-1]` come back as zeros."""
    if _fused(x, weight):
        out = F.grouped_mm(x, weight, offs=ends.to(torch.int32))
        return out.masked_fill_(torch.arange(len(x), device=x.device)[:, None] >= ends[-1], 0)
    out = x.new_empty(len(x), weight.shape[-1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(x[start:end], weight[expert], out=out[start:end])
        start = end
    out[start:] = 0
    return out


def add_grouped_product(
    total: Float[Tensor, "E M N"], dy: Float[Tensor, "P M"], x: Float[Tensor, "P N"], ends: Int[Tensor, "E"]
) -> None:
    """total[e] += dy_eᵀ x_e over the rows of expert e; an expert without rows is left as it was."""
    if _fused(x, total) and x.dtype == torch.bfloat16:
        total.add_(F.grouped_mm(dy.t(), x, offs=ends.to(torch.int32)))
        return
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            add_product(total[expert], dy[start:end], x[start:end])
        start = end


def _fused(x: Tensor, weight: Tensor) -> bool:
    aligned = all(
        size * x.element_size() % GROUPED_ALIGNMENT == 0 for size in (x.shape[1], *weight.shape[1:])
    )
    return x.is_cuda and x.dtype == torch.bfloat16 and aligned and len(x) > 0
