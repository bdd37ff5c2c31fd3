"""SwiGLU networks: one for every token (dense layers, shared experts), or many for few each (routed experts).

Arrived rows are expanded to (row, expert) pairs sorted by expert, multiplied group by group, gated on the
SwiGLU output and summed back per row by the inverse of the sort: a gather, so the order of every sum is fixed
and a run repeats bit for bit; a scatter-add would not promise that on a GPU. No token is dropped: an expert
takes as many rows as chose it, none included. Kept for backward are the arrived rows and the projections
before SwiGLU; pairs are gathered again and the SwiGLU output made again where the weight gradients need them.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from counterflow.comm.dispatch import Arrived
from counterflow.kernels.grouped import add_grouped_product, grouped_matmul
from counterflow.kernels.swiglu import swiglu, swiglu_backward
from counterflow.model.debts import Ledger, main_grad, settle_product


class Pairs(NamedTuple):
    """(row, expert) pairs sorted by expert; pairs without an expert come last."""

    rows: Int[Tensor, "P"]
    """The row of each pair."""
    slots: Int[Tensor, "P"]
    """Where the pair stands in the flattened ids."""
    places: Int[Tensor, "P"]
    """The inverse of `slots`: where each flattened id's pair is."""
    ends: Int[Tensor, "E"]
    """Where each expert's pairs end."""


def sort_pairs(ids: Int[Tensor, "A K"], num_experts: int) -> Pairs:
    """The pairs of arrived rows and their local experts, −1 being none. No wait for the host on a GPU."""
    flat = ids.flatten()
    flat = torch.where(flat < 0, num_experts, flat)
    slots = flat.argsort(stable=True)
    places = torch.empty_like(slots)
    places[slots] = torch.arange(len(slots), device=ids.device)
    ends = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    ends = ends.scatter_add_(0, flat, torch.ones_like(flat))[:-1].cumsum(0)
    return Pairs(slots // ids.shape[1], slots, places, ends)


def sum_pairs(values: Float[Tensor, "P D"], pairs: Pairs, shape: torch.Size) -> Float[Tensor, "A D"]:
    """Each row's sum over its K pairs, in the order of its ids; `shape` is (A, K)."""
    return F.embedding_bag(pairs.places.view(shape), values, mode="sum")


class Shard(NamedTuple):
    """Which elements of a whole weight, flat, a parameter holds."""

    offset: int
    total: int


class Experts(nn.Module):
    """The routed experts held here. Their part of h' = u + Σ shared(u) + Σ gᵢ expertᵢ(u). [Eq. 12]"""

    def __init__(self, num_experts: int, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * inner, width))
        self.down = nn.Parameter(torch.empty(num_experts, width, inner))
        self.index, self.parts = 0, 1

    def keep(self, index: int, parts: int) -> None:
        """Hold only one of equal parts of the experts, uninitialised."""
        self.index, self.parts = index, parts
        for name, weight in (("gate_up", self.gate_up), ("down", self.down)):
            setattr(self, name, nn.Parameter(weight.new_empty(len(weight) // parts, *weight.shape[1:])))

    def shard(self, weight: Tensor) -> Shard:
        """The place of `gate_up` or `down` in the weight of all experts."""
        return Shard(self.index * weight.numel(), self.parts * weight.numel())

    def forward(self, arrived: Arrived, ledger: Ledger | None) -> Float[Tensor, "A D"]:
        """Each arrived row's gated sum over its experts here; zero for a row without any."""
        return _Experts.apply(  # pyright: ignore[reportReturnType]
            arrived.rows, arrived.gates, self.gate_up, self.down, arrived.ids, ledger
        )


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, ledger: Any
    ) -> Any:
        pairs = sort_pairs(ids, len(gate_up))
        inner = grouped_matmul(x.index_select(0, pairs.rows), gate_up.transpose(1, 2), pairs.ends)
        out = grouped_matmul(swiglu(inner, gates.flatten()[pairs.slots]), down.transpose(1, 2), pairs.ends)
        ctx.ledger, ctx.weights = ledger, (gate_up, down)
        ctx.save_for_backward(x, gates, gate_up, down, inner, *pairs)
        return sum_pairs(out, pairs, ids.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gates, gate_up, down, inner, *indices = ctx.saved_tensors
        pairs = Pairs(*indices)
        dz = grouped_matmul(dy.index_select(0, pairs.rows), down, pairs.ends)
        dinner, dgates, z = swiglu_backward(dz, inner, gates.flatten()[pairs.slots])
        dx = sum_pairs(grouped_matmul(dinner, gate_up, pairs.ends), pairs, gates.shape)
        assert dgates is not None, "gates were given, so their gradient comes back"
        dgates = dgates[pairs.places].view_as(gates).to(gates.dtype)
        ddown = _settle(ctx.ledger, ctx.weights[1], dy, pairs, z, gather_right=False)
        dgate_up = _settle(ctx.ledger, ctx.weights[0], dinner, pairs, x, gather_right=True)
        return dx, dgates, dgate_up, ddown, None, None


def _settle(
    ledger: Ledger | None, weight: Tensor, left: Tensor, pairs: Pairs, right: Tensor, gather_right: bool
) -> Tensor | None:
    """The grouped weight gradient leftᵀ right; the operand that is per row is gathered to pairs when paid."""
    if ledger is None:
        dweight = torch.zeros_like(weight)
        _add_gathered(dweight, left, pairs, right, gather_right)
        return dweight
    ledger.settle(partial(_add_gathered, main_grad(weight), left, pairs, right, gather_right))
    return None


def _add_gathered(total: Tensor, left: Tensor, pairs: Pairs, right: Tensor, gather_right: bool) -> None:
    if gather_right:
        right = right.index_select(0, pairs.rows)
    else:
        left = left.index_select(0, pairs.rows)
    add_grouped_product(total, left, right, pairs.ends)


class GatedMlp(nn.Module):
    """One SwiGLU network for all tokens: dense layers' FFN, and the shared experts as one wide network."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * inner, width))
        self.down = nn.Parameter(torch.empty(width, inner))

    def forward(self, x: Float[Tensor, "T D"], ledger: Ledger | None) -> Float[Tensor, "T D"]:
        """down(silu(gate x) × up x)."""
        return _GatedMlp.apply(x, self.gate_up, self.down, ledger)  # pyright: ignore[reportReturnType]


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, ledger: Ledger | None) -> Tensor:
        inner = x @ gate_up.t()
        ctx.ledger, ctx.weights = ledger, (gate_up, down)
        ctx.save_for_backward(x, gate_up, down, inner)
        return swiglu(inner, None) @ down.t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gate_up, down, inner = ctx.saved_tensors
        dinner, _, z = swiglu_backward(dy @ down, inner, None)
        ddown = settle_product(ctx.ledger, ctx.weights[1], dy, z)
        dgate_up = settle_product(ctx.ledger, ctx.weights[0], dinner, x)
        return dinner @ gate_up, dgate_up, ddown, None
