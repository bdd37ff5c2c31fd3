"""Dispatchers that do something else with another's calls: wait at once, record, replay, even out, repeat.

All are one wrapper with a function for its four calls. The function gets the call's name, the inner dispatcher's
method and its arguments, and gives what is under way.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from counterflow.comm.arena import Arena
from counterflow.comm.dispatch import Arrived, Dispatcher, Pending, Route, there
from counterflow.comm.exchange import Exchange
from counterflow.comm.traffic import Traffic

Carry = Callable[[str, Callable[..., Pending[Any]], tuple[Any, ...]], Pending[Any]]


class Carried:
    """A dispatcher whose calls go through `carry`."""

    def __init__(self, inner: Dispatcher, carry: Carry) -> None:
        self.inner, self._carry = inner, carry

    def dispatch(self, x: Tensor, route: Route) -> Pending[Arrived]:
        """Through `carry`."""
        return self._carry("dispatch", self.inner.dispatch, (x, route))

    def combine(self, y: Tensor, arrived: Arrived, into: Tensor) -> Pending[Tensor]:
        """Through `carry`."""
        return self._carry("combine", self.inner.combine, (y, arrived, into))

    def combine_backward(self, dout: Tensor, arrived: Arrived) -> Pending[Tensor]:
        """Through `carry`."""
        return self._carry("combine_backward", self.inner.combine_backward, (dout, arrived))

    def dispatch_backward(
        self, drows: Tensor, dgates: Tensor, arrived: Arrived
    ) -> Pending[tuple[Tensor, Tensor]]:
        """Through `carry`."""
        return self._carry("dispatch_backward", self.inner.dispatch_backward, (drows, dgates, arrived))

    def traffic(self) -> list[Traffic]:
        """The inner one's."""
        return self.inner.traffic()


def in_turn(inner: Dispatcher) -> Carried:
    """Every transfer is waited for as soon as it is issued."""

    def carry(name: str, act: Callable[..., Pending[Any]], arguments: tuple[Any, ...]) -> Pending[Any]:
        pending = act(*arguments)
        pending.wait()
        return pending

    return Carried(inner, carry)


def balanced(inner: Dispatcher, experts: int) -> Carried:
    """Routing forced even: every expert gets as many tokens, and a token's lie far apart; gates stay."""

    def carry(name: str, act: Callable[..., Pending[Any]], arguments: tuple[Any, ...]) -> Pending[Any]:
        if name != "dispatch":
            return act(*arguments)
        x, route = arguments
        count, top = route.ids.shape
        token = torch.arange(count, device=x.device)[:, None]
        ids = (token + torch.arange(top, device=x.device) * (experts // top)) % experts
        return act(x, Route(ids.to(route.ids.dtype), route.gates))

    return Carried(inner, carry)


@dataclass
class Tape:
    """What each transfer of a run gave, in the order of issue."""

    calls: list[str] = field(default_factory=list)
    routes: list[Route | None] = field(default_factory=list)
    arrived: list[Arrived] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)

    def recording(self, inner: Dispatcher) -> Carried:
        """Notes every call, waiting for it."""

        def carry(name: str, act: Callable[..., Pending[Any]], arguments: tuple[Any, ...]) -> Pending[Any]:
            value = act(*arguments).wait()
            self.calls.append(name)
            self.routes.append(arguments[1] if name == "dispatch" else None)
            self.arrived.append(
                value if name == "dispatch" else arguments[2 if name == "dispatch_backward" else 1]
            )
            self.values.append(value)
            return there(value)

        return Carried(inner, carry)

    def in_place(self, inner: Dispatcher) -> Carried:
        """Gives what was noted, moving nothing; for runs of the same calls, one after another."""
        played = 0

        def carry(name: str, act: Callable[..., Pending[Any]], arguments: tuple[Any, ...]) -> Pending[Any]:
            nonlocal played
            assert self.calls[played] == name, "a run issues its transfers in one order"
            value, played = self.values[played], (played + 1) % len(self.values)
            return there(value)

        return Carried(inner, carry)

    def again(self, inner: Dispatcher, first: int, last: int, x: Tensor) -> None:
        """The transfers of a stretch alone, one after another, with stand-ins for what is moved; `x` is (T, D)."""
        for place in range(first, last):
            name, arrived, route = self.calls[place], self.arrived[place], self.routes[place]
            if name == "dispatch":
                inner.dispatch(x, route).wait()  # pyright: ignore[reportArgumentType]
            elif name == "combine":
                inner.combine(arrived.rows, arrived, x).wait()
            elif name == "combine_backward":
                inner.combine_backward(x, arrived).wait()
            else:
                inner.dispatch_backward(arrived.rows, arrived.gates, arrived).wait()


class Repeated:
    """An exchange that moves its rows `times` times, of which the last count."""

    def __init__(self, inner: Exchange) -> None:
        self.inner, self.times = inner, 1
        self.size, self.index = inner.size, inner.index

    def counts(self, sent: Sequence[int]) -> list[int]:
        """Once."""
        return self.inner.counts(sent)

    def rows(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Pending[Tensor]:
        """Again and again."""
        every = [self.inner.rows(rows, sent, received) for _ in range(self.times)]

        def finish() -> Tensor:
            return [pending.wait() for pending in every][-1]

        return Pending(finish)

    def arena(self, size: int, device: torch.device) -> Arena:
        """The inner one's."""
        return self.inner.arena(size, device)


def repeats_for(communication: float, computation: float) -> int:
    """How often transfers are repeated until they take about as long as computation."""
    return max(1, math.floor(computation / communication + 0.5)) if communication else 1
