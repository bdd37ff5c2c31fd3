"""The dispatch backends: what opens each, and what settings, planner and checks must know of it. No torch.

To add one: a file in `comm/` and a row here. A row names its opener by MODULE:FUNCTION, as entry points do, because
settings and planner read the table and must not import what the backend needs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Backend:
    """A row of BACKENDS."""

    opens: str
    """MODULE:FUNCTION that is called with Peers and Terms and gives this rank's Dispatcher."""
    one_rank: bool = False
    """It needs all experts on one rank, and is therefore not for `parallel.dispatch`."""
    one_host: bool = False
    """It joins the ranks of one host alone."""
    by_node: bool = False
    """A token goes to a node once and then on to its ranks, so `parallel.node_ranks` must be known."""
    device: str = ""
    """The device without which processes cannot use it; empty: any."""
    multiprocessors: bool = True
    """Whether its kernels on a GPU take multiprocessors, as many as one says."""
    fp8: bool = True
    """Whether rows can go out in FP8."""
    gates_fp32: bool = False
    """Whether gates travel as fp32, whatever they are computed in."""
    regions: int = 2
    """Standing buffers, each for the rows that arrive at a rank."""
    worst_case: bool = False
    """Buffers are for all rows that could arrive, or for `parallel.dispatch_room`."""
    source: str = "what is sent and what arrives, as many rows as there are"
    """Where regions and their sizes are known from."""
    ceiling: str = ""
    """The bare transfer that `counterflow bench` holds it against; empty: the fastest."""


BACKENDS: Mapping[str, Backend] = {
    "local": Backend(
        "counterflow.comm.local:local",
        one_rank=True,
        multiprocessors=False,
        fp8=False,
        regions=0,
        source="nothing travels",
    ),
    "collective": Backend(
        "counterflow.comm.collective:collective",
        source="torch's all-to-all: what is sent and what arrives, as many rows as there are",
        ceiling="NCCL",
    ),
    "two_hop": Backend(
        "counterflow.comm.two_hop:two_hop",
        by_node=True,
        regions=3,
        source="one more region where rows change from the network to the node's links [§3.2.2]",
    ),
    "nvlink": Backend(
        "counterflow.comm.nvlink:nvlink",
        one_host=True,
        device="cuda",
        gates_fp32=True,
        regions=4,
        worst_case=True,
        source="docs/DESIGN.md, decision 5: an arena of four regions, sized for every token",
        ceiling="push",
    ),
    "copy_engine": Backend(
        "counterflow.comm.nvlink:copy_engine",
        one_host=True,
        device="cuda",
        multiprocessors=False,
        gates_fp32=True,
        regions=4,
        worst_case=True,
        source="the same arena, filled by the copy engines",
        ceiling="copy engine",
    ),
    "deep_ep": Backend(
        "counterflow.comm.deep_ep:deep_ep",
        one_host=True,
        device="cuda",
        fp8=False,
        gates_fp32=True,
        regions=1,
        source="DeepEP V1's chunked queues, about the rows of one transfer; README hints",
    ),
}
LOCAL = "local"
"""What one rank that has all experts runs."""


def backends(holds: Callable[[Backend], object]) -> tuple[str, ...]:
    """Names of those between ranks of which something holds."""
    return tuple(name for name, row in BACKENDS.items() if not row.one_rank and holds(row))
