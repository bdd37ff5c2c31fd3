"""Processes of a benchmark on this host: one act on all of them, and whether they share a GPU.

Where ranks share a GPU they take turns on it, and what is timed there is no link. That shows that kernels run and end,
and says nothing of their speed.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from counterflow.comm.mesh import Mesh
from counterflow.config.run import Parallel
from counterflow.machine import cores
from counterflow.train.launch import joined

TURN_S = 0.5
NO_LINK = "All ranks share one GPU and take turns on it: no time here is that of a link."


def on_processes(play: Callable[..., object], parallel: Parallel, device: str, *given: Any) -> None:
    """`play(mesh, *given)` on each of a layout's processes; `play` is a module's function. On a CPU they share its
    cores."""
    for _ in begun(play, parallel, device, *given):
        pass


def begun(
    play: Callable[..., object], parallel: Parallel, device: str, *given: Any, limit_s: float = float("inf")
) -> Iterator[None]:
    """The same, and a turn for the caller every half second until all processes have ended.

    Fails: ProcessException where one failed, TimeoutError after `limit_s`; none is left alive, however this ends.
    """
    end, ranks = time.monotonic() + limit_s, parallel.processes
    arguments = (parallel, free_port(), device, play, given)
    running = multiprocessing.spawn(_rank, arguments, nprocs=ranks, join=False)
    assert running is not None, "who does not join gets the processes"
    try:
        while not running.join(timeout=TURN_S):
            if time.monotonic() > end:
                raise TimeoutError(f"{ranks} processes did not end within {limit_s:.0f} s and were killed")
            yield
    finally:
        for process in running.processes:
            if process is not None and process.is_alive():
                process.kill()
                process.join()


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
        torch.set_num_threads(max(1, cores() // ranks))
    with joined(parallel, device) as mesh:
        play(mesh, *given)
