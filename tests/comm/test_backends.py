"""Every backend against `local`: several ranks as threads of one process, their tokens and experts drawn at random."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist

from counterflow.comm import open_dispatcher
from counterflow.comm.dispatch import Route, Terms
from counterflow.comm.exchange import GroupExchange
from counterflow.comm.hop import Hop
from counterflow.comm.local import Local
from counterflow.comm.mesh import Group
from counterflow.comm.peers import Peers, thread_peers
from counterflow.config.backends import backends
from counterflow.errors import ConfigError
from counterflow.kernels.fp8 import dequantise, quantise
from counterflow.model.debts import Ledger
from counterflow.model.experts import Experts
from counterflow.model.layer import _Combine, _Dispatch

INTERPRETED = backends(lambda row: row.worst_case)
"""Their kernels run under Triton's interpreter here, a millisecond for each row: fewer tokens and rounds."""
PLAIN = backends(lambda row: not row.device)
ALL = [*PLAIN, *INTERPRETED]
WIDTH, INNER, TOP = 7, 5, 3
"""Odd on purpose."""


def routing(kind: str, tokens: int, experts: int, ranks: int, generator: torch.Generator) -> torch.Tensor:
    """Distinct experts of each token, (tokens, TOP)."""
    scores = torch.rand(tokens, experts, generator=generator)
    if kind == "node-limited":  # to the experts of one half of the ranks
        half = torch.randint(2, (tokens, 1), generator=generator)
        scores += (torch.arange(experts) // (experts // 2) == half) * 2.0
    elif kind == "skewed":
        scores *= 1.0 / torch.arange(1, experts + 1)
    elif kind == "one expert":
        scores[:, 0] = 2.0
        scores[:, 1:] = -torch.arange(1, experts).float()
    elif kind == "empty rank":
        scores[:, : experts // ranks] = -1.0
    return scores.topk(TOP, dim=-1).indices


@dataclass
class Given:
    """One rank's tokens and what comes down on them from above."""

    x: torch.Tensor
    gates: torch.Tensor
    ids: torch.Tensor
    into: torch.Tensor
    dout: torch.Tensor


def given(kind: str, tokens: int, experts: int, ranks: int, seed: int, dtype=torch.float32) -> Given:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    gates = torch.rand(tokens, TOP, generator=generator)
    ids = routing(kind, tokens, experts, ranks, generator)
    return Given(draw(tokens, WIDTH), gates, ids, draw(tokens, WIDTH), draw(tokens, WIDTH))


def through(dispatcher, experts: Experts, one: Given, delay: float = 0.0):
    """The experts' output added to `into`, what arrived, and all gradients."""
    x, gates, into = (value.clone().requires_grad_() for value in (one.x, one.gates, one.into))
    ticket: list = []
    time.sleep(delay)
    rows, arrived_gates = _Dispatch.apply(x, gates, one.ids, dispatcher, ticket)
    y = experts(replace(ticket[0], rows=rows, gates=arrived_gates), None)
    out = _Combine.apply(y, into, dispatcher, ticket[0])
    wanted = [x, gates, into, experts.gate_up, experts.down]
    return out.detach(), ticket[0], torch.autograd.grad(out, wanted, one.dout)


def experts_of(count: int, dtype: torch.dtype) -> Experts:
    experts = Experts(count, WIDTH, INNER)
    generator = torch.Generator().manual_seed(7)
    for weight in experts.parameters():
        weight.data = torch.randn(weight.shape, generator=generator).to(dtype)
    return experts


def part(experts: Experts, index: int, parts: int) -> Experts:
    own = Experts(len(experts.down), WIDTH, INNER)
    own.keep(index, parts)
    for name, weight in own.named_parameters():
        weight.data = dict(experts.named_parameters())[name].data.chunk(parts)[index].clone()
    return own


def all_ranks(name: str, ranks: int, experts: Experts, every: list[Given], node: int, delays=None, fp8=False):
    peers = thread_peers(ranks, node)
    count = len(experts.down)

    def play(rank: int):
        tokens = max(len(one.x) for one in every)
        dispatcher = open_dispatcher(name, peers[rank], Terms(count, fp8, tokens, multiprocessors=2))
        result = through(dispatcher, part(experts, rank, ranks), every[rank], delays[rank] if delays else 0.0)
        return *result, dispatcher

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(play, range(ranks)))


def bound(dtype: torch.dtype) -> float:
    """Sums of a token's rows in another grouping: some roundings, of bf16 one for every rank and hop."""
    return {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-2}[dtype]


def close(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    if not b.numel():
        return a.shape == b.shape
    return bool(
        (a.double() - b.double()).abs().max() <= bound(dtype) * b.double().abs().max().clamp_min(1e-30)
    )


def check(
    name: str, ranks: int, kind: str, sizes: list[int], dtype: torch.dtype, seed: int, delays=None
) -> None:
    count = 4 * ranks
    experts = experts_of(count, dtype)
    every = [given(kind, size, count, ranks, seed * 100 + rank, dtype) for rank, size in enumerate(sizes)]
    node = 2 if ranks % 2 == 0 else 1
    results = all_ranks(name, ranks, experts, every, node, delays)
    dgate_up, ddown = torch.zeros_like(experts.gate_up), torch.zeros_like(experts.down)
    for rank, (one, (out, arrived, gradients, _)) in enumerate(zip(every, results)):
        want, _, wanted = through(Local(), experts, one)
        assert close(out, want, dtype), "combine"
        for what, a, b in zip(("x", "gates", "into"), gradients, wanted):
            assert close(a, b, dtype), what
        dgate_up += wanted[3]
        ddown += wanted[4]
        assert_arrived(arrived, every, rank, count // ranks)
    for index, whole in ((3, dgate_up), (4, ddown)):
        assert close(torch.cat([gradients[index] for _, _, gradients, _ in results]), whole, dtype)


def assert_arrived(arrived, every: list[Given], rank: int, each: int) -> None:
    """Exactly the rows of the tokens that have an expert here, each once, with these experts' gates."""
    first, expected = rank * each, {}
    for one in every:
        for x, ids, gates in zip(one.x, one.ids, one.gates):
            mine = {(int(e) - first): float(g) for e, g in zip(ids, gates) if 0 <= int(e) - first < each}
            if mine:
                expected.setdefault(tuple(x.tolist()), []).append(mine)
    found: dict = {}
    for x, ids, gates in zip(arrived.rows, arrived.ids, arrived.gates):
        mine = {int(e): float(g) for e, g in zip(ids, gates) if e >= 0}
        found.setdefault(tuple(x.tolist()), []).append(mine)
    assert found == expected


KINDS = ("uniform", "node-limited", "skewed", "one expert", "empty rank")
CASES = [(name, ranks, kind) for name in PLAIN for ranks in (2, 4, 8) for kind in KINDS]
CASES += [(name, 2, kind) for name in INTERPRETED for kind in KINDS]
CASES += [(name, 4, kind) for name in INTERPRETED for kind in ("uniform", "one expert")]


@pytest.mark.parametrize(("name", "ranks", "kind"), CASES)
def test_rows_exact_outputs_and_gradients_close_to_local(name, ranks, kind):
    """`test_kept_bytes_follow_the_rows_that_arrived` has eight ranks of `nvlink`."""
    generator = random.Random(ranks)
    sizes = [0, 1, *(generator.randrange(4 if name in INTERPRETED else 30) for _ in range(ranks - 2))]
    check(name, ranks, kind, sizes, torch.float32, ranks)
    if name in INTERPRETED and (ranks, kind) != (2, "uniform"):
        return
    check(name, ranks, kind, sizes[::-1], torch.float64, ranks + 1)
    check(name, ranks, kind, sizes, torch.bfloat16, ranks + 2)


@pytest.mark.parametrize("name", ALL)
def test_no_tokens_anywhere_and_an_odd_number_of_ranks(name):
    check(name, 2, "uniform", [0, 0], torch.float32, 0)
    check(name, 3, "skewed", [5, 0, 9], torch.float32, 1)


@pytest.mark.parametrize("name", ALL)
def test_random_rounds_with_one_rank_late(name):
    """`bench/random_rounds.py` plays thousands."""
    generator = random.Random(name)
    for seed in range(4 if name in INTERPRETED else 30):
        ranks = 2 if name in INTERPRETED else generator.choice((2, 4))
        delays = [0.0] * ranks
        delays[generator.randrange(ranks)] = generator.random() * 0.01
        kind = generator.choice(KINDS)
        check(name, ranks, kind, [generator.randrange(12) for _ in range(ranks)], torch.float32, seed, delays)


def test_a_token_crosses_once_to_a_node_and_flat_once_to_a_rank():
    """Rows that leave a rank: over the slow link Σ of distinct other nodes, flat Σ of distinct other ranks."""
    ranks, node, count = 8, 2, 32
    experts = experts_of(count, torch.float32)
    every = [given("uniform", 40 + rank, count, ranks, rank) for rank in range(ranks)]
    flat = all_ranks("collective", ranks, experts, every, node)
    hops = all_ranks("two_hop", ranks, experts, every, node)
    for rank, one in enumerate(every):
        owners = [set((ids // (count // ranks)).tolist()) for ids in one.ids]
        others = sum(len(found - {rank}) for found in owners)
        nodes = sum(len({owner // node for owner in found} - {rank // node}) for found in owners)
        (whole,), (slow, _) = flat[rank][3].hops, hops[rank][3].hops
        sent = hops[rank][1].way[0]
        assert sum(sent.sent) - sent.sent[rank // node] == nodes
        came = sum(sent.received) - sent.received[rank // node]
        home = sum(flat[rank][1].way[0].received) - flat[rank][1].way[0].received[rank]
        # out, back, and the backwards of both
        assert slow.traffic.rows == 2 * nodes + 2 * came
        assert whole.traffic.rows == 2 * others + 2 * home


@pytest.mark.parametrize("name", ALL)
def test_fp8_on_the_wire_is_the_rows_rounded_and_nothing_else(name):
    """In FP8 a row arrives as its quantised self; two hops round numbers that are already rounded."""
    ranks, tokens = (2, 3) if name in INTERPRETED else (4, 20)
    count = 4 * ranks
    experts = experts_of(count, torch.float32)
    every = [given("uniform", tokens, count, ranks, rank) for rank in range(ranks)]
    results = all_ranks(name, ranks, experts, every, 2, fp8=True)
    for one, (out, _, _, _) in zip(every, results):
        rounded = dequantise(quantise(one.x), WIDTH, torch.float32)
        want, _, _ = through(Local(), experts, replace(one, x=rounded))
        assert (out - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("shape", [(0, 5), (1, 128), (3, 300), (7, 129)])
def test_fp8_keeps_every_number_to_a_sixteenth(shape):
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[0] or 1)[: shape[0], None]
    again = dequantise(quantise(x), shape[1], torch.float32)
    largest = x.abs().amax(1, keepdim=True) if x.numel() else x
    assert ((again - x).abs() <= x.abs() / 16 + largest / 448 / 512).all()
    assert quantise(x).shape == (shape[0], -(-shape[1] // 128) * 132)


@pytest.mark.parametrize("name", ["collective", "nvlink"])
def test_kept_bytes_follow_the_rows_that_arrived(name):
    """At eight ranks a backend keeps of a token what came to it, not ranks × tokens."""
    ranks, count, tokens = 8, 32, 3 if name in INTERPRETED else 64
    experts = experts_of(count, torch.float32)
    every = [given("uniform", tokens, count, ranks, rank) for rank in range(ranks)]
    for rank, (out, arrived, _, _) in enumerate(all_ranks(name, ranks, experts, every, 1)):
        assert close(out, through(Local(), experts, every[rank])[0], torch.float32)
        came = sum((one.ids // (count // ranks) == rank).any(1).sum() for one in every)
        assert len(arrived.rows) == came < 0.7 * ranks * tokens
        assert arrived.rows.untyped_storage().nbytes() == arrived.rows.numel() * 4


def test_ledgers_owe_the_experts_of_a_part():
    """A part's weight gradients are owed like any."""
    ranks, count = 2, 8
    experts = experts_of(count, torch.float32)
    every = [given("uniform", 9, count, ranks, rank) for rank in range(ranks)]
    peers = thread_peers(ranks)

    def play(rank: int):
        own, ledger = part(experts, rank, ranks), Ledger(owing=True)
        for weight in own.parameters():
            weight.main_grad = torch.zeros_like(weight)
        dispatcher, one, ticket = open_dispatcher("collective", peers[rank], Terms(count)), every[rank], []
        rows, gates = _Dispatch.apply(one.x.requires_grad_(), one.gates, one.ids, dispatcher, ticket)
        y = own(replace(ticket[0], rows=rows, gates=gates), ledger)
        _Combine.apply(y, one.into, dispatcher, ticket[0]).backward(one.dout)
        assert len(ledger) == 2 and not own.down.main_grad.any()
        ledger.pay()
        return own.down.main_grad

    with ThreadPoolExecutor(ranks) as pool:
        owed = torch.cat(list(pool.map(play, range(ranks))))
    want = sum(through(Local(), experts, one)[2][4] for one in every)
    assert close(owed, want, torch.float32)


def test_a_route_names_experts_by_owner():
    """Ids come out as their holder counts them, −1 for those of others."""
    peers, ids = thread_peers(2), [torch.tensor([[0, 5], [1, 2]]), torch.tensor([[4, 7]])]

    def play(rank: int) -> list[list[int]]:
        route = Route(ids[rank], torch.ones(ids[rank].shape))
        return Hop(peers[rank].whole, 4).out(torch.zeros(len(ids[rank]), 3), route).wait()[1].ids.tolist()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(play, range(2))) == [[[0, -1], [1, 2]], [[-1, 1], [0, 3]]]


def test_rows_without_room_are_an_error_on_every_rank():
    """A capacity that routing exceeds is said by all ranks alike, and no row is dropped."""
    ranks, count = 2, 8
    experts = experts_of(count, torch.float32)
    every = [given("one expert", 9, count, ranks, rank) for rank in range(ranks)]
    peers = thread_peers(ranks)

    def play(rank: int) -> str:
        dispatcher = open_dispatcher("nvlink", peers[rank], Terms(count, tokens=9, room=4))
        with pytest.raises(ConfigError) as caught:
            through(dispatcher, part(experts, rank, ranks), every[rank])
        assert caught.value.shared
        return str(caught.value)

    with ThreadPoolExecutor(ranks) as pool:
        first, second = pool.map(play, range(ranks))
    assert first == second
    assert "there is room for 4; raise parallel.dispatch_room" in first


def test_deep_ep_says_in_one_line_why_it_cannot_be_used():
    if find_spec("deep_ep"):
        pytest.skip("DeepEP is installed")
    with pytest.raises(ConfigError, match=r"No module named 'deep_ep'.*set dispatch to another"):
        open_dispatcher("deep_ep", thread_peers(2)[0], Terms(8))


@pytest.mark.parametrize("name", backends(lambda row: row.device))
def test_a_backend_of_gpus_is_refused_between_processes_on_a_cpu(name):
    """With one line, before a row is sent; `deep_ep` before it is looked for."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        peers = Peers(GroupExchange(Group((0,), 0, dist.group.WORLD), torch.device("cpu")))
        with pytest.raises(
            ConfigError, match=f"dispatch is {name} and the device is cpu.*collective or two_hop"
        ):
            open_dispatcher(name, peers, Terms(8))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", INTERPRETED)
def test_ways_travelled_for_a_benchmark_leave_no_trace(name):
    """Rows sent three times and only passed over on the way change nothing for the calls that follow."""
    ranks, count = 2, 8
    peers, experts = thread_peers(ranks, 1), experts_of(count, torch.float32)
    every = [given("uniform", size, count, ranks, size, torch.float32) for size in (3, 2)]

    def play(rank: int):
        dispatcher, own = (
            open_dispatcher(name, peers[rank], Terms(count, tokens=3)),
            part(experts, rank, ranks),
        )
        first = through(dispatcher, own, every[rank])
        dispatcher.repeats = 3
        dispatcher.transport(every[rank].x, first[1]).wait()
        dispatcher.transport_home(first[1].rows, first[1]).wait()
        return first, through(dispatcher, own, every[rank])

    with ThreadPoolExecutor(ranks) as pool:
        for first, second in pool.map(play, range(ranks)):
            assert torch.equal(first[0], second[0])
            assert all(torch.equal(a, b) for a, b in zip(first[2], second[2]))
