"""A transformer layer as four parts, and its forward as their composition.

ATTN is attention, the FFN's norm and the router; DISPATCH sends tokens to experts; MLP is the shared and the
routed experts; COMBINE brings their sums home onto the residual. A pipeline issues the parts one by one, a
plain pass calls `forward`: one path, so the overlapped one cannot drift. Dense layers are ATTN and MLP; their
transfers are nothing.

What a pass needs besides the hidden states comes as a `Context`, an argument: no global knows of shapes or
ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from counterflow.comm.dispatch import Arrived, Dispatcher, Route
from counterflow.config.model import ModelConfig
from counterflow.model import balance, route
from counterflow.model.debts import Ledger
from counterflow.model.experts import Experts, GatedMlp
from counterflow.model.linear import Linear
from counterflow.model.mla import Attention, Norm
from counterflow.model.recompute import recomputed


@dataclass(frozen=True)
class Context:
    """What every part of a pass over one micro-batch needs."""

    sequences: int
    """Sequences of the micro-batch, of equal length, laid end to end."""
    rope: Complex[Tensor, "S R2"]
    dispatcher: Dispatcher
    ledger: Ledger | None = None
    sequence_scale: float = 1.0
    """1 / (sequences of the global batch): what a sequence's balance loss is seeded with; 0 leaves it out."""
    recompute: bool = False
    """Make attention's norms, latents, queries, keys and values again in backward. The FFN's norm is kept: its output
    is what travels to the experts."""


@dataclass(frozen=True)
class Flow:
    """What one part hands the next."""

    context: Context
    h: Float[Tensor, "T D"]
    """The residual stream; from MLP on with the shared experts' or the dense FFN's output added."""
    u: Float[Tensor, "T D"] | None = None
    """The FFN's normalised input."""
    route: Route | None = None
    arrived: Arrived | None = None
    y: Float[Tensor, "A D"] | None = None
    """The arrived rows' sums over their experts."""
    balance: Float[Tensor, ""] | None = None
    """The router's loss, scaled for backward. It arises and is seeded in the layer that has the router."""
    counts: Int[Tensor, "E"] | None = None
    """Tokens given to each expert."""


Choose = Callable[[Tensor, Tensor, ModelConfig], Tensor]
"""Experts of tokens, (T, K), from their scores, (T, E), and the bias."""


class Router(nn.Module):
    """Expert scores, the choice, the balance loss. The bias is a buffer that `balance.step_bias` moves."""

    bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.score = Linear(config.hidden_size, config.num_routed_experts, fp32=True)
        self.register_buffer("bias", torch.zeros(config.num_routed_experts))
        self.choose: Choose = route.choose
        """What picks the experts; whoever compares two runs replays the choices of one in the other."""

    def forward(
        self, u: Float[Tensor, "T D"], context: Context
    ) -> tuple[Route, Float[Tensor, ""], Int[Tensor, "E"]]:
        """Route, scaled balance loss and counts of the tokens."""
        scores = route.affinities(self.score(u, context.ledger))
        ids = self.choose(scores, self.bias, self.config)
        gates = route.gates(scores, ids, self.config.routed_scaling_factor)
        return Route(ids, gates), self._loss(scores, ids, context), route.loads(ids, scores.shape[-1])

    def _loss(self, scores: Tensor, ids: Tensor, context: Context) -> Tensor:
        settings, loss = self.config.balance, scores.new_zeros(())
        if not context.sequence_scale:
            return loss
        if settings.sequence_alpha:
            by_sequence = scores.view(context.sequences, -1, scores.shape[-1])
            losses = balance.sequence_loss(by_sequence, ids.shape[-1], settings.sequence_alpha)
            loss = loss + losses.mean()
        if settings.auxiliary != "none":
            loss = loss + balance.auxiliary_loss(scores, ids, settings)
        return loss * (context.sequences * context.sequence_scale)


