"""The engine's own thread, and how requests of an event loop reach it and its text comes back.

One thread steps the engine; everything reaches it through one queue and leaves it by the loop's own call, a report a
step, so neither side locks. Who asked holds a `Ticket` and reads its deltas; who goes away is aborted.

Where ranks share the model's experts the loop deals each prompt to the rank with the fewest texts open, and the thread
tells every rank its news before each step; what the others write comes to the loop by their links. While nothing is
open all ranks wait, this one at its queue and the others for its word. Not taken: a prompt to the rank whose cache
knows its beginning, which would need the others' tables here.

If a step fails or a rank is lost every ticket is told, no more are taken, and the server is asked to end: an engine
that failed in mid-step cannot be trusted, and the ranks that are left hold a part of the experts.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from time import perf_counter

from counterflow.errors import PeerLostError, RequestError
from counterflow.infer.engine import Engine
from counterflow.infer.request import Sampling
from counterflow.serve.desk import Begin, Desk, End, News, Numbers, Report, Written
from counterflow.serve.links import Link
from counterflow.serve.metrics import Histogram

BLAME_S = 2.0
"""How long a failed step waits for word of a lost rank, which is then the cause."""


class Busy(Exception):
    """More is queued than the server takes."""


class EngineFailed(Exception):
    """A step failed or a rank was lost; the engine runs no more."""


@dataclass(eq=False)
class Ticket:
    """One request's texts under way: its prompts times `samples`, in that order."""

    samples: int
    open: int
    """Texts whose reader has not seen their end."""
    ranks: dict[int, int] = field(default_factory=dict)
    """The rank of each of its keys, one a prompt."""
    deltas: "asyncio.Queue[tuple[int, Written] | Exception]" = field(default_factory=asyncio.Queue)
    """An exception ends them."""
    began: float = field(default_factory=perf_counter)


class Worker:
    """Steps an engine in a thread; all public calls belong to the event loop that started it."""

    def __init__(
        self,
        engine: Engine,
        max_queue: int,
        first_token_s: Histogram,
        links: Sequence[Link],
        when_failed: Callable[[], None],
    ) -> None:
        self.engine, self.max_queue, self.first_token_s = engine, max_queue, first_token_s
        self.under_way = 0
        """Texts that were asked for and have not ended."""
        self.failure: Exception | None = None
        self._desk, self._links, self._when_failed = Desk(engine), links, when_failed
        self.numbers: list[Numbers] = [self._desk.numbers()] * (1 + len(links))
        """Each rank's, as of its last report."""
        self._keys = count()
        self._texts: dict[tuple[int, int], tuple[Ticket, int]] = {}
        self._open = [0] * (1 + len(links))
        """Texts that each rank has yet to end."""
        self._inbox: queue.SimpleQueue[tuple[int, News] | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._failed = threading.Event()
        for rank, link in enumerate(links, start=1):
            link.listen(partial(self._heard, rank), partial(self._lost, rank))
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, prompts: list[list[int]], sampling: Sampling, samples: int) -> Ticket:
        """Queue a request.   Fails: RequestError on an impossible one, Busy, EngineFailed."""
        for prompt in prompts:
            self.engine.check(prompt, samples)
        if self.failure is not None:
            raise EngineFailed(str(self.failure))
        texts = len(prompts) * samples
        room = self.max_queue + self.engine.batch.max_sequences * len(self._open)
        if texts > room:
            raise RequestError(
                f"the request asks for {texts} texts; the server takes {room} at once: ask for fewer."
            )
        if self.under_way + texts > room:
            raise Busy
        ticket = Ticket(samples, texts)
        self.under_way += texts
        for number, prompt in enumerate(prompts):
            self._deal(ticket, number, Begin(next(self._keys), prompt, sampling, samples))
        return ticket

    async def read(self, ticket: Ticket) -> AsyncGenerator[tuple[int, Written]]:
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
                self._abort(ticket)

    async def stop(self) -> None:
        """End the thread, and with it the other ranks; texts under way are dropped."""
        self._inbox.put(None)
        while self._thread.is_alive() and self.failure is None:
            await asyncio.sleep(0.01)

    def _deal(self, ticket: Ticket, number: int, asked: Begin) -> None:
        """A prompt to the rank with the fewest texts open; `number` is its place in the request."""
        rank = self._open.index(min(self._open))
        ticket.ranks[asked.key] = rank
        for sample in range(asked.samples):
            self._texts[asked.key, sample] = ticket, number * asked.samples + sample
        # Before the thread hears of it, or it might think that all have ended.
        self._open[rank] += asked.samples
        self._inbox.put((rank, asked))

    def _abort(self, ticket: Ticket) -> None:
        for key, rank in ticket.ranks.items():
            left = [self._texts.pop((key, sample), None) is not None for sample in range(ticket.samples)]
            self._open[rank] -= sum(left)
            if any(left):
                self._inbox.put((rank, End(key)))

    def _work(self) -> None:
        try:
            while (news := self._news()) is not None:
                for link, each in zip(self._links, news[1:], strict=True):
                    link.send(each)
                report = self._desk.step(news[0])
                if report is not None:
                    self._tell(self._hand_out, 0, report)
            for link in self._links:
                link.send(None)
        except Exception as error:
            if not self._links or not self._failed.wait(BLAME_S):
                self._tell(self._fail, error)

    def _tell(self, act: Callable[..., None], *arguments: object) -> None:
        """Have the event loop act; one that has closed meanwhile has no reader left."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(act, *arguments)

    def _news(self) -> list[list[News]] | None:
        """Each rank's, all that is in the inbox, waiting for some if no rank has a text open; None at the end."""
        news: list[list[News]] = [[] for _ in self._open]
        while not self._inbox.empty() or not (any(news) or not self.engine.idle or any(self._open[1:])):
            got = self._inbox.get()
            if got is None:
                return None
            rank, each = got
            news[rank].append(each)
        return news

    def _heard(self, rank: int, report: Report | None) -> None:
        if report is not None:
            self._tell(self._hand_out, rank, report)

    def _lost(self, rank: int) -> None:
        self._failed.set()
        error = PeerLostError(
            f"rank {rank} is gone, and its part of the experts with it, so the server ends; what that rank said last "
            "tells why. Start the server again."
        )
        self._tell(self._fail, error)

    def _hand_out(self, rank: int, report: Report) -> None:
        self.numbers[rank] = report.numbers
        for delta in report.written:
            name = delta.key, delta.index
            if name not in self._texts:  # aborted while this was on its way
                continue
            ticket, index = self._texts[name]
            if delta.finish:
                del self._texts[name]
                self._open[rank] -= 1
            ticket.deltas.put_nowait((index, delta))

    def _fail(self, error: Exception) -> None:
        if self.failure is not None:  # what follows from the first
            return
        self.failure = error
        for ticket in {ticket for ticket, _ in self._texts.values()}:
            ticket.deltas.put_nowait(EngineFailed(str(error)))
        self._when_failed()
