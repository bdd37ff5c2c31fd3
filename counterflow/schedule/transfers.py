"""Which products travel between ranks, on which channel, in which order.

A channel is an ordered link that carries one kind of product from one rank to another. Untagged links (NCCL) deliver
in the order of sends, so that order must equal the order in which the receiver needs: one channel for x and one for dx
of every directed pair of ranks has that for every schedule here; one link for both has not (DualPipe on 8 ranks:
rank 0 makes x5 x6 dx0' dx1', rank 1 needs x5 dx0' dx1' x6).
"""

from collections.abc import Mapping
from typing import NamedTuple

from counterflow.errors import ScheduleError
from counterflow.schedule.relation import gives, needs
from counterflow.schedule.text import grid
from counterflow.schedule.words import Carried, Cell, Product, Schedule


class Channel(NamedTuple):
    """From rank to rank, x or dx."""

    sender: int
    receiver: int
    what: Carried


def transfers(schedule: Schedule) -> Mapping[Channel, tuple[Product, ...]]:
    """Every channel's products in the order of both ends.   Fails: ScheduleError where the ends disagree."""
    sent: dict[Channel, list[Product]] = {}
    needed: dict[Channel, list[tuple[Product, int]]] = {}
    users = _users(schedule)
    for rank, row in enumerate(schedule.rows):
        for position, cell in enumerate(row):
            for product in _in_order(cell, schedule, given=True):
                receiver = users.get(product, rank)
                if receiver != rank:
                    sent.setdefault(Channel(rank, receiver, product.what), []).append(product)
            for product in _in_order(cell, schedule, given=False):
                sender = schedule.rank_of[product.stage]
                if sender != rank:
                    channel = Channel(sender, rank, product.what)
                    needed.setdefault(channel, []).append((product, position))
    for channel, products in needed.items():
        for (product, position), other in zip(products, sent.get(channel, ())):
            if product != other:
                raise ScheduleError(
                    f"rank {channel.receiver} needs {product} where rank {channel.sender} sends {other}; a link "
                    f"delivers in order: let both ranks take them in the same order.\n"
                    f"{grid(schedule, channel.receiver, position)}"
                )
    return {channel: tuple(products) for channel, products in sent.items()}


def _users(schedule: Schedule) -> dict[Product, int]:
    """The rank that needs each product of another stage."""
    return {
        product: rank
        for rank, _, chunk in schedule.chunks()
        for product in needs(chunk, schedule.stages)
        if product.stage != chunk.stage
    }


def _in_order(cell: Cell, schedule: Schedule, given: bool) -> list[Product]:
    """A cell's products chunk by chunk."""
    found = [gives(chunk) if given else needs(chunk, schedule.stages) for chunk in cell]
    return [product for products in found for product in sorted(products)]
