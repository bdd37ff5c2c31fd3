"""Any schedule, one loop, one thread: a rank's row of cells, each cell's ops in the order that `weave` gives.

Products of other ranks are received when a chunk begins and its own are sent when it ends, on channels that keep their
order. `steps` is a generator that stops where a product is not there yet: one process plays many ranks by taking them
in turns, a process of its own runs it through. Weight gradients are always owed and paid by the W ops, so a whole
backward is I and W, and zero-bubble schedules need nothing of their own.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from counterflow.pipeline.record import Recorder, recorded
from counterflow.pipeline.stage import Pass, StepSettings, Sums
from counterflow.schedule.relation import needs
from counterflow.schedule.weave import sent_behind, weave
from counterflow.schedule.words import Carried, Cell, Chunk, Kind, Op, Plan, Product, Schedule, StageId

Feed = Callable[[int, int], Tensor]
"""(pipe, micro-batch) gives its samples."""


@runtime_checkable
class Channels(Protocol):
    """A rank's links to the others."""

    def send(self, product: Product, value: Tensor) -> None:
        """Hand a product over; returns at once."""
        ...

    def ready(self, product: Product) -> bool:
        """Whether `receive` should be called now."""
        ...

    def receive(self, product: Product) -> Tensor:
        """The product."""
        ...


@runtime_checkable
class StageLike(Protocol):
    """What the executor asks of a stage; tests and measurements bring others than the model's."""

    plan: Plan
    reads_tokens: bool

    def run(self, op: Op, state: Pass, sums: Sums) -> None:
        """One op of a pass."""
        ...

    def drain(self) -> None:
        """The end of a backward chunk."""
        ...


class Do(Enum):
    """What a row consists of, once its cells are woven."""

    BEGIN = 0
    OP = 1
    SEND = 2
    END = 3


Action = tuple[Do, Chunk, Op | None]


class Executor:
    """One rank of a schedule, for as many steps as one likes."""

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        stages: Mapping[StageId, StageLike],
        channels: Channels,
        record: Recorder | None = None,
    ) -> None:
        self.schedule, self.rank, self.stages, self.channels, self.record = (
            schedule,
            rank,
            stages,
            channels,
            record,
        )
        plans = {stage: held.plan for stage, held in stages.items()}
        self.actions = [action for cell in schedule.rows[rank] for action in _actions(cell, plans)]
        self._users = {
            product: other
            for other, _, chunk in schedule.chunks()
            for product in needs(chunk, schedule.stages)
            if product.stage != chunk.stage
        }
        self._trains = any(chunk.kind is not Kind.F for _, chunk, _ in self.actions)
        self._here: dict[Product, Tensor] = {}
        """Products for another stage of this rank."""
        self.whole = self.owed = 0
        self.peaks = (0, 0, 0)
        """Most passes held at once: in all, from F to I, from I to W. What `schedule.measure.held` predicts."""

    def run(self, feed: Feed, settings: StepSettings) -> Sums:
        """The whole row, waiting where it must."""
        sums = Sums()
        for _ in self.steps(feed, settings, sums):
            time.sleep(1e-3)
        return sums

    def steps(self, feed: Feed, settings: StepSettings, sums: Sums) -> Iterator[None]:
        """The row action by action; yields while a product that comes next is not there."""
        passes: dict[tuple[StageId, int], Pass] = {}
        for do, chunk, op in self.actions:
            key = chunk.stage, chunk.mb
            if do is Do.OP:
                assert op is not None, "an OP has an op"
                self._run(op, passes[key], sums)
            elif do is Do.BEGIN:
                for product in self._from_others(chunk):
                    while product not in self._here and not self.channels.ready(product):
                        yield
                if chunk.kind is Kind.F:
                    tokens = self.stages[chunk.stage].reads_tokens
                    passes[key] = Pass(feed(chunk.stage.pipe, chunk.mb) if tokens else None, settings)
                self._receive(chunk, passes[key])
            elif do is Do.SEND:
                self._send(chunk, passes[key])
            else:
                self._end(chunk, passes)
        assert not passes, "every pass ends"

    def _from_others(self, chunk: Chunk) -> list[Product]:
        """The products that another stage gives."""
        return [product for product in needs(chunk, self.schedule.stages) if product.stage != chunk.stage]

    def _receive(self, chunk: Chunk, state: Pass) -> None:
        if chunk.kind is Kind.F:
            self._count(whole=1)
        for product in self._from_others(chunk):
            value = self._here.pop(product) if product in self._here else self.channels.receive(product)
            if product.what is Carried.X:
                state.h, state.zero = value, value.new_zeros(()).expand_as(value)
            else:
                state.grads["h"] = value

    def _run(self, op: Op, state: Pass, sums: Sums) -> None:
        with torch.set_grad_enabled(self._trains and op.kind is Kind.F), recorded(self.record, self.rank, op):
            self.stages[op.chunk.stage].run(op, state, sums)

    def _send(self, chunk: Chunk, state: Pass) -> None:
        """Hand x or dx on, once the chunk's last F or I op is issued."""
        what = Carried.X if chunk.kind is Kind.F else Carried.DX
        product = Product(what, chunk.stage, chunk.mb)
        value = None
        if product in self._users:
            value = state.hidden() if what is Carried.X else state.gradient()
        state.h, state.grads = None, {}
        if value is None:
            return
        if self._users[product] == self.rank:
            self._here[product] = value
        else:
            self.channels.send(product, value)

    def _end(self, chunk: Chunk, passes: dict[tuple[StageId, int], Pass]) -> None:
        if chunk.kind is Kind.F:
            if not self._trains:
                passes.pop((chunk.stage, chunk.mb))
                self._count(whole=-1)
            return
        if chunk.kind is not Kind.W:
            self.stages[chunk.stage].drain()
            self._count(whole=-1, owed=chunk.kind is Kind.I)
        if chunk.kind is not Kind.I:
            state = passes.pop((chunk.stage, chunk.mb))
            assert not state.owed and not state.segments, "a pass ends with nothing owed and nothing kept"
            self._count(owed=-1 if chunk.kind is Kind.W else 0)

    def _count(self, whole: int = 0, owed: int = 0) -> None:
        self.whole += whole
        self.owed += owed
        now = (self.whole + self.owed, self.whole, self.owed)
        self.peaks = tuple(map(max, self.peaks, now))


def _actions(cell: Cell, plans: Mapping[StageId, Plan]) -> Iterator[Action]:
    """A cell's ops with what happens around each chunk: receive before its first op, hand on behind `sent_behind`'s."""
    ops, handed = weave(cell, plans), sent_behind(cell, plans)
    left = {chunk: sum(op.chunk == chunk for op in ops) for chunk in cell}
    for chunk in cell:
        if not left[chunk]:  # a stage with nothing to do hands on what it gets
            yield from (
                (do, chunk, None)
                for do in (Do.BEGIN, Do.SEND, Do.END)
                if do is not Do.SEND or chunk.kind is not Kind.W
            )
    begun: set[Chunk] = set()
    for op in ops:
        if op.chunk not in begun:
            begun.add(op.chunk)
            yield Do.BEGIN, op.chunk, None
        yield Do.OP, op.chunk, op
        left[op.chunk] -= 1
        for chunk in [chunk for chunk, behind in handed.items() if behind == op]:
            del handed[chunk]
            yield Do.SEND, chunk, None
        for chunk in [chunk for chunk in cell if chunk in begun and not left[chunk] and chunk not in handed]:
            begun.remove(chunk)
            yield Do.END, chunk, None
