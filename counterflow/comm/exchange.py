"""An all-to-all of rows between ranks, uneven: between processes, or between the threads of one, for tests.

Rows travel as bytes, so that every dtype goes over every backend. Sizes are exchanged by the host first; what follows
is asynchronous and ordered by its `Pending`.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from counterflow.comm.arena import Arena, symmetric_arena
from counterflow.comm.dispatch import Pending, there
from counterflow.comm.mesh import Group

PATIENCE_S = 300.0
"""How long a thread waits for another before it gives up."""


@runtime_checkable
class Exchange(Protocol):
    """One rank's place in an all-to-all."""

    size: int
    index: int

    def counts(self, sent: Sequence[int]) -> list[int]:
        """How many rows come from each rank, where `sent` go to each. Waits for all."""
        ...

    def rows(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Pending[Tensor]:
        """The rows of all ranks for this one, (Σ received, …), by rank; `rows`, (Σ sent, …), are by rank as well."""
        ...

    def arena(self, size: int, device: torch.device) -> Arena:
        """Bytes of memory on every rank that all reach into. Waits for all."""
        ...


class GroupExchange:
    """Between processes, over gloo or NCCL."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self.size, self.index = len(group.ranks), group.index
        self.group, self.device = group.handle, device

    def counts(self, sent: Sequence[int]) -> list[int]:
        """How many rows come from each rank. Waits for all."""
        if self.group is None:
            return list(sent)
        given = torch.tensor(sent, device=self.device)
        found = torch.empty_like(given)
        dist.all_to_all_single(found, given, group=self.group)
        return found.tolist()

    def rows(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Pending[Tensor]:
        """The rows of all ranks for this one."""
        if self.group is None:
            return there(rows)
        found = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(
            _bytes(found), _bytes(rows.contiguous()), list(received), list(sent), self.group, async_op=True
        )
        assert work is not None, "a member of the group gets a handle"

        def finish() -> Tensor:
            work.wait()
            return found

        return Pending(finish)

    def arena(self, size: int, device: torch.device) -> Arena:
        """GPUs' memory, on one host."""
        return symmetric_arena(size, device, self.group, self.index)


@dataclass
class Mailbox:
    """What the threads of one process have for each other, by (sender, receiver, number of the exchange)."""

    size: int

    def __post_init__(self) -> None:
        self._there: dict[tuple[int, int, int], Tensor] = {}
        self._changed = threading.Condition()

    def put(self, sender: int, receiver: int, number: int, rows: Tensor) -> None:
        """Leave rows for another."""
        with self._changed:
            self._there[(sender, receiver, number)] = rows
            self._changed.notify_all()

    def take(self, sender: int, receiver: int, number: int) -> Tensor:
        """The rows, once they are there."""
        with self._changed:
            key = sender, receiver, number
            came = self._changed.wait_for(lambda: key in self._there, PATIENCE_S)
            assert came, f"rank {receiver} got nothing from rank {sender} in {PATIENCE_S:.0f} s"
            return self._there.pop(key)


class ThreadExchange:
    """One thread's place at a mailbox; exchanges are numbered in the order of their issue."""

    def __init__(self, mailbox: Mailbox, index: int) -> None:
        self.size, self.index = mailbox.size, index
        self._mailbox, self._number = mailbox, 0

    def counts(self, sent: Sequence[int]) -> list[int]:
        """How many rows come from each rank. Waits for all."""
        ones = [1] * self.size
        return self.rows(torch.tensor(sent), ones, ones).wait().tolist()

    def rows(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Pending[Tensor]:
        """The rows of all ranks for this one."""
        number, self._number = self._number, self._number + 1
        for receiver, part in enumerate(rows.split(list(sent))):
            self._mailbox.put(self.index, receiver, number, part.clone())

        def finish() -> Tensor:
            parts = [self._mailbox.take(sender, self.index, number) for sender in range(self.size)]
            assert [len(part) for part in parts] == list(received), "as many rows come as were announced"
            return torch.cat(parts)

        return Pending(finish)

    def arena(self, size: int, device: torch.device) -> Arena:
        """Plain memory of the one process."""
        number, self._number = self._number, self._number + 1
        own = torch.zeros(size, dtype=torch.uint8, device=device)
        if own.is_cuda:
            torch.cuda.synchronize(device)
        for receiver in range(self.size):
            self._mailbox.put(self.index, receiver, number, own)
        parts = [self._mailbox.take(sender, self.index, number) for sender in range(self.size)]
        return Arena(tuple(parts), self.index)


def _bytes(rows: Tensor) -> Tensor:
    """The same memory as bytes; one without elements has no bytes to view."""
    if rows.numel() == 0:
        return rows.new_empty(len(rows), 0, dtype=torch.uint8)
    return rows.view(len(rows), -1).view(torch.uint8)
