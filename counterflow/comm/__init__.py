"""Meshes, channels, dispatch. Here only the table of backends: to add one, a file and a line."""

from collections.abc import Callable, Mapping

from counterflow.comm.collective import collective
from counterflow.comm.deep_ep import deep_ep
from counterflow.comm.dispatch import Dispatcher, Terms
from counterflow.comm.local import Local
from counterflow.comm.nvlink import copy_engine, nvlink
from counterflow.comm.peers import Peers
from counterflow.comm.two_hop import two_hop

DISPATCHERS: Mapping[str, Callable[[Peers, Terms], Dispatcher]] = {
    "local": lambda peers, terms: Local(),
    "collective": collective,
    "two_hop": two_hop,
    "nvlink": nvlink,
    "copy_engine": copy_engine,
    "deep_ep": deep_ep,
}
"""By name: peers and terms give this rank's dispatcher."""
