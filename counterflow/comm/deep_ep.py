"""DeepEP's kernels (V1, `deep_ep.Buffer`) where they are installed and work; else one line that says why not.

Its dispatch is ours: a token once to a rank, with local expert ids, −1 for none, and gates; its combine sums rows that
are weighed already. Written after its documentation and not yet run: no machine with DeepEP was to be had.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from counterflow.comm.clock import mark
from counterflow.comm.dispatch import Arrived, Dispatcher, Pending, Route, Terms
from counterflow.comm.peers import Peers
from counterflow.comm.traffic import Traffic
from counterflow.errors import ConfigError


@dataclass(frozen=True)
class Delivered(Arrived):
    """What arrived, and DeepEP's handle of the way it came."""

    handle: Any
    away: tuple[int, int]
    """Rows that left this rank for it, and rows that came to it from others."""


def deep_ep(peers: Peers, terms: Terms) -> Dispatcher:
    """Fails: ConfigError with the reason it cannot be used."""
    group = getattr(peers.whole, "group", None)
    try:
        library: Any = import_module("deep_ep")
        if group is None:
            raise RuntimeError("it joins processes, and these ranks are threads or one alone")
        return DeepEp(library.Buffer, group, peers.whole.index, terms)
    except (ImportError, AttributeError, RuntimeError, AssertionError) as error:
        reason = ConfigError(
            f"dispatch is deep_ep, and DeepEP cannot be used here ({str(error).splitlines()[0]}); install its V1 "
            "(which needs NVSHMEM) or set dispatch to another backend."
        )
        reason.shared = True
        raise reason from error


class DeepEp:
    """A dispatcher over one buffer, which is made with the first call."""

    def __init__(self, buffer: Any, group: Any, index: int, terms: Terms) -> None:
        self._make, self._group, self._index, self._terms = buffer, group, index, terms
        if terms.multiprocessors:
            buffer.set_num_sms(terms.multiprocessors // 2 * 2)
        self._buffer: Any = None
        self._moved = Traffic()

    def dispatch(self, x: Float[Tensor, "T D"], route: Route) -> Pending[Delivered]:
        """Each row once to every rank that holds one of its experts."""
        buffer = self._open(x)
        per_rank, per_node, per_expert, to_rank, _ = buffer.get_dispatch_layout(
            route.ids, self._terms.experts
        )
        rows, ids, gates, _, handle, event = buffer.dispatch(
            x,
            topk_idx=route.ids,
            topk_weights=route.gates.float(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=to_rank,
            num_tokens_per_expert=per_expert,
            async_finish=True,
        )

        def finish() -> Delivered:
            self._await(event)
            sent = per_rank.tolist()
            away = sum(sent) - sent[self._index], len(rows) - sent[self._index]
            self._count(away[0], x)
            return Delivered(rows, ids, gates, handle, away)

        return Pending(finish)

    def combine(
        self, y: Float[Tensor, "A D"], arrived: Arrived, into: Float[Tensor, "T D"]
    ) -> Pending[Float[Tensor, "T D"]]:
        """into + the sum of each token's rows; the sum is rounded before `into` is added."""
        sums = self._home(y, arrived, None)
        return Pending(lambda: into + sums.wait()[0])

    def combine_backward(self, dout: Float[Tensor, "T D"], arrived: Arrived) -> Pending[Float[Tensor, "A D"]]:
        """The output's gradient by the way the rows came."""
        assert isinstance(arrived, Delivered), "what was delivered comes back to who delivered it"
        self._count(arrived.away[0], dout)
        rows, *_, event = self._open(dout).dispatch(
            dout.contiguous(), handle=arrived.handle, async_finish=True
        )
        return Pending(lambda: (self._await(event), rows)[1])

    def dispatch_backward(
        self, drows: Float[Tensor, "A D"], dgates: Float[Tensor, "A K"], arrived: Arrived
    ) -> Pending[tuple[Float[Tensor, "T D"], Float[Tensor, "T K"]]]:
        """The tokens' gradients, summed as in combine, and their gates'."""
        return self._home(drows, arrived, dgates.float().contiguous())

    def traffic(self) -> list[Traffic]:
        """What moved since this was last asked."""
        found, self._moved = self._moved, Traffic()
        return [found]

    def _open(self, x: Tensor) -> Any:
        if self._buffer is None:
            row, ranks = x.shape[1] * x.element_size(), self._group.size()
            configs = self._make.get_dispatch_config(ranks), self._make.get_combine_config(ranks)
            size = max(config.get_nvl_buffer_size_hint(row, ranks) for config in configs)
            self._buffer = self._make(self._group, size, 0)
        return self._buffer

    def _home(self, rows: Tensor, arrived: Arrived, gates: Tensor | None) -> Pending[tuple[Tensor, Any]]:
        assert isinstance(arrived, Delivered), "what was delivered comes back to who delivered it"
        self._count(arrived.away[1], rows)
        sums, weights, event = self._open(rows).combine(
            rows.contiguous(), arrived.handle, topk_weights=gates, async_finish=True
        )
        return Pending(lambda: (self._await(event), (sums, weights))[1])

    def _await(self, event: Any) -> None:
        start = mark(torch.device("cuda"))
        event.current_stream_wait()
        self._moved.waits.append((start, mark(torch.device("cuda"))))

    def _count(self, away: int, rows: Tensor) -> None:
        self._moved.rows += away
        self._moved.bytes += away * rows.shape[1] * rows.element_size()
