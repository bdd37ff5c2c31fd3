"""Pipeline transfers on channels that keep their order.

A channel is untagged: what arrives first is what was sent first, as with NCCL. `transfers` proves that the receiver
needs in that order, and the links within one process assert it with every product, which is how a laptop tests
sixteen ranks.
"""

from collections import deque
from collections.abc import Mapping

from torch import Tensor

from counterflow.schedule.transfers import Channel
from counterflow.schedule.words import Product, Schedule


class Links:
    """The channels of a whole schedule within one process."""

    def __init__(self, schedule: Schedule, sent: Mapping[Channel, tuple[Product, ...]]) -> None:
        self.route = {product: channel for channel, products in sent.items() for product in products}
        self.queues: dict[Channel, deque[tuple[Product, Tensor]]] = {channel: deque() for channel in sent}


class LocalChannels:
    """One rank's end of `Links`; which rank it is the products say."""

    def __init__(self, links: Links) -> None:
        self.links = links

    def send(self, product: Product, value: Tensor) -> None:
        """Put it in its channel."""
        self.links.queues[self.links.route[product]].append((product, value))

    def ready(self, product: Product) -> bool:
        """Whether anything lies in its channel."""
        return bool(self.links.queues[self.links.route[product]])

    def receive(self, product: Product) -> Tensor:
        """The first of its channel, which must be it."""
        found, value = self.links.queues[self.links.route[product]].popleft()
        assert found == product, f"channels keep order, and {product} was needed where {found} came"
        return value
