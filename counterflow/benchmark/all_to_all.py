"""Dispatch and combine by every backend that works here, against what the same link gives to a plain copy.

Bytes are counted on the wire: a token once for every other rank that has any of its experts, what stays home does not
count. Times are the slowest rank's, each round behind a flush and a barrier on the device, ceilings and backends in
turn within each round. `transport` is dispatch with everything known before (a cached handle), `dispatch` the whole
operator with layout, exchange of counts and what is copied out, `combine` the way back with its sums.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from counterflow.benchmark.ceilings import Ceilings
from counterflow.benchmark.processes import NO_LINK, share_a_gpu
from counterflow.benchmark.rounds import Rounds, middle
from counterflow.benchmark.routings import drawn
from counterflow.benchmark.vdev import vdev_2d
from counterflow.comm import open_dispatcher
from counterflow.comm.dispatch import Dispatcher, Route, Terms
from counterflow.comm.mesh import Mesh
from counterflow.comm.peers import process_peers
from counterflow.config.backends import BACKENDS, backends
from counterflow.config.run import Parallel
from counterflow.errors import CounterflowError

SCALE = 128
"""Numbers that share a scale in FP8."""


@dataclass(frozen=True)
class AllToAll:
    """What is timed; the defaults are the report's layer, and on a CPU a narrow one."""

    tokens: tuple[int, ...] = ()
    """Of a rank, each a point of the curve; none: powers of two from 128 to 16384, on a CPU to 1024."""
    hidden: int = 0
    """0: 7168, on a CPU 1024."""
    experts: int = 256
    """On all ranks together."""
    top: int = 8
    """Experts of a token."""
    multiprocessors: tuple[int, ...] = (8,)
    """Budgets for the kernels and for NCCL."""
    backends: tuple[str, ...] = ()
    """None: all that work here."""
    routing: str = "uniform"
    """uniform, node-limited (half of the ranks), skewed, one expert, or empty rank."""
    rounds: int = 20
    """At most."""
    warmups: int = 20
    seed: int = 0
    seconds: float = 60.0
    """All rounds together on a CPU, about: fewer are made where they would take longer."""


def settled(wish: AllToAll, mesh: Mesh) -> AllToAll:
    """The wish with what it leaves to the device decided."""
    most, hidden = (14, 7168) if mesh.device.type == "cuda" else (10, 1024)
    tokens = wish.tokens or tuple(2**power for power in range(7, most + 1))
    return replace(wish, tokens=tokens, hidden=wish.hidden or hidden)


@dataclass(frozen=True)
class Contender:
    """A backend on its terms."""

    backend: str
    multiprocessors: int = 0
    fp8: bool = False

    @property
    def name(self) -> str:
        """As tables show it."""
        budget = f", {self.multiprocessors} SMs" if self.multiprocessors else ""
        return self.backend + budget + ", FP8" * self.fp8


def contenders(wish: AllToAll, mesh: Mesh) -> list[Contender]:
    """Every backend with every budget that means something to it, in bf16 and, where it can, FP8."""
    found = []
    for name in wish.backends or BACKENDS:
        row = BACKENDS[name]
        if (row.one_rank and mesh.size > 1) or row.device not in ("", mesh.device.type):
            continue
        bounded = mesh.device.type == "cuda" and row.multiprocessors
        budgets = wish.multiprocessors if bounded else (0,)
        if bounded and name == Parallel.dispatch:  # what a run does where nobody says anything
            budgets = (0, *budgets)
        found += [Contender(name, budget) for budget in budgets]
        if row.fp8:
            found.append(Contender(name, budgets[-1], fp8=True))
    return found


def routes(wish: AllToAll, mesh: Mesh, tokens: int) -> list[Tensor]:
    """The experts of each rank's tokens, (tokens, K) by rank, the same on every rank."""
    return [_ids(wish, mesh, tokens, rank) for rank in range(mesh.size)]


