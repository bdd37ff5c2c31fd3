"""What stands before every route: the key, the host that was asked for, the size of a body, and a count of what was
answered.

Plain ASGI, so that a body is refused as it grows and a stream is counted when it ends. The metrics, the page and the
health check need no key: they say nothing of anybody's text. Without a key a loopback address guards the server, and a
web page could reach it under a name of its own that leads there; so its names alone are answered then.
"""

import hmac
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from time import perf_counter
from typing import Any

from starlette.exceptions import HTTPException

from counterflow.serve.answers import failure
from counterflow.serve.metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
GUARDED = "/v1/"
DISCARDED = 16
"""Times the largest body that is accepted: so much of a refused request is read and thrown away."""


class Body:
    """A request's body as it is received, and no more of it than `most` bytes."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self.most, self.size, self.whole = receive, most, 0, False

    async def receive(self) -> Message:
        """The next part.   Fails: HTTPException once it is too large."""
        message = await self._next()
        if self.size > self.most:
            raise HTTPException(413, f"The body is larger than {self.most} bytes; send less at once.")
        return message

    async def discard(self) -> None:
        """Receive the rest, up to a bound: a connection closed with bytes unread is reset, and the answer lost."""
        while not self.whole and self.size < DISCARDED * self.most:
            await self._next()

    async def _next(self) -> Message:
        message = await self._receive()
        self.size, self.whole = self.size + len(message.get("body", b"")), not message.get("more_body")
        return message


class Guard:
    """An ASGI application around another."""

    def __init__(self, app: App, metrics: Metrics, api_key: str, max_body_bytes: int) -> None:
        self.app, self.metrics = app, metrics
        self.key, self.max_body_bytes = api_key.encode(), max_body_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, body = perf_counter(), 499, Body(receive, self.max_body_bytes)

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                await body.discard()
            await send(message)

        try:
            headers = dict(scope["headers"])
            if not self.key and not is_loopback(host := _host(headers)):
                await refuse(watched, 403, *_foreign(host))
            elif not self.allows(scope, headers):
                await refuse(watched, 401, *NO_KEY)
            else:
                await self.app(scope, body.receive, watched)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests[path, status] += 1
            self.metrics.request_s.add(perf_counter() - began)

    def allows(self, scope: Message, headers: Mapping[bytes, bytes]) -> bool:
        """Whether it may go on: it needs no key, as what a browser asks beforehand, or brings the right one."""
        if not self.key or not scope["path"].startswith(GUARDED) or scope["method"] == "OPTIONS":
            return True
        return hmac.compare_digest(headers.get(b"authorization", b""), b"Bearer " + self.key)


NO_KEY = "Incorrect API key provided.", "invalid_api_key", [(b"www-authenticate", b"Bearer")]


def _host(headers: Mapping[bytes, bytes]) -> str:
    """The name that was asked for, without its port; only old clients send none."""
    host = headers.get(b"host", b"localhost").decode("latin-1")
    return re.sub(r":\d*$", "", host).strip("[]")


def _foreign(host: str) -> tuple[str, str, list[tuple[bytes, bytes]]]:
    said = (
        f"The host '{host}' was asked for, and a server without an API key answers to this machine's loopback names "
        "alone: ask 127.0.0.1, or start it with a key."
    )
    return said, "host_not_allowed", []


def is_loopback(host: str) -> bool:
    """Whether a name or an address leads to the machine itself, whoever resolves it."""
    host = host.lower()
    try:
        return host == "localhost" or host.endswith(".localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def refuse(
    send: Send, status: int, message: str, code: str, headers: list[tuple[bytes, bytes]]
) -> None:
    """An error in OpenAI's form."""
    error = json.dumps(failure(message, "invalid_request_error", code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(error)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": error})
