"""Products of rows grouped by expert with each expert's own matrix, forward and for the weight gradient.

Rows come sorted by expert and `ends[e]` is where expert e's rows end, so an expert may have none. On a GPU
this is PyTorch's `grouped_mm`, which reads `ends` on the device; on a CPU a loop of plain products into one
output is as fast (835 against 810 GFLOP/s in bf16 at 16 × 512 × 256 × 256) and accepts every dtype, odd sizes
and empty experts. The padded alternative (a capacity per expert) drops or wastes rows and is not taken.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from counterflow.kernels.product import add_product

GROUPED_ALIGNMENT = 16
"""Bytes; CUDA's grouped product wants strides in multiples of it."""
GRANULE = 64
"""Rows. On a CPU bf16 products are compiled for every new shape, half a millisecond each, and the rows of an expert are
another number at every step: some three hundred new shapes, more time than all the products of a small model. In whole
granules, the rest filled up with zeros, there are few shapes, which are compiled once."""


def grouped_matmul(
    x: Float[Tensor, "P M"], weight: Float[Tensor, "E M N"], ends: Int[Tensor, "E"]
) -> Float[Tensor, "P N"]:
    """Row p times the matrix of the expert it belongs to; rows past `ends[-1]` come back as zeros."""
    if _fused(x, weight):
        from counterflow.kernels import grouped_triton  # a CPU build of PyTorch comes without Triton

        return grouped_triton.zero_tail(F.grouped_mm(x, weight, offs=ends.to(torch.int32)), ends)
    out = x.new_empty(len(x), weight.shape[-1])
    start, granule = 0, granule_of(x)
    for expert, end in enumerate(ends.tolist()):
        if end == start:
            continue
        # Rows are taken in whole granules, running into the next expert's, which then overwrites its own.
        stop = start + -(-(end - start) // granule) * granule
        for rows in granules(start, min(stop, len(x)), granule):
            if rows.stop - rows.start >= granule:
                torch.mm(x[rows], weight[expert], out=out[rows])
            else:
                out[rows] = (padded(x[rows], granule) @ weight[expert])[: rows.stop - rows.start]
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
    start, granule = 0, granule_of(x)
    for expert, end in enumerate(ends.tolist()):
        for rows in granules(start, end, granule):
            add_product(total[expert], padded(dy[rows], granule), padded(x[rows], granule))
        start = end


def granule_of(x: Tensor) -> int:
    """Rows that a product's length should be a multiple of: see GRANULE."""
    return GRANULE if x.dtype == torch.bfloat16 and not x.is_cuda else 1


def padded(rows: Float[Tensor, "R M"], granule: int) -> Float[Tensor, "R2 M"]:
    """The rows, with zeros below if they are fewer than a granule."""
    return rows if len(rows) >= granule else F.pad(rows, (0, 0, 0, granule - len(rows)))


def granules(start: int, end: int, granule: int) -> Iterator[slice]:
    """The rows from start to end as one run of whole granules and one of what is left; empty runs are left out."""
    whole = start + (end - start) // granule * granule
    for first, last in ((start, whole), (whole, end)):
        if last > first:
            yield slice(first, last)


def _fused(x: Tensor, weight: Tensor) -> bool:
    aligned = all(
        size * x.element_size() % GROUPED_ALIGNMENT == 0 for size in (x.shape[1], *weight.shape[1:])
    )
    return x.is_cuda and x.dtype == torch.bfloat16 and aligned and len(x) > 0
