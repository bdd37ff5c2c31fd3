"""Weight gradients owed and paid: what lets a backward chunk run without its W half.

A pipeline wants the gradient of a chunk's *input* as early as it can and its weights' gradients whenever
there is nothing better to do (zero bubble, DualPipe). So every matrix product hands its weight gradient to a
ledger as a debt, a closure over the two operands, and the ledger pays at once or later. The ledger is an
argument of forward and travels in the autograd context; not taken: a global store, which autograd's device
threads and a second pipeline in the process would share. Without a ledger, weights get ordinary `.grad`s.

Debts pay into `weight.main_grad`, an fp32 tensor that whoever owns the weights lays out (`train/optim.py`).
Owed: every matrix, grouped experts, router and MTP merge. Not owed, since they cost little or nothing to add
on the spot: norm gains (drained by the owner from `.grad`), embedding, head.
"""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from counterflow.kernels.product import add_product

Debt = Callable[[], None]


class Ledger:
    """The weight gradients of one chunk. While `owing`, they queue up; `pay` settles them in order."""

    def __init__(self, owing: bool = False) -> None:
        self.owing = owing
        self._debts: deque[Debt] = deque()

    def __len__(self) -> int:
        return len(self._debts)

    def settle(self, debt: Debt) -> None:
        """Pay now, or owe."""
        if self.owing:
            self._debts.append(debt)
        else:
            debt()

    def pay(self) -> None:
        """Pay all that is owed; each debt lets go of its operands as soon as it is paid."""
        with torch.no_grad():
            while self._debts:
                self._debts.popleft()()


def main_grad(weight: Tensor) -> Tensor:
    """The fp32 accumulator of a weight that a ledger is used with."""
    grad = getattr(weight, "main_grad", None)
    assert grad is not None, (
        f"a ledger was given but the weight of shape {tuple(weight.shape)} has no main_grad"
    )
    return grad


def settle_product(ledger: Ledger | None, weight: Tensor, dy: Tensor, x: Tensor) -> Tensor | None:
    """dyᵀ x for the weight: returned to autograd without a ledger, else settled there (and None returned).

    `weight` is the module's own, not what `saved_tensors` gives: under recomputation that is another object.
    """
    if ledger is None:
        return (dy.t() @ x).to(weight.dtype)
    total = main_grad(weight)
    ledger.settle(lambda: add_product(total, dy, x))
    return None
