"""A stage's part of the model and what one micro-batch leaves in it: the ops that the executor issues.

Every part reads named values and names those it makes; in backward the same names carry gradients. The residual stream
`h` passes MLP and COMBINE by addition, so there its gradient is handed on as it is and its data need not be kept.
Transfers have no graph: the dispatcher's four calls are made here, and their results are waited for by the part that
reads them. There is no first or last stage, only parts: HEAD seeds its loss, EMBED ends its gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from counterflow.comm.dispatch import Arrived, Pending
from counterflow.model.debts import Ledger, main_grad
from counterflow.model.layer import Context, Flow, Layer
from counterflow.model.mtp import MtpModule
from counterflow.model.transformer import Transformer, head_loss
from counterflow.pipeline.segment import Segment, leaf
from counterflow.schedule.words import Kind, Op, Part, Plan

Place = tuple[Part, int]


@dataclass(frozen=True)
class StepSettings:
    """What all micro-batches of a step share."""

    sequences: int
    """Of a micro-batch."""
    length: int
    scale: float
    """1 / (target tokens of the global batch)."""
    mtp_weight: float = 0.0


@dataclass
class Sums:
    """What a rank measured in a step, summed over its micro-batches in their order."""

    nll: dict[int, Tensor] = field(default_factory=dict)
    """In nats, by depth."""
    balance: list[Tensor] = field(default_factory=list)
    counts: dict[int, Tensor] = field(default_factory=dict)
    """Tokens given to each expert, by layer; int64."""


@dataclass
class Pass:
    """One micro-batch in one stage: what its ops hand each other. Empty once W is done."""

    samples: Tensor | None
    settings: StepSettings
    flow: Flow | None = None
    h: Tensor | Pending[Tensor] | None = None
    grads: dict[str, Tensor] = field(default_factory=dict)
    segments: dict[Place, Segment] = field(default_factory=dict)
    seeds: dict[Place, Tensor] = field(default_factory=dict)
    """Of the losses: 1, with which a head's backward starts."""
    owed: dict[Place, Ledger] = field(default_factory=dict)
    arrived: dict[int, Arrived] = field(default_factory=dict)
    under_way: Pending | None = None
    """A transfer that the next part waits for."""
    zero: Tensor | None = None
    """A zero of the shape in which hidden states came from the stage before, without memory of its own."""

    def hidden(self) -> Tensor:
        """The residual stream, once it is there."""
        if isinstance(self.h, Pending):
            self.h = self.h.wait()
        assert self.h is not None, "a pass that computes has hidden states"
        return self.h

    def gradient(self) -> Tensor:
        """The gradient for the stage before; zero from a stage whose parts all rest."""
        if "h" in self.grads:
            return self.grads["h"]
        assert self.zero is not None, "a stage that another sends to was entered with hidden states"
        return self.zero


