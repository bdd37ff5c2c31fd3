"""The engine's own thread, and how requests of an event loop reach it and its text comes back.

One thread steps the engine; everything reaches it through one queue and leaves it by the loop's own call, a batch of
deltas a step, so neither side locks. Who asked holds a `Ticket` and reads its deltas; who goes away is aborted. If a
step fails every ticket is told, and no more are taken: an engine that failed in mid-step cannot be trusted.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from time import perf_counter

from counterflow.errors import RequestError
from counterflow.infer.engine import Engine
from counterflow.infer.request import Delta, Sampling, Sequence
from counterflow.serve.metrics import Histogram

log = logging.getLogger(__name__)


class Busy(Exception):
    """More is queued than the server takes."""


class EngineFailed(Exception):
    """A step failed; the engine runs no more."""


@dataclass(eq=False)
class Ticket:
    """One request's texts under way: `prompts` times `samples`, in that order."""

    prompts: list[list[int]]
    sampling: Sampling
    samples: int
    deltas: "asyncio.Queue[tuple[int, Delta] | Exception]" = field(default_factory=asyncio.Queue)
    """An exception ends them."""
    began: float = field(default_factory=perf_counter)
    sequences: list[Sequence] = field(default_factory=list)
    open: int = 0
    """Texts that have not ended."""


class Worker:
    """Steps an engine in a thread; `submit` and `read` belong to the event loop that started it."""

    def __init__(self, engine: Engine, max_queue: int, first_token_s: Histogram) -> None:
        self.engine, self.max_queue, self.first_token_s = engine, max_queue, first_token_s
        self.under_way = 0
        """Texts that were asked for and have not ended."""
        self.failure: Exception | None = None
        self._inbox: queue.SimpleQueue[Ticket | Abort | None] = queue.SimpleQueue()
        self._tickets: dict[Sequence, tuple[Ticket, int]] = {}
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, prompts: list[list[int]], sampling: Sampling, samples: int) -> Ticket:
        """Queue a request.   Fails: RequestError on an impossible one, Busy, EngineFailed."""
        for prompt in prompts:
            self.engine.check(prompt, samples)
        if self.failure is not None:
            raise EngineFailed(str(self.failure))
        count = len(prompts) * samples
        room = self.max_queue + self.engine.batch.max_sequences
        if count > room:
            raise RequestError(
                f"the request asks for {count} texts; the server takes {room} at once: ask for fewer."
            )
        if self.under_way + count > room:
            raise Busy
        ticket = Ticket(prompts, sampling, samples, open=count)
        self.under_way += count
        self._inbox.put(ticket)
        return ticket

    async def read(self, ticket: Ticket) -> AsyncGenerator[tuple[int, Delta]]:
        """(text's index, delta) until all texts of the ticket have ended; whoever stops reading aborts them."""
        first = True
        try:
            while ticket.open:
                got = await ticket.deltas.get()
                if isinstance(got, Exception):
                    raise got
                if first:
                    self.first_token_s.add(perf_counter() - ticket.began)
                first, (index, delta) = False, got
                if delta.finish:
                    ticket.open -= 1
                    self.under_way -= 1
                yield index, delta
        finally:
            if ticket.open:
                self.under_way -= ticket.open
                ticket.open = 0
                self._inbox.put(Abort(ticket))

    async def stop(self) -> None:
        """End the thread; texts under way are dropped."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def _work(self) -> None:
        try:
            while self._take():
                deltas = self.engine.step()
                if deltas:
                    self._loop.call_soon_threadsafe(self._hand_out, deltas)
        except Exception as error:
            log.exception("the engine failed")
            self._loop.call_soon_threadsafe(self._fail, error)

    def _take(self) -> bool:
        """Everything in the inbox, waiting for something if the engine is idle; False at the end."""
        while not self._inbox.empty() or self.engine.idle:
            got = self._inbox.get()
            if got is None:
                return False
            if isinstance(got, Abort):
                for sequence in got.ticket.sequences:
                    self.engine.abort(sequence)
                    self._tickets.pop(sequence, None)
                continue
            for prompt in got.prompts:
                got.sequences += self.engine.add(prompt, got.sampling, got.samples)
            self._tickets.update((sequence, (got, index)) for index, sequence in enumerate(got.sequences))
        return True

    def _hand_out(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            ticket, index = self._tickets.get(delta.sequence, (None, 0))
            if ticket is None:  # aborted while this was on its way
                continue
            if delta.finish:
                self._tickets.pop(delta.sequence, None)
            if delta.finish or delta.tokens or delta.text or delta.prompt_logprobs:
                ticket.deltas.put_nowait((index, delta))

    def _fail(self, error: Exception) -> None:
        self.failure = error
        tickets = [ticket for ticket, _ in self._tickets.values()]
        while not self._inbox.empty():
            if isinstance(left := self._inbox.get(), Ticket):
                tickets.append(left)
        for ticket in tickets:
            ticket.deltas.put_nowait(EngineFailed(str(error)))


@dataclass(frozen=True)
class Abort:
    """Word to the thread that nobody reads a ticket any more."""

    ticket: Ticket
