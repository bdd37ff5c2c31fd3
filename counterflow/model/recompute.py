"""Run a piece of the model again in backward instead of keeping what it made. [§3.2.3 recomputation]

An autograd Function that keeps the piece's inputs, so that nothing hooks into how tensors are saved and a ledger inside
the piece works as it does outside. What the second run makes lives until the weight gradients are paid.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def recomputed(make: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """make(x), whose intermediate results are made again in backward.   Cost: one more run of `make`."""
    return _Recomputed.apply(x, make)  # pyright: ignore[reportReturnType]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.make = make
        ctx.save_for_backward(x)
        return make(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            torch.autograd.backward(ctx.make(x), dy)
        return x.grad, None
