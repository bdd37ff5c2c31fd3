"""Weight gradients added into fp32: `total += dyᵀ x` for one matrix and for a group of experts' matrices.

Gradients of a step are summed over micro-batches, sequences and ranks; in bf16 that sum loses what is small,
so the accumulator is fp32 whatever the operands are. On a GPU the product of one
matrix is added as it is made; grouped products there, and every bf16 product on a CPU, are rounded once to
bf16 per micro-batch and then added in fp32.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def add_product(total: Float[Tensor, "M N"], dy: Float[Tensor, "T M"], x: Float[Tensor, "T N"]) -> None:
    """total += dyᵀ x, with `total` in fp32 and the operands in one dtype."""
    if x.dtype == total.dtype:
        total.addmm_(dy.t(), x)
    elif x.is_cuda:
        torch.addmm(total, dy.t(), x, out_dtype=total.dtype, out=total)
    else:
        total.add_(dy.t() @ x)
