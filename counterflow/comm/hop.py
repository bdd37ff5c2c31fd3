"""Tokens over one link and back: what every backend of rows, collective or two-hop, is made of.

Out, a token goes once to each destination that holds one of its experts, with the ids and gates meant for it. Back, the
destination's one row a token comes home and is summed in fp32, destination by destination. A hop knows nothing of what
lies behind its destinations: a rank with its experts, or a node with its ranks.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterflow.comm.clock import mark
from counterflow.comm.dispatch import Pending, Route
from counterflow.comm.exchange import Exchange
from counterflow.comm.traffic import Traffic
from counterflow.kernels.fp8 import dequantise, quantise


@dataclass(frozen=True)
class Sent:
    """What a hop remembers of tokens on their way: enough for the way back and for the backwards of both."""

    tokens: Int[Tensor, "S"]
    """The token of each sent row; rows are by destination, and by token within one."""
    sent: tuple[int, ...]
    """Rows to each destination."""
    received: tuple[int, ...]
    """Rows from each source."""
    total: int
    """Tokens, those that went nowhere included."""


class Hop:
    """An exchange whose i-th rank leads to experts i × `experts_each` and on."""

    def __init__(self, exchange: Exchange, experts_each: int, fp8: bool = False) -> None:
        self.exchange, self.experts_each, self.fp8 = exchange, experts_each, fp8
        self.traffic = Traffic()

    def out(self, x: Float[Tensor, "T D"], route: Route) -> Pending[tuple[Tensor, Route, Sent]]:
        """Rows that came, (A, D), their route with ids local to this destination, −1 for none, and what to remember."""
        sent, ids, gates = self._plan(route)
        rows = self.again(x, sent)
        came_ids, came_gates = self._move(ids, sent), self._move(gates, sent)
        return Pending(lambda: (rows.wait(), Route(came_ids.wait(), came_gates.wait()), sent))

    def again(self, x: Float[Tensor, "T D"], sent: Sent) -> Pending[Float[Tensor, "A D"]]:
        """Other rows by the same way."""
        self.traffic.rows += sum(sent.sent) - sent.sent[self.exchange.index]
        if not self.fp8:
            return self._move(x[sent.tokens], sent)
        came = self._move(quantise(x)[sent.tokens], sent)
        return Pending(lambda: dequantise(came.wait(), x.shape[1], x.dtype))

    def back(
        self, rows: Float[Tensor, "A D"], sent: Sent, into: Tensor | None = None, gates: bool = False
    ) -> Pending[Float[Tensor, "T D"]]:
        """into + each token's rows, or `gates`, summed in fp32 in the order of destinations and rounded once."""
        self.traffic.rows += 0 if gates else sum(sent.received) - sent.received[self.exchange.index]
        came = self._move(rows, sent, home=True)

        def finish() -> Tensor:
            found = came.wait()
            wide = torch.promote_types(found.dtype, torch.float32)
            if into is None:
                total = found.new_zeros((sent.total, *found.shape[1:]), dtype=wide)
            else:
                total = into.to(wide, copy=True)
            for tokens, some in zip(sent.tokens.split(sent.sent), found.split(sent.sent)):
                total.index_add_(0, tokens, some.to(wide))  # a token is once in a part: no order to depend on
            return total.to(found.dtype if into is None else into.dtype)

        return Pending(finish)

    def _plan(self, route: Route) -> tuple[Sent, Tensor, Tensor]:
        """Who goes where, with local ids and gates of each row to be sent; the sizes are exchanged."""
        size = self.exchange.size
        owners = route.ids.div(self.experts_each, rounding_mode="floor")
        places = torch.arange(size, device=route.ids.device)
        hit = (owners[:, None, :] == places[None, :, None]).any(-1)
        destinations, tokens = hit.t().nonzero(as_tuple=True)
        sent = hit.sum(0).tolist()
        received = self.exchange.counts(sent)
        mine = owners[tokens] == destinations[:, None]
        ids = torch.where(mine, route.ids[tokens] % self.experts_each, -1)
        gates = torch.where(mine, route.gates[tokens], 0)
        return Sent(tokens, tuple(sent), tuple(received), len(route.ids)), ids, gates

    def _move(self, rows: Tensor, sent: Sent, home: bool = False) -> Pending[Tensor]:
        """Rows to their destinations, or from them home."""
        there, here = (sent.received, sent.sent) if home else (sent.sent, sent.received)
        away = sum(there) - there[self.exchange.index]
        self.traffic.bytes += away * rows[:1].numel() * rows.element_size() if len(rows) else 0
        return self._timed(self.exchange.rows(rows, there, here), rows.device)

    def _timed(self, pending: Pending[Tensor], device: torch.device) -> Pending[Tensor]:
        def finish() -> Tensor:
            start = mark(device)
            value = pending.wait()
            self.traffic.waits.append((start, mark(device)))
            return value

        return Pending(finish)
