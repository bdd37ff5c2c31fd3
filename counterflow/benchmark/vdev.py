"""torch's own device-side all-to-all, `symm_mem.all_to_all_vdev_2d`, timed in processes of its own.

It needs symmetric memory of another kind (NVSHMEM) than our arenas, and a process has one kind. So every rank starts a
child on its GPU, the children find each other on a port of their own, and the parents wait for them.
"""

import os
import queue
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from counterflow.benchmark.processes import share_a_gpu
from counterflow.benchmark.rounds import Rounds, middle
from counterflow.comm.mesh import Mesh

PATIENCE_S = 90.0
WARMUPS = 20


def vdev_2d(mesh: Mesh, sizes: dict[int, int], width: int, rounds: int) -> dict[int, float] | str:
    """Median seconds by size for about `sizes[size]` rows of `width` bytes from each rank, evenly to all others; else
    why it does not run here. A collective of one host."""
    if mesh.device.type != "cuda" or mesh.size == 1 or share_a_gpu(mesh):
        return "all_to_all_vdev_2d is not timed: it needs several GPUs."
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    port = mesh.everyone(20000 + os.getpid() % 20000)[0]
    child = context.Process(target=_play, args=(mesh.rank, mesh.size, port, sizes, width, rounds, answers))
    child.start()
    try:
        found = answers.get(timeout=PATIENCE_S)
    except queue.Empty:
        found = f"no answer within {PATIENCE_S:.0f} s"
    if child.is_alive():
        child.join(5)
        child.kill()
    every = mesh.everyone(found)
    wrong = [answer for answer in every if isinstance(answer, str)]
    return f"all_to_all_vdev_2d does not run here: {wrong[0]}" if wrong else found


def _play(
    rank: int, ranks: int, port: int, sizes: dict[int, int], width: int, rounds: int, answers: Any
) -> None:
    try:
        answers.put(_timed(rank, ranks, port, sizes, width, rounds))
    except (RuntimeError, ImportError, AttributeError) as error:
        answers.put(str(error).splitlines()[0][:300])


def _timed(
    rank: int, ranks: int, port: int, sizes: dict[int, int], width: int, rounds: int
) -> dict[int, float]:
    import torch.distributed._symmetric_memory as symmetric

    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    symmetric.set_backend("NVSHMEM")
    group = dist.group.WORLD
    assert group is not None, "it was just made"
    most = max(sizes.values()) + ranks
    given = symmetric.empty(most, width // 2, dtype=torch.bfloat16, device=device)
    found = symmetric.empty(2 * most, width // 2, dtype=torch.bfloat16, device=device)
    counts = symmetric.empty(ranks, dtype=torch.int64, device=device)
    places = symmetric.empty(2, ranks, dtype=torch.int64, device=device)
    for memory in (given, found, counts, places):
        symmetric.rendezvous(memory, group)
    rounds_of, result = Rounds(Mesh(data=ranks, rank=rank, device=device)), {}
    for size, rows in sizes.items():
        each = rows // (ranks - 1)
        counts.copy_(torch.tensor([each * (to != rank) for to in range(ranks)]))

        def act() -> None:
            torch.ops.symm_mem.all_to_all_vdev_2d(given, found, counts, places, group.group_name)

        result[size] = middle(rounds_of.time({"it": act}, WARMUPS, rounds)["it"])[0]
    return result
