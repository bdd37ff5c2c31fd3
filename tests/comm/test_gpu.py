"""The backends of GPUs against `local`, in processes of their own: one a GPU, or two on the only one.

Two processes on one GPU take turns on it, so that this shows what is right and not what is fast.
"""

import os
import random
import time
from dataclasses import fields, replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from counterflow.comm import open_dispatcher
from counterflow.comm.dispatch import Terms
from counterflow.comm.local import Local
from counterflow.comm.mesh import Mesh
from counterflow.comm.peers import Peers, process_peers
from counterflow.kernels.fp8 import dequantise, quantise
from tests.comm.test_backends import Given, assert_arrived, close, experts_of, given, part, through

pytestmark = pytest.mark.gpu
KINDS = ("uniform", "node-limited", "skewed", "one expert", "empty rank")
ROUNDS = 40


def on(device: torch.device, one: Given) -> Given:
    return Given(*(getattr(one, field.name).to(device) for field in fields(one)))


def check_rank(dispatcher, rank: int, ranks: int, kind: str, sizes: list[int], dtype, seed: int, late=0.0):
    """This rank's rows, outputs and gradients are those of one rank that has all experts."""
    device, count = torch.device("cuda", torch.cuda.current_device()), 4 * ranks
    experts = experts_of(count, dtype).to(device)
    every = [given(kind, size, count, ranks, seed * 100 + rank, dtype) for rank, size in enumerate(sizes)]
    out, arrived, found = through(
        dispatcher, part(experts, rank, ranks), on(device, every[rank]), late if rank == seed % ranks else 0.0
    )
    wanted = [through(Local(), experts, on(device, one)) for one in every]
    assert close(out, wanted[rank][0], dtype), "combine"
    for what, a, b in zip(("x", "gates", "into"), found, wanted[rank][2]):
        assert close(a, b, dtype), what
    for index in (3, 4):
        whole = torch.stack([gradients[index] for _, _, gradients in wanted]).sum(0)
        assert close(found[index], whole.chunk(ranks)[rank], dtype), "experts"
    arrived = type(arrived)(arrived.rows.cpu(), arrived.ids.cpu(), arrived.gates.cpu(), arrived.way)
    assert_arrived(arrived, every, rank, count // ranks)


def rounds(rank: int, ranks: int, name: str, dtype) -> None:
    peers = open_peers(rank, ranks)
    dispatcher = open_dispatcher(name, peers, Terms(4 * ranks, tokens=32))
    generator = random.Random(name)
    for seed in range(ROUNDS):
        sizes = [generator.choice((0, 1, generator.randrange(33))) for _ in range(ranks)]
        late = generator.random() * 0.01
        check_rank(dispatcher, rank, ranks, KINDS[seed % len(KINDS)], sizes, dtype, seed, late)
    assert dispatcher.traffic()[0].rows > 0
    dist.destroy_process_group()


def open_peers(rank: int, ranks: int) -> Peers:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    apart = torch.cuda.device_count() >= ranks
    if not apart:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    dist.init_process_group("cpu:gloo,cuda:nccl" if apart else "gloo", rank=rank, world_size=ranks)
    return process_peers(Mesh(data=ranks, expert=ranks, rank=rank, device=device))


def start(play, *arguments: object) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(random.SystemRandom().randrange(20000, 60000)))
    ranks = max(2, torch.cuda.device_count())
    multiprocessing.spawn(play, (ranks, *arguments), nprocs=ranks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["nvlink", "copy_engine"])
def test_rows_exact_outputs_and_gradients_close_to_local(name, dtype):
    start(rounds, name, dtype)


def in_fp8(rank: int, ranks: int, name: str) -> None:
    peers, device = open_peers(rank, ranks), torch.device("cuda", torch.cuda.current_device())
    dispatcher, count = open_dispatcher(name, peers, Terms(4 * ranks, fp8=True, tokens=32)), 4 * ranks
    experts = experts_of(count, torch.float32).to(device)
    for seed in range(4):
        one = on(device, given("uniform", 7 * seed, count, ranks, seed * 100 + rank, torch.float32))
        out, _, _ = through(dispatcher, part(experts, rank, ranks), one)
        rounded = dequantise(quantise(one.x), one.x.shape[1], torch.float32)
        want, _, _ = through(Local(), experts, replace(one, x=rounded))
        assert len(one.x) == 0 or (out - want).abs().max() <= 1e-5 * want.abs().max()
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["nvlink", "copy_engine"])
def test_fp8_on_the_wire_is_the_rows_rounded_and_nothing_else(name):
    start(in_fp8, name)


def no_room(rank: int, ranks: int) -> None:
    peers = open_peers(rank, ranks)
    dispatcher = open_dispatcher("nvlink", peers, Terms(4 * ranks, tokens=32, room=3))
    with pytest.raises(Exception, match="room for 3"):
        check_rank(dispatcher, rank, ranks, "one expert", [32] * ranks, torch.float32, 1)
    dist.destroy_process_group()


def test_rows_without_room_are_an_error_on_every_rank():
    start(no_room)


def dead(rank: int, ranks: int) -> None:
    import counterflow.comm.wire as wire

    wire.PATIENCE_S = 2.0
    peers = open_peers(rank, ranks)
    dispatcher = open_dispatcher("nvlink", peers, Terms(4 * ranks, tokens=32))
    check_rank(dispatcher, rank, ranks, "uniform", [9] * ranks, torch.float32, 1)
    if rank == 1:
        time.sleep(8)
    else:
        with pytest.raises(Exception, match="waited 2 s for the counts of rows of rank 1"):
            check_rank(dispatcher, rank, ranks, "uniform", [9] * ranks, torch.float32, 2)
    os._exit(0)


def test_a_rank_that_is_silent_is_named():
    start(dead)
