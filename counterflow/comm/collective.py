"""Flat dispatch over torch.distributed's all-to-all: a token once to each rank that holds one of its experts."""

from counterflow.comm.dispatch import Terms
from counterflow.comm.hop import Hop
from counterflow.comm.peers import Peers
from counterflow.comm.relay import Relay


def collective(peers: Peers, terms: Terms) -> Relay:
    """Any ranks, gloo or NCCL."""
    return Relay([Hop(peers.whole, terms.experts // peers.whole.size, terms.fp8)])