class Layer(nn.Module):
    """x += attention(norm x); x += FFN(norm x), the FFN dense or a mixture of experts. [Fig. 2]"""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.is_moe = config.is_moe(index)
        self.attn_norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = Norm(config.hidden_size, config.rms_norm_eps)
        if not self.is_moe:
            self.dense = GatedMlp(config.hidden_size, config.dense_intermediate_size)
            return
        self.router = Router(config)
        self.experts = Experts(config.num_routed_experts, config.hidden_size, config.moe_intermediate_size)
        shared = config.num_shared_experts * config.moe_intermediate_size
        self.shared = GatedMlp(config.hidden_size, shared) if shared else None

    def attn(self, h: Float[Tensor, "T D"], context: Context) -> Flow:
        """ATTN: attention onto the residual, the FFN's norm, and the route with its balance loss."""
        attend = partial(self._attend, context=context)
        attended = recomputed(attend, h) if context.recompute else attend(h)
        return self.feed(h + self.attention.out(attended, context.ledger), context)

    def _attend(self, h: Float[Tensor, "T D"], context: Context) -> Tensor:
        return self.attention.attend(self.attn_norm(h), context.sequences, context.rope, context.ledger)

    def feed(self, h: Float[Tensor, "T D"], context: Context) -> Flow:
        """What follows attention, however its keys were kept: the FFN's norm, and the route."""
        u = self.ffn_norm(h)
        if not self.is_moe:
            return Flow(context, h, u)
        chosen, loss, counts = self.router(u, context)
        return Flow(context, h, u, chosen, balance=loss, counts=counts)

    def dispatch(self, flow: Flow) -> Flow:
        """DISPATCH: every token to the ranks of its experts."""
        if flow.route is None or flow.u is None:
            return flow
        ticket: list[Arrived] = []
        rows, gates = _Dispatch.apply(
            flow.u, flow.route.gates, flow.route.ids, flow.context.dispatcher, ticket
        )
        return replace(flow, arrived=replace(ticket[0], rows=rows, gates=gates))

    def mlp(self, flow: Flow) -> Flow:
        """MLP: the dense FFN, or the shared experts onto the residual and the routed ones on what arrived."""
        return self.routed(self.unrouted(flow))

    def unrouted(self, flow: Flow) -> Flow:
        """The half of MLP that needs nothing from elsewhere: the dense FFN or the shared experts, onto the residual."""
        assert flow.u is not None, "MLP follows ATTN, which makes the FFN's input"
        own = self.shared if self.is_moe else self.dense
        return replace(flow, h=flow.h if own is None else flow.h + own(flow.u, flow.context.ledger), u=None)

    def routed(self, flow: Flow) -> Flow:
        """The other half: the routed experts on what arrived."""
        if flow.arrived is None:
            return flow
        return replace(flow, y=self.experts(flow.arrived, flow.context.ledger))

    def combine(self, flow: Flow) -> Flow:
        """COMBINE: the experts' sums back onto the residual."""
        if flow.y is None or flow.arrived is None:
            return flow
        h = _Combine.apply(flow.y, flow.h, flow.context.dispatcher, flow.arrived)
        return replace(flow, h=h, route=None, arrived=None, y=None)

    def forward(self, h: Float[Tensor, "T D"], context: Context) -> Flow:
        """The four parts one after another."""
        return self.combine(self.mlp(self.dispatch(self.attn(h, context))))


def _keep(ctx: Any, dispatcher: Dispatcher, arrived: Arrived) -> None:
    """Save what arrived for backward: its tensors where autograd's hooks see them, so that recomputation can let go."""
    ctx.save_for_backward(arrived.rows, arrived.ids, arrived.gates)
    shared = {field.name for field in fields(Arrived)}
    ctx.rest = {f.name: getattr(arrived, f.name) for f in fields(arrived) if f.name not in shared}
    ctx.dispatcher, ctx.kind = dispatcher, type(arrived)


def _kept(ctx: Any) -> Arrived:
    rows, ids, gates = ctx.saved_tensors
    return ctx.kind(rows=rows, ids=ids, gates=gates, **ctx.rest)


class _Dispatch(torch.autograd.Function):
    """`ticket` receives what arrived: combine and both backwards name it to the backend."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, ids: Tensor, dispatcher: Dispatcher, ticket: list) -> Any:
        arrived = dispatcher.dispatch(x, Route(ids, gates)).wait()
        ticket.append(arrived)
        _keep(ctx, dispatcher, arrived)
        return arrived.rows.view_as(arrived.rows), arrived.gates.view_as(arrived.gates)

    @staticmethod
    def backward(ctx: Any, drows: Tensor, dgates: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        dx, dgates = ctx.dispatcher.dispatch_backward(drows, dgates, _kept(ctx)).wait()
        return dx, dgates, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, into: Tensor, dispatcher: Dispatcher, arrived: Arrived) -> Tensor:
        _keep(ctx, dispatcher, arrived)
        return dispatcher.combine(y, arrived, into).wait()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.dispatcher.combine_backward(dout, _kept(ctx)).wait(), dout, None, None
