"""What stands before every route: the key, the size of a body, and a count of what was answered.

Plain ASGI, so that a body is refused as it grows and a stream is counted when it ends. The metrics, the page and the
health check need no key: they say nothing of anybody's text.
"""

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
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
        began, status, size = perf_counter(), 499, 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_body_bytes:
                raise HTTPException(
                    413, f"The body is larger than {self.max_body_bytes} bytes; send less at once."
                )
            return message

        try:
            if self.allows(scope):
                await self.app(scope, limited, watched)
            else:
                await refuse(watched)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests[path, status] += 1
            self.metrics.request_s.add(perf_counter() - began)

    def allows(self, scope: Message) -> bool:
        """Whether the request may go on: the path needs no key, or it brings the right one."""
        if not self.key or not scope["path"].startswith(GUARDED):
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, b"Bearer " + self.key)


async def refuse(send: Send) -> None:
    """401 in OpenAI's form."""
    error = failure("Incorrect API key provided.", "invalid_request_error", "invalid_api_key")
    headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error).encode()})
