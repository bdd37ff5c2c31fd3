"""Pipeline transfers on channels that keep their order.

A channel is untagged: what arrives first is what was sent first, as with NCCL. `transfers` proves that the receiver
needs in that order, and the links within one process assert it with every product, which is how a laptop tests
sixteen ranks.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from counterflow.comm.clock import Mark, between, mark
from counterflow.comm.mesh import Mesh
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


Shape = Callable[[Product], torch.Size]


class ProcessChannels:
    """One rank's channels between processes: a group of two ranks each, receives posted ahead into two buffers.

    Sends return at once and hold what they send until it is gone. `begin` names the products of the coming pass.
    """

    def __init__(self, mesh: Mesh, channels: Iterable[Channel], dtype: torch.dtype) -> None:
        self.mesh, self.dtype = mesh, dtype
        self._groups: dict[Channel, dist.ProcessGroup] = {}
        for channel in sorted(channels):
            group = mesh.channel_group(channel.sender, channel.receiver)
            if group.handle is not None:
                self._groups[channel] = group.handle
        self._sends: deque[tuple[dist.Work, Tensor]] = deque()
        self._posted: dict[Product, tuple[dist.Work, Tensor]] = {}
        self._waiting: dict[Channel, deque[Product]] = {}
        self._route: dict[Product, Channel] = {}
        self._shape: Shape = lambda product: torch.Size()
        self._waits: list[tuple[Mark, Mark]] = []

    def begin(self, sent: Mapping[Channel, tuple[Product, ...]], shape: Shape) -> None:
        """Post the first receives of a pass over a schedule."""
        me = self.mesh.pipeline_rank
        self._shape, self._waits = shape, []
        self._route = {product: channel for channel, products in sent.items() for product in products}
        self._waiting = {
            channel: deque(products) for channel, products in sent.items() if channel.receiver == me
        }
        for channel in self._waiting:
            for _ in range(BUFFERS):
                self._post(channel)

    def _post(self, channel: Channel) -> None:
        if not self._waiting[channel]:
            return
        product = self._waiting[channel].popleft()
        value = torch.empty(self._shape(product), dtype=self.dtype, device=self.mesh.device)
        work = dist.irecv(value, self.mesh.global_rank(channel.sender), group=self._groups[channel])
        assert work is not None, "a member receives"
        self._posted[product] = work, value

    def send(self, product: Product, value: Tensor) -> None:
        """Send it; done sends are let go of."""
        channel = self._route[product]
        value = value.to(self.dtype).contiguous()
        work = dist.isend(value, self.mesh.global_rank(channel.receiver), group=self._groups[channel])
        assert work is not None, "a member sends"
        while self._sends and self._sends[0][0].is_completed():
            self._sends.popleft()
        self._sends.append((work, value))

    def ready(self, product: Product) -> bool:
        """Always: `receive` waits."""
        return True

    def receive(self, product: Product) -> Tensor:
        """The product, once it is here; its channel's next receive is posted."""
        work, value = self._posted.pop(product)
        start = mark(self.mesh.device)
        work.wait()
        self._waits.append((start, mark(self.mesh.device)))
        self._post(self._route[product])
        return value

    def waited(self) -> float:
        """Seconds that computation stood still for other ranks in the last pass: bubble and exposed transfers."""
        return sum(between(start, end) for start, end in self._waits)

    def end(self) -> None:
        """Wait until all that was sent has gone."""
        while self._sends:
            self._sends.popleft()[0].wait()


BUFFERS = 2
"""Receive buffers of a channel."""
