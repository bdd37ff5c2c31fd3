"""A deadline for what a client sends: half a request holds neither a connection nor a server that is to end.

uvicorn waits for the rest of a request as long as the connection lasts, before any key is asked for. Here whoever has
begun one has so many seconds for the whole of it, and so has a connection that sends nothing. An answer takes as long
as it takes. Not taken: a time limit between pieces, which a byte now and then gets round.
"""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from counterflow.serve.answers import failure


class Receiving(H11Protocol):
    """A connection; the loop's `call_later` ends it where a request does not arrive in time."""

    receive_s = 30.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """It has sent something: a request is begun, goes on, or is whole."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        self._unwatch()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """An answer has ended; the next request may be there in part."""
        super().on_response_complete()
        self._watch()

    def shutdown(self) -> None:
        """The server ends: answers under way may go on, requests that are not whole may not."""
        if self._unfinished and self.cycle is not None:
            self.transport.close()
        super().shutdown()

    @property
    def _unfinished(self) -> bool:
        """Whether the request that is sent, if any, is not whole."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def _watch(self) -> None:
        idle = self.timeout_keep_alive_task is not None  # nothing is begun: uvicorn's own limit holds
        if not self._unfinished or idle or self.transport.is_closing():
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.receive_s, self._late)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self._say_late()
            self.transport.close()

    def _say_late(self) -> None:
        said = f"The request was not whole after {self.receive_s:g} s; send it faster, or less at once."
        body = json.dumps(failure(said, "invalid_request_error", "request_timeout")).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        events: list[Any] = [
            h11.Response(status_code=408, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ]
        for event in events:
            self.transport.write(self.conn.send(event) or b"")


def receiving(receive_s: float) -> type[Receiving]:
    """The class of connections with a deadline of so many seconds."""
    return type("Receiving", (Receiving,), {"receive_s": receive_s})
