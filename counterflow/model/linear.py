"""Matrix products whose weight gradient can be owed. No biases: the architecture has none."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterflow.model.debts import Ledger, settle_product


class Linear(nn.Module):
    """y = x Wᵀ; in fp32 whatever x is, if `fp32`, as the router and its scores are."""

    def __init__(self, inputs: int, outputs: int, fp32: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.fp32 = fp32

    def forward(self, x: Float[Tensor, "T I"], ledger: Ledger | None = None) -> Float[Tensor, "T O"]:
        """The product; its weight gradient goes to `ledger` if one is given."""
        return _Product.apply(x, self.weight, ledger, self.fp32)  # pyright: ignore[reportReturnType]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ledger: Ledger | None, fp32: bool) -> Tensor:
        ctx.ledger, ctx.fp32, ctx.weight = ledger, fp32 and x.dtype == torch.bfloat16, weight
        ctx.save_for_backward(x, weight)
        if ctx.fp32:
            return x.float() @ weight.float().t()
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        dx = dy @ (weight.float() if ctx.fp32 else weight)
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = settle_product(ctx.ledger, ctx.weight, dy, x.float() if ctx.fp32 else x)
        return dx.to(x.dtype), dweight, None, None
