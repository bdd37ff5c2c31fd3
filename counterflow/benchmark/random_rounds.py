"""Random rounds of dispatch, experts and combine, forward and backward, one rank late in each: all against `local`.

Each rank draws the tokens of all from the round's number, so that it knows without another exchange what one rank with
all experts makes of them. Rows that arrive must be exactly those; sums may be rounded in another grouping.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from counterflow.benchmark.equality import relative_error
from counterflow.benchmark.routings import ROUTINGS, drawn
from counterflow.comm import open_dispatcher
from counterflow.comm.dispatch import Dispatcher, Route, Terms
from counterflow.comm.local import Local
from counterflow.comm.mesh import Mesh
from counterflow.comm.peers import process_peers
from counterflow.config.run import Parallel
from counterflow.model.experts import Experts

EACH = 4
"""Experts of a rank."""
WIDTH, INNER, TOP = 7, 5, 3
"""Odd on purpose."""
BOUND = 2e-6
"""Relative, fp32: some roundings of 6e-8."""


@dataclass(frozen=True)
class RandomRounds:
    """What is drawn."""

    backend: str = Parallel.dispatch
    rounds: int = 1000
    tokens: int = 40
    """Of a rank, at most; a fifth of the ranks have none."""
    late_s: float = 0.005
    """At most, on one rank a round, before dispatch or between dispatch and combine."""
    seed: int = 0


@dataclass(frozen=True)
class Given:
    """A rank's tokens and what comes down on them."""

    x: Tensor
    gates: Tensor
    ids: Tensor
    into: Tensor
    dout: Tensor


def given(routing: str, tokens: int, ranks: int, seed: int) -> Given:
    """Drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    ids = drawn(routing, tokens, EACH * ranks, TOP, ranks, generator)
    x, into, dout = (torch.randn(tokens, WIDTH, generator=generator) for _ in range(3))
    gates = torch.rand(tokens, TOP, generator=generator)
    return Given(x, gates, ids, into, dout)


def random_rounds(wish: RandomRounds, mesh: Mesh) -> Iterator[dict[str, Any]]:
    """A line a round, the same on every rank: its largest relative error over all ranks.   Fails: AssertionError."""
    node = max(1, mesh.size // 2)
    terms = Terms(EACH * mesh.size, tokens=wish.tokens)
    dispatcher = open_dispatcher(wish.backend, process_peers(mesh, node), terms)
    whole = _experts(mesh)
    for number in range(wish.rounds):
        dice = random.Random(wish.seed * 1_000_000 + number)
        routing = dice.choice(ROUTINGS)
        sizes = [dice.choice((0, *[dice.randrange(wish.tokens + 1)] * 4)) for _ in range(mesh.size)]
        late = dice.randrange(mesh.size)
        before, after = (dice.random() * wish.late_s for _ in range(2))
        every = [
            _on(mesh, given(routing, size, mesh.size, number * 64 + at)) for at, size in enumerate(sizes)
        ]
        pauses = (before, after) if late == mesh.rank else (0.0, 0.0)
        worst = max(mesh.everyone(_round(dispatcher, whole, every, mesh, pauses)))
        assert worst < BOUND, f"round {number} ({routing}, tokens {sizes}): off by {worst:.2e}"
        yield {"round": number, "routing": routing, "rank_late": late, "worst": worst, "tokens": sum(sizes)}


def _round(
    dispatcher: Dispatcher, whole: Experts, every: list[Given], mesh: Mesh, pauses: tuple[float, float]
) -> float:
    """This rank's largest error; infinite where other rows arrived than should have."""
    rows, *found = _through(dispatcher, _part(whole, mesh), every[mesh.rank], pauses)
    wanted = [_through(Local(), whole, one, (0.0, 0.0))[1:] for one in every]
    if sorted(rows.tolist()) != sorted(_arriving(every, mesh)):
        return float("inf")
    errors = [relative_error(a, b) for a, b in zip(found[:3], wanted[mesh.rank][:3]) if b.numel()]
    for at in (3, 4):
        total = torch.stack([one[at] for one in wanted]).sum(0)
        errors.append(relative_error(found[at], total.chunk(mesh.size)[mesh.rank]))
    return max(errors)


def _through(
    dispatcher: Dispatcher, experts: Experts, one: Given, pauses: tuple[float, float]
) -> tuple[Tensor, ...]:
    """Rows that arrived, output, gradients of tokens, of gates, and of both of the experts' weights."""
    time.sleep(pauses[0])
    arrived = dispatcher.dispatch(one.x, Route(one.ids, one.gates)).wait()
    rows, gates = (value.detach().clone().requires_grad_() for value in (arrived.rows, arrived.gates))
    y = experts(replace(arrived, rows=rows, gates=gates), None)
    time.sleep(pauses[1])
    out = dispatcher.combine(y.detach(), arrived, one.into).wait()
    dy = dispatcher.combine_backward(one.dout, arrived).wait()
    weights = [experts.gate_up, experts.down]
    drows, dgates, *dweights = torch.autograd.grad(y, [rows, gates, *weights], dy)
    dx, dg = dispatcher.dispatch_backward(drows, dgates, arrived).wait()
    return arrived.rows, out, dx, dg, *dweights


def _arriving(every: list[Given], mesh: Mesh) -> list[list[float]]:
    """The tokens that have an expert here, each once."""
    return [row for one in every for row in one.x[(one.ids // EACH == mesh.rank).any(1)].tolist()]


def _experts(mesh: Mesh) -> Experts:
    experts, generator = Experts(EACH * mesh.size, WIDTH, INNER), torch.Generator().manual_seed(7)
    for weight in experts.parameters():
        weight.data = torch.randn(weight.shape, generator=generator).to(mesh.device)
    return experts


def _part(whole: Experts, mesh: Mesh) -> Experts:
    own, weights = Experts(EACH * mesh.size, WIDTH, INNER), dict(whole.named_parameters())
    own.keep(mesh.rank, mesh.size)
    for name, weight in own.named_parameters():
        weight.data = weights[name].data.chunk(mesh.size)[mesh.rank].clone()
    return own


def _on(mesh: Mesh, one: Given) -> Given:
    return Given(*(getattr(one, field.name).to(mesh.device) for field in fields(one)))
