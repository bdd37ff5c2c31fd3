"""The four calls over one hop or several: tokens go out hop by hop, and come home hop by hop in reverse.

The first hop is under way when a call returns; one behind it begins when what came over the first is waited for. That
order depends on the order of the calls alone, so all expert ranks issue the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from counterflow.comm.dispatch import Arrived, Pending, Route
from counterflow.comm.hop import Hop, Sent
from counterflow.comm.traffic import Traffic


@dataclass(frozen=True)
class Relayed(Arrived):
    """What arrived, and the way it came."""

    way: tuple[Sent, ...]


class Relay:
    """A dispatcher over hops, outermost first."""

    def __init__(self, hops: Sequence[Hop]) -> None:
        self.hops = tuple(hops)

    def dispatch(self, x: Float[Tensor, "T D"], route: Route) -> Pending[Relayed]:
        """Each row once to every destination of each hop."""
        first = self.hops[0].out(x, route)

        def finish() -> Relayed:
            rows, arrived, sent = first.wait()
            way = [sent]
            for hop in self.hops[1:]:
                rows, arrived, sent = hop.out(rows, arrived).wait()
                way.append(sent)
            return Relayed(rows, arrived.ids, arrived.gates, tuple(way))

        return Pending(finish)

    def combine(
        self, y: Float[Tensor, "A D"], arrived: Arrived, into: Float[Tensor, "T D"]
    ) -> Pending[Float[Tensor, "T D"]]:
        """into + the sums of each token's rows, rounded once a hop."""
        return self._home(y, arrived, into)

    def combine_backward(self, dout: Float[Tensor, "T D"], arrived: Arrived) -> Pending[Float[Tensor, "A D"]]:
        """The output's gradient by the way the rows came."""
        way = _way(arrived)
        first = self.hops[0].again(dout, way[0])

        def finish() -> Tensor:
            rows = first.wait()
            for hop, sent in zip(self.hops[1:], way[1:]):
                rows = hop.again(rows, sent).wait()
            return rows

        return Pending(finish)

    def dispatch_backward(
        self, drows: Float[Tensor, "A D"], dgates: Float[Tensor, "A K"], arrived: Arrived
    ) -> Pending[tuple[Float[Tensor, "T D"], Float[Tensor, "T K"]]]:
        """The tokens' gradients, summed as in combine, and their gates', each of which one rank has."""
        dx, dg = self._home(drows, arrived), self._home(dgates, arrived, gates=True)
        return Pending(lambda: (dx.wait(), dg.wait()))

    def traffic(self) -> list[Traffic]:
        """What each hop, the outermost first, has moved since this was last asked."""
        found = [hop.traffic for hop in self.hops]
        for hop in self.hops:
            hop.traffic = Traffic()
        return found

    def _home(
        self, rows: Tensor, arrived: Arrived, into: Tensor | None = None, gates: bool = False
    ) -> Pending[Tensor]:
        way, last = _way(arrived), len(self.hops) - 1
        first = self.hops[last].back(rows, way[last], None if last else into, gates)

        def finish() -> Tensor:
            value = first.wait()
            for index in reversed(range(last)):
                value = self.hops[index].back(value, way[index], None if index else into, gates).wait()
            return value

        return Pending(finish)


def _way(arrived: Arrived) -> tuple[Sent, ...]:
    assert isinstance(arrived, Relayed), "what a relay dispatched comes back to it"
    return arrived.way
