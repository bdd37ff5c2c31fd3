"""Dispatch within one rank: the reference that every other backend is held against."""

from jaxtyping import Float
from torch import Tensor

from counterflow.comm.dispatch import Arrived, Pending, Route, Terms, there
from counterflow.comm.peers import Peers
from counterflow.comm.traffic import Traffic


class Local:
    """One rank holds every expert: nothing travels. The reference for every other backend."""

    def dispatch(self, x: Float[Tensor, "T D"], route: Route) -> Pending[Arrived]:
        """The rows as they are."""
        return there(Arrived(x, route.ids, route.gates))

    def combine(
        self, y: Float[Tensor, "A D"], arrived: Arrived, into: Float[Tensor, "T D"]
    ) -> Pending[Float[Tensor, "T D"]]:
        """into + y."""
        return there(into + y)

    def combine_backward(self, dout: Float[Tensor, "T D"], arrived: Arrived) -> Pending[Float[Tensor, "A D"]]:
        """The output's gradient as it is."""
        return there(dout)

    def dispatch_backward(
        self, drows: Float[Tensor, "A D"], dgates: Float[Tensor, "A K"], arrived: Arrived
    ) -> Pending[tuple[Float[Tensor, "T D"], Float[Tensor, "T K"]]]:
        """The rows' and gates' gradients as they are."""
        return there((drows, dgates))

    def traffic(self) -> list[Traffic]:
        """Nothing travels."""
        return []


def local(peers: Peers, terms: Terms) -> Local:
    """One rank alone."""
    del peers, terms
    return Local()
