"""Dispatch between nodes: over the slow link once a node, then on to its ranks. [§3.2.2]

A token goes to each node that holds one of its experts once, to the rank with its own local index there, which forwards
it over the node's fast links to each rank that holds one. On the way back the forwarding rank sums what its node's
ranks give, so one row a node crosses the slow link.
"""

from counterflow.comm.dispatch import Terms
from counterflow.comm.hop import Hop
from counterflow.comm.peers import Peers
from counterflow.comm.relay import Relay


def two_hop(peers: Peers, terms: Terms) -> Relay:
    """Rank n × L + l is the l-th of node n. FP8 is made before the slow link and again before the fast one."""
    assert peers.rail is not None and peers.node is not None, "two hops need nodes"
    each = terms.experts // peers.rail.size
    return Relay([Hop(peers.rail, each, terms.fp8), Hop(peers.node, each // peers.node.size, terms.fp8)])
