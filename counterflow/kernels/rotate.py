"""Rotary positions: adjacent pairs turned as complex numbers in fp32, what stands before them kept.

On a GPU one kernel reads a head as it comes out of its projection and writes it turned, where separate ops cast, turn,
cast back and join.
"""

from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor


def rotate(
    x: Float[Tensor, "B S N W"], table: Complex[Tensor, "S R2"], keep: int = 0
) -> Float[Tensor, "B S N W"]:
    """Every adjacent pair turned by its position's angle, behind `keep` numbers that stay. [Eq. 3, Eq. 8]"""
    if x.is_cuda and x.dtype != torch.float64:
        return _Rotate.apply(x, table, keep)  # pyright: ignore[reportReturnType]
    turned = rotate_plainly(x[..., keep:], table)
    return torch.cat([x[..., :keep], turned], dim=-1) if keep else turned


def rotate_plainly(x: Float[Tensor, "B S N R"], table: Complex[Tensor, "S R2"]) -> Float[Tensor, "B S N R"]:
    """The same by ops of PyTorch, for all of x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = torch.view_as_complex(wide.contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table[:, None]).flatten(-2).to(x.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, keep: int) -> Tensor:
        from counterflow.kernels import rotate_triton  # a CPU build of PyTorch comes without Triton

        ctx.keep = keep
        ctx.save_for_backward(table)
        return rotate_triton.rotate(x, table, keep)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        from counterflow.kernels import rotate_triton

        return rotate_triton.rotate(dy, ctx.saved_tensors[0], ctx.keep, back=True), None, None
