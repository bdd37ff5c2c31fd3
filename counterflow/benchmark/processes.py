"""Processes of a benchmark on this host, for scripts on machines without the command line: one a GPU, or some on CPUs.

Where there is one GPU and two ranks are asked for, both run on it, by turns: what is timed there is no link. That shows
that kernels run and end, and says nothing of their speed.
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
from counterflow.train.launch import joined, started

ALLOWED = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
"""PyTorch's own word for symmetric memory of two processes on one device."""
NO_LINK = "All ranks share one GPU and take turns on it: no time here is that of a link."


def on_devices(play: Callable[..., object], ranks: int, device: str, *given: Any) -> None:
    """`play(mesh, *given)` on every rank; `play` is a module's function. 0 ranks: one a GPU, two on a CPU or one GPU
    where ALLOWED is set. Under torchrun, on its processes."""
    cuda = device != "cpu" and torch.cuda.is_available()
    if started() is not None:
        whole = Parallel(data=started() or 1, expert=started() or 1)
        with joined(whole, "cuda" if cuda else "cpu") as mesh:
            play(mesh, *given)
        return
    ranks = ranks or (_ranks_of_gpus() if cuda else 2)
    if ranks == 1:
        play(Mesh(device=torch.device("cuda" if cuda else "cpu")), *given)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_rank, (ranks, port, cuda, play, given), nprocs=ranks)


def share_a_gpu(mesh: Mesh) -> bool:
    """Whether several ranks run on one GPU."""
    return mesh.size > 1 and mesh.device.type == "cuda" and "nccl" not in dist.get_backend_config()


def _ranks_of_gpus() -> int:
    count = torch.cuda.device_count()
    return 2 if count == 1 and ALLOWED in os.environ else count


def _rank(rank: int, ranks: int, port: int, cuda: bool, play: Callable[..., object], given: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(LOCAL_RANK=str(rank))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    whole = Parallel(data=ranks, expert=ranks)
    if cuda and torch.cuda.device_count() < ranks:
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
        play(Mesh(data=ranks, rank=rank, device=device, expert=ranks), *given)
        dist.destroy_process_group()
        return
    if not cuda:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    with joined(whole, "cuda" if cuda else "cpu") as mesh:
        play(mesh, *given)
