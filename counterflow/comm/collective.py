"""Flat dispatch over torch.distributed's all-to-all: a token once to each rank that holds one of its experts."""

from counterflow.comm.hop import Hop
from counterflow.comm.peers import Peers
from counterflow.comm.relay import Relay


def collective(peers: Peers, num_experts: int, fp8: bool = False) -> Relay:
    """Any ranks, gloo or NCCL."""
    return Relay([Hop(peers.whole, num_experts // peers.whole.size, fp8)])
