"""How tokens reach their experts and come back: four calls that every backend answers alike.

A token travels once to a rank that holds any of its experts, with the ids and gates that are meant for that
rank; the receiver expands it to its pairs, gates the SwiGLU output, and sums before anything travels back. So
`dispatch` moves rows and `combine` sums rows, and so do their backwards: the backward of combine is a
dispatch of output gradients, the backward of dispatch a combine of input gradients, with the gates' gradient
beside it.

Calls return `Pending` because a transfer runs beside computation; `wait` orders what follows after it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from counterflow.comm.traffic import Traffic

Value = TypeVar("Value", covariant=True)


@dataclass(frozen=True)
class Route:
    """Where tokens go: for each the ids of its experts and the gates that weigh them."""

    ids: Int[Tensor, "T K"]
    gates: Float[Tensor, "T K"]


@dataclass(frozen=True)
class Arrived:
    """Rows that came to this rank, and for each which of its experts it is for; −1 marks no expert."""

    rows: Float[Tensor, "A D"]
    ids: Int[Tensor, "A K"]
    """Local expert ids."""
    gates: Float[Tensor, "A K"]


@dataclass(frozen=True)
class Terms:
    """What a backend is asked for: the experts of a layer, and how their tokens travel."""

    experts: int
    """Of a layer, on all ranks together; a multiple of the ranks."""
    fp8: bool = False
    """Rows go out in FP8, a scale for every 128 numbers."""
    tokens: int = 0
    """The most that a rank sends in one call; backends with standing buffers make room for them."""
    multiprocessors: int = 0
    """Of the GPU, for communication; 0: the backend's own choice."""
    room: int = 0
    """Rows that a rank has room for in one call, in backends with standing buffers; 0: as many as can come."""


class Pending(Generic[Value]):
    """A result under way: `finish` orders what follows behind the transfer and gives it. It is called once."""

    def __init__(self, finish: Callable[[], Value]) -> None:
        self._finish: Callable[[], Value] | None = finish
        self._value: Value | None = None

    def wait(self) -> Value:
        """The result, once whatever follows on the current stream may use it."""
        if self._finish is not None:
            self._value, self._finish = self._finish(), None
        return self._value  # pyright: ignore[reportReturnType]


def there(value: Value) -> Pending[Value]:
    """A result that needs no waiting."""
    pending = Pending(lambda: value)
    pending.wait()
    return pending


@runtime_checkable
class Dispatcher(Protocol):
    """A backend. `into` is residual plus shared experts' output; combine adds to it in one rounding."""

    def dispatch(self, x: Float[Tensor, "T D"], route: Route) -> Pending[Arrived]:
        """Each row once to every rank that holds one of its experts."""
        ...

    def combine(
        self, y: Float[Tensor, "A D"], arrived: Arrived, into: Float[Tensor, "T D"]
    ) -> Pending[Float[Tensor, "T D"]]:
        """into + the sum of each token's rows, in fp32 and in a fixed order of ranks."""
        ...

    def combine_backward(self, dout: Float[Tensor, "T D"], arrived: Arrived) -> Pending[Float[Tensor, "A D"]]:
        """The gradient of every arrived row's output: a dispatch of `dout`."""
        ...

    def dispatch_backward(
        self, drows: Float[Tensor, "A D"], dgates: Float[Tensor, "A K"], arrived: Arrived
    ) -> Pending[tuple[Float[Tensor, "T D"], Float[Tensor, "T K"]]]:
        """The gradients of the tokens, summed over ranks, and of their gates."""
        ...

    def traffic(self) -> list[Traffic]:
        """What moved over each link, the outermost first, since this was last asked; empty where nothing travels."""
        ...