def _ids(wish: AllToAll, mesh: Mesh, tokens: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(wish.seed * 1000 + rank)
    return drawn(wish.routing, tokens, wish.experts, wish.top, mesh.size, generator)


def wire_rows(ids: Sequence[Tensor], experts: int) -> list[list[int]]:
    """Rows from each rank to each other one, each token once; 0 to itself. On one rank, all that stay."""
    each, size = experts // len(ids), len(ids)
    if size == 1:
        return [[len(ids[0])]]
    hit = [[(some // each == to).any(1).sum().item() for to in range(size)] for some in ids]
    return [[int(count) * (to != rank) for to, count in enumerate(row)] for rank, row in enumerate(hit)]


def row_bytes(hidden: int, fp8: bool) -> int:
    """Of a row on the wire, in bf16 or in FP8 with its scales."""
    return hidden + 4 * -(-hidden // SCALE) if fp8 else 2 * hidden


class Bench:
    """All that is timed, made once; `size` times one number of tokens. A collective."""

    def __init__(self, wish: AllToAll, mesh: Mesh) -> None:
        self.wish, self.mesh, self.why_not = wish, mesh, {}
        self.most = max(wish.tokens)
        self.rounds = Rounds(mesh)
        self.dispatchers: dict[Contender, Dispatcher] = {}
        for contender in contenders(wish, mesh):
            self._open(contender)
        budgets = wish.multiprocessors if mesh.device.type == "cuda" else ()
        self.ceilings = Ceilings(mesh, self.most, 2 * wish.hidden, budgets)

    def _open(self, contender: Contender) -> None:
        """A dispatcher that has carried a few tokens, or why it cannot."""

        def attempt() -> Dispatcher:
            dispatcher = self._made(contender)
            x, route = self._given(wish=replace(self.wish, tokens=(16,)), tokens=16)
            arrived = dispatcher.dispatch(x, route).wait()
            dispatcher.combine(arrived.rows, arrived, x).wait()
            return dispatcher

        found, wrong = None, ""
        try:
            found = attempt()
        except (CounterflowError, RuntimeError, ImportError) as error:
            wrong = str(error).splitlines()[0]
        failed = [reason for reason in self.mesh.everyone(wrong) if reason]
        if failed:
            self.why_not[contender.name] = failed[0]
        elif found is not None:
            self.dispatchers[contender] = found

    def _made(self, contender: Contender) -> Dispatcher:
        mesh, node = self.mesh, 0
        if BACKENDS[contender.backend].by_node:
            node = max(1, mesh.size // 2)
        bounded = Mesh(1, mesh.size, mesh.rank, mesh.device, mesh.size, contender.multiprocessors)
        terms = Terms(self.wish.experts, contender.fp8, self.most, contender.multiprocessors)
        return open_dispatcher(contender.backend, process_peers(bounded, node), terms)

    def _given(self, wish: AllToAll, tokens: int) -> tuple[Tensor, Route]:
        device = self.mesh.device
        ids = _ids(wish, self.mesh, tokens, self.mesh.rank)
        gates = torch.full(ids.shape, 1 / wish.top, device=device)
        x = torch.randn(tokens, wish.hidden, device=device).bfloat16()
        return x, Route(ids.to(device), gates)

    def size(self, tokens: int) -> list[dict[str, Any]]:
        """Rows of the result for one number of tokens."""
        matrix = wire_rows(routes(self.wish, self.mesh, tokens), self.wish.experts)
        moved = sum(map(sum, matrix)) / self.mesh.size
        x, route = self._given(self.wish, tokens)
        acts = {("ceiling", name, 0): act for name, act in self.ceilings.acts(matrix).items()}
        for contender, dispatcher in self.dispatchers.items():
            acts |= {
                (what, contender.name, contender.fp8): act
                for what, act in calls(dispatcher, x, route).items()
            }
        named = {str(number): act for number, act in enumerate(acts.values())}
        limit_s = self.wish.seconds / len(self.wish.tokens)
        times = self.rounds.time(named, self.wish.warmups, self.wish.rounds, limit_s)
        for dispatcher in self.dispatchers.values():
            dispatcher.traffic()  # raises where a kernel waited in vain, and forgets the marks
        return [
            _row(
                tokens,
                what,
                name,
                moved * row_bytes(self.wish.hidden, bool(fp8) and what != "combine"),
                seconds,
            )
            for (what, name, fp8), seconds in zip(acts, times.values())
        ]


def calls(dispatcher: Dispatcher, x: Tensor, route: Route) -> Mapping[str, Callable[[], object]]:
    """What is timed of a backend, by name."""
    arrived = dispatcher.dispatch(x, route).wait()
    y = arrived.rows.clone()
    transport = getattr(dispatcher, "transport", dispatcher.combine_backward)
    return {
        "transport": lambda: transport(x, arrived).wait(),
        "dispatch": lambda: dispatcher.dispatch(x, route).wait(),
        "combine": lambda: dispatcher.combine(y, arrived, x).wait(),
    }


def _row(tokens: int, what: str, name: str, moved: float, seconds: list[float]) -> dict[str, Any]:
    median, late = middle(seconds)
    return {
        "tokens": tokens,
        "what": what,
        "name": name,
        "wire_bytes": moved,
        "median_s": median,
        "p95_s": late,
        "bytes_per_s": moved / median,
        "seconds": seconds,
    }


def all_to_all(wish: AllToAll, mesh: Mesh) -> Iterator[dict[str, Any]]:
    """The result, growing size by size, the same on every rank: rows, and in words what could not be timed."""
    wish = settled(wish, mesh)
    bench, rows = Bench(wish, mesh), []
    notes = [f"{name}: {reason}" for name, reason in bench.why_not.items()]
    if elsewhere := backends(lambda row: row.device not in ("", mesh.device.type)):
        notes.append(f"{', '.join(elsewhere)} are not timed: they need GPUs.")
    if mesh.size == 1:
        notes.append(
            "One rank: there is no wire; bytes are those of the rows that stay, ceilings copies in memory."
        )
    if share_a_gpu(mesh):
        notes.append(NO_LINK)
    for tokens in wish.tokens:
        rows += bench.size(tokens)
        yield {"ranks": mesh.size, "rows": rows, "notes": notes}
    matrices = {size: wire_rows(routes(wish, mesh, size), wish.experts) for size in wish.tokens}
    sizes = {size: round(sum(map(sum, matrix)) / mesh.size) for size, matrix in matrices.items()}
    vdev = vdev_2d(mesh, sizes, 2 * wish.hidden, wish.rounds)
    if isinstance(vdev, str):
        notes.append(vdev)
    else:
        rows += [
            _row(size, "ceiling", "all_to_all_vdev_2d, even", sizes[size] * 2 * wish.hidden, [seconds])
            for size, seconds in vdev.items()
        ]
    yield {"ranks": mesh.size, "rows": rows, "notes": notes}
