"""Engines on several ranks that share the experts of one model: each has requests, a schedule and a cache of its own.

Every layer's tokens may go to any rank, so all ranks issue the same passes in the same order; who has nothing to run
runs over no rows and still serves the others with its experts. What decides how many passes there are is therefore
agreed first: whether anyone works, the depth of drafts, and whether anyone has rows for a module. An agreement is the
largest of all ranks' numbers, over the exchange that tells how many rows are sent.
"""

from counterflow.comm import open_dispatcher
from counterflow.comm.dispatch import Terms
from counterflow.comm.exchange import Exchange
from counterflow.comm.mesh import Mesh
from counterflow.comm.peers import process_peers
from counterflow.config.backends import backends
from counterflow.config.run import Parallel
from counterflow.errors import ConfigError, nearest
from counterflow.model.transformer import Transformer

DISPATCHES = backends(lambda row: not row.by_node)
"""Between ranks that write together; nodes are known to training only."""


class Ranks:
    """This rank's say among those that step together; without an exchange it is alone."""

    def __init__(self, exchange: Exchange | None = None) -> None:
        self.exchange = exchange

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.exchange is not None and self.exchange.size > 1

    def most(self, value: int) -> int:
        """The largest of all ranks' values. Every rank asks, and waits for all."""
        if self.exchange is None:
            return value
        return max(self.exchange.counts([value] * self.exchange.size))


def share_experts(model: Transformer, mesh: Mesh, rows: int, dispatch: str = Parallel.dispatch) -> Ranks:
    """The ranks of `mesh`, which all share the experts; `model`, which holds this rank's, is told how to reach them.

    `rows` is the most that one of them runs over in a pass. A collective.
    Fails: ConfigError on an unknown backend, or one that cannot be used here.
    """
    if dispatch not in DISPATCHES:
        error = ConfigError(f"dispatch is '{dispatch}'; {nearest(dispatch, DISPATCHES)}")
        error.shared = True
        raise error
    if mesh.expert == 1:
        return Ranks()
    peers = process_peers(mesh)
    terms = Terms(model.config.num_routed_experts, tokens=rows)
    model.dispatcher = open_dispatcher(dispatch, peers, terms)
    return Ranks(peers.whole)
