"""Processes of a benchmark on this host: one act on all of them, and whether they share a GPU.

Where ranks share a GPU they take turns on it, and what is timed there is no link. That shows that kernels run and end,
and says nothing of their speed.
"""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from counterflow.comm.mesh import Mesh
from counterflow.config.run import Parallel
from counterflow.train.launch import joined

NO_LINK = "All ranks share one GPU and take turns on it: no time here is that of a link."


def on_processes(play: Callable[..., object], parallel: Parallel, device: str, *given: Any) -> None:
    """`play(mesh, *given)` on each of a layout's processes; `play` is a module's function. On a CPU they share its
    cores."""
    multiprocessing.spawn(_rank, (parallel, free_port(), device, play, given), nprocs=parallel.processes)


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def share_a_gpu(mesh: Mesh) -> bool:
    """Whether several ranks run on one GPU."""
    return mesh.size > 1 and mesh.device.type == "cuda" and "nccl" not in dist.get_backend_config()


def _rank(
    rank: int, parallel: Parallel, port: int, device: str, play: Callable[..., object], given: Any
) -> None:
    ranks = parallel.processes
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks)
    )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    with joined(parallel, device) as mesh:
        play(mesh, *given)