class Stage:
    """Parts of a model in order; `run` does one op of a pass."""

    def __init__(self, model: Transformer, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.gains = [p for module in self._modules() for p in module.parameters() if p.dim() == 1]
        self.reads_tokens = any(part in (Part.EMBED, Part.MERGE, Part.HEAD) for part, _ in plan)
        self._calls: Mapping[tuple[bool, Part], Callable[[Pass, int, Sums], None]] = {
            (True, Part.EMBED): self._embed,
            (True, Part.ATTN): self._attn,
            (True, Part.DISPATCH): self._dispatch,
            (True, Part.MLP): self._mlp,
            (True, Part.COMBINE): self._combine,
            (True, Part.MERGE): self._merge,
            (True, Part.HEAD): self._head,
            (False, Part.ATTN): self._attn_backward,
            (False, Part.DISPATCH): self._dispatch_backward,
            (False, Part.MLP): self._mlp_backward,
            (False, Part.COMBINE): self._combine_backward,
        }

    def run(self, op: Op, state: Pass, sums: Sums) -> None:
        """One op: F, I or W of a part."""
        if op.kind is Kind.W:
            state.owed.pop((op.part, op.layer)).pay()
            return
        plain = (
            Part.ATTN if op.part in (Part.EMBED, Part.MERGE, Part.HEAD) and op.kind is not Kind.F else op.part
        )
        if plain is not op.part:
            self._plain_backward(state, (op.part, op.layer))
        else:
            self._calls[(op.kind is Kind.F, op.part)](state, op.layer, sums)

    def drain(self) -> None:
        """Add the gains' gradients, which autograd leaves in `.grad`, to their fp32 accumulators."""
        for gain in self.gains:
            if gain.grad is not None:
                main_grad(gain).add_(gain.grad)
                gain.grad = None

    def _modules(self) -> list[torch.nn.Module]:
        found: list[torch.nn.Module] = []
        for part, index in self.plan:
            if part is Part.ATTN:
                found.append(self._layer(index))
            elif part is Part.HEAD:
                found.append(self.model.norm if index == 0 else self._module(index).norm)
            elif part is Part.MERGE:
                found += [self._module(index).embed_norm, self._module(index).hidden_norm]
        return found

    def _layer(self, index: int) -> Layer:
        depth = index - len(self.model.layers) + 1
        layer = self.model.layers[index] if depth < 1 else self._module(depth).layer
        assert isinstance(layer, Layer), "the model is made of layers"
        return layer

    def _module(self, depth: int) -> MtpModule:
        module = self.model.mtp[depth - 1]
        assert isinstance(module, MtpModule), "the model's MTP modules are MtpModules"
        return module

    def _context(self, state: Pass, tokens: int, place: Place) -> Context:
        """A context with a ledger of its own, so that each part's debts are paid apart."""
        settings = state.settings
        ledger = Ledger(owing=True)
        state.owed[place] = ledger
        return self.model.context(
            settings.sequences,
            tokens // settings.sequences,
            ledger=ledger,
            sequence_scale=settings.scale * settings.length,
        )

    def _keep(self, state: Pass, place: Place, leaves: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        if torch.is_grad_enabled():
            state.segments[place] = Segment(leaves, outputs)
        else:
            state.owed.pop(place, None)

    def _embed(self, state: Pass, index: int, sums: Sums) -> None:
        assert state.samples is not None, "EMBED reads tokens"
        h = self.model.embed(state.samples[:, :-1], Ledger())
        self._keep(state, (Part.EMBED, index), {}, {"h": h})
        state.h = h.detach()

    def _merge(self, state: Pass, depth: int, sums: Sums) -> None:
        assert state.samples is not None, "MERGE reads tokens"
        ahead, h = state.samples[:, depth:-1], leaf(state.hidden())
        before = h.view(state.settings.sequences, -1, h.shape[-1])[:, :-1].flatten(0, 1)
        ledger = Ledger(owing=True)
        state.owed[(Part.MERGE, depth)] = ledger
        merged = self._module(depth).merge(before, self.model.embed(ahead, Ledger()), ledger)
        self._keep(state, (Part.MERGE, depth), {"h": h}, {"h": merged})
        state.h = merged.detach()

    def _head(self, state: Pass, depth: int, sums: Sums) -> None:
        """Final norm, head and loss; the head's own gradient is added here, the hidden states' in backward."""
        assert state.samples is not None, "HEAD reads tokens"
        settings, h = state.settings, leaf(state.hidden())
        norm = self.model.norm if depth == 0 else self._module(depth).norm
        weight = settings.scale if depth == 0 else settings.scale * settings.mtp_weight / len(self.model.mtp)
        normed = norm(h)
        loss, nll = head_loss(normed, self.model.head, state.samples[:, depth + 1 :], weight, Ledger())
        self._keep(state, (Part.HEAD, depth), {"h": h}, {"h": normed, "loss": loss})
        if torch.is_grad_enabled():
            state.seeds[(Part.HEAD, depth)] = torch.ones_like(loss)
        sums.nll[depth] = sums.nll[depth] + nll if depth in sums.nll else nll
        state.h = normed.detach()

    def _attn(self, state: Pass, index: int, sums: Sums) -> None:
        h, layer = leaf(state.hidden()), self._layer(index)
        flow = layer.attn(h, self._context(state, len(h), (Part.ATTN, index)))
        assert flow.u is not None, "ATTN makes the FFN's input"
        outputs = {"h": flow.h, "u": flow.u}
        route = flow.route
        if route is not None and flow.balance is not None and flow.counts is not None:
            outputs |= {"gates": route.gates, "balance": flow.balance}
            sums.balance.append(flow.balance.detach())
            known = sums.counts.get(index)
            sums.counts[index] = flow.counts if known is None else known + flow.counts
            route = replace(route, gates=route.gates.detach())
        self._keep(state, (Part.ATTN, index), {"h": h}, outputs)
        state.flow = replace(
            flow, h=flow.h.detach(), u=flow.u.detach(), route=route, balance=None, counts=None
        )
        state.h = None

    def _dispatch(self, state: Pass, index: int, sums: Sums) -> None:
        flow = state.flow
        assert flow is not None and flow.u is not None and flow.route is not None, "DISPATCH follows ATTN"
        state.under_way = flow.context.dispatcher.dispatch(flow.u, flow.route)

    def _mlp(self, state: Pass, index: int, sums: Sums) -> None:
        """What needs nothing from elsewhere first: arrivals are waited for behind the shared experts."""
        flow, layer = state.flow, self._layer(index)
        assert flow is not None and flow.u is not None, "MLP follows ATTN"
        leaves = {"u": leaf(flow.u)}
        context = self._context(state, len(flow.h), (Part.MLP, index))
        done = layer.unrouted(replace(flow, context=context, u=leaves["u"], route=None))
        if state.under_way is not None:
            arrived = state.arrived[index] = state.under_way.wait()
            state.under_way = None
            leaves |= {"rows": leaf(arrived.rows), "arrived_gates": leaf(arrived.gates)}
            arrived = replace(arrived, rows=leaves["rows"], gates=leaves["arrived_gates"])
            done = layer.routed(replace(done, arrived=arrived))
        outputs = {"h": done.h} if done.y is None else {"h": done.h, "y": done.y}
        self._keep(state, (Part.MLP, index), leaves, outputs)
        if done.y is None:
            state.h, state.flow = done.h.detach(), None
        else:
            state.flow = replace(done, h=done.h.detach(), y=done.y.detach(), arrived=state.arrived[index])

    def _combine(self, state: Pass, index: int, sums: Sums) -> None:
        flow = state.flow
        assert flow is not None and flow.y is not None and flow.arrived is not None, "COMBINE follows MLP"
        state.h = flow.context.dispatcher.combine(flow.y, flow.arrived, flow.h)
        state.flow = None
        if not torch.is_grad_enabled():
            state.arrived.pop(index)

    def _plain_backward(self, state: Pass, place: Place) -> None:
        """A part between one `h` and another: EMBED, MERGE, HEAD."""
        if place in state.seeds:
            state.grads["loss"] = state.seeds.pop(place)
        found = state.segments.pop(place).backward(state.grads)
        state.grads = {"h": found["h"]} if "h" in found else {}

    def _combine_backward(self, state: Pass, index: int, sums: Sums) -> None:
        dispatcher = self.model.dispatcher
        state.under_way = dispatcher.combine_backward(state.grads["h"], state.arrived[index])

    def _mlp_backward(self, state: Pass, index: int, sums: Sums) -> None:
        if state.under_way is not None:
            state.grads["y"] = state.under_way.wait()
            state.under_way = None
        found = state.segments.pop((Part.MLP, index)).backward(state.grads)
        state.grads = {"h": state.grads["h"], **found}

    def _dispatch_backward(self, state: Pass, index: int, sums: Sums) -> None:
        drows, dgates = state.grads.pop("rows"), state.grads.pop("arrived_gates")
        state.under_way = self.model.dispatcher.dispatch_backward(drows, dgates, state.arrived.pop(index))

    def _attn_backward(self, state: Pass, index: int, sums: Sums) -> None:
        if state.under_way is not None:
            du, state.grads["gates"] = state.under_way.wait()
            state.under_way = None
            state.grads["u"] = du + state.grads["u"] if "u" in state.grads else du
            state.grads["balance"] = torch.ones((), dtype=torch.float32, device=du.device)
        found = state.segments.pop((Part.ATTN, index)).backward(state.grads)
        state.grads = {"h": found["h"]}
