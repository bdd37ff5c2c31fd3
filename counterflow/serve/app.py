"""The routes: completions, chat completions, models, metrics, health and a page to try the model.

One `Service` holds what a route needs; a route checks, submits, and gives the deltas out whole or as a stream. Errors
leave in OpenAI's form whatever raised them. A client that goes away ends its texts.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from html import escape
from importlib.resources import files
from time import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from counterflow.data.tokenizer import Tokenizer
from counterflow.infer.chat import Chat, chat_of
from counterflow.infer.engine import Engine
from counterflow.infer.request import Sampling
from counterflow.serve.answers import ChatForm, Choice, CompletionForm, Form, failure, usage
from counterflow.serve.describe import COMPLETED, MISSING, REFUSED, describe
from counterflow.serve.desk import Written
from counterflow.serve.guard import App, Guard
from counterflow.serve.links import Link
from counterflow.serve.metrics import Metrics
from counterflow.serve.protocol import Asked, ChatAsked, CompletionAsked
from counterflow.serve.refuse import HANDLERS, ModelMissing
from counterflow.serve.worker import EngineFailed, Ticket, Worker

NO_CACHE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass
class Service:
    """What the routes share."""

    engine: Engine
    tokenizer: Tokenizer
    name: str
    max_queue: int
    links: Sequence[Link] = ()
    """To the other ranks that share the engine's experts."""
    when_failed: Callable[[], None] = lambda: None
    """Called once if the engine has failed: it serves nobody any more."""
    guarded: bool = False
    """Whether /v1/ asks for a key."""
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time()))
    chats: Chat = field(init=False)
    """How conversations are written."""
    _worker: Worker | None = None

    def __post_init__(self) -> None:
        """Fails: DataError for a chat template that is none."""
        self.chats = chat_of(self.tokenizer)

    @property
    def worker(self) -> Worker:
        """The engine's thread."""
        assert self._worker is not None, "the application's lifespan starts the worker"
        return self._worker

    @asynccontextmanager
    async def life(self, _: FastAPI) -> AsyncIterator[None]:
        """The engine's thread lives as long as the application."""
        self._worker = Worker(
            self.engine, self.max_queue, self.metrics.first_token_s, self.links, self.when_failed
        )
        yield
        await self._worker.stop()

    async def completions(self, asked: CompletionAsked, request: Request) -> Response:
        """POST /v1/completions."""
        self.require_model(asked)
        prompts, sampling = asked.prompts(self.tokenizer), asked.settings(self.tokenizer.ends)
        form = CompletionForm(self.name, self.tokenizer, asked.logprobs is not None)
        return await self.respond(asked, form, prompts, asked.echo, sampling, request)

    async def chat(self, asked: ChatAsked, request: Request) -> Response:
        """POST /v1/chat/completions."""
        self.require_model(asked)
        prompts = asked.prompts(self.chats)
        sampling = asked.settings(self.tokenizer.ends, self.engine.batch.positions, self.chats)
        form = ChatForm(self.name, self.tokenizer, asked.logprobs)
        return await self.respond(asked, form, prompts, False, sampling, request)

    async def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        return {"object": "list", "data": [await self.model(self.name)]}

    async def model(self, name: str) -> dict[str, Any]:
        """GET /v1/models/NAME."""
        if name != self.name:
            raise ModelMissing(f"The model '{name}' is not here; this server has '{self.name}'.")
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "counterflow"}

    async def health(self) -> Response:
        """GET /health: 200 while the server runs, which ends when its engine does."""
        return PlainTextResponse("ok\n")

    async def numbers(self) -> Response:
        """GET /metrics."""
        text = self.metrics.text(self.worker.numbers, self.worker.under_way)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def page(self) -> Response:
        """GET /: the page to try the model; it asks for a key where the API does."""
        text = files("counterflow.serve").joinpath("page.html").read_text(encoding="utf-8")
        text = text.replace("GUARDED", "true" if self.guarded else "false").replace(
            "MODEL", escape(self.name)
        )
        return HTMLResponse(text)

    def require_model(self, asked: Asked) -> None:
        """Fails (ModelMissing) if another model was meant."""
        if asked.model != self.name:
            raise ModelMissing(f"The model '{asked.model}' is not here; this server has '{self.name}'.")

    async def respond(
        self,
        asked: Asked,
        form: Form,
        prompts: list[list[int]],
        echo: bool,
        sampling: Sampling,
        request: Request,
    ) -> Response:
        """Submit, and answer whole or as a stream."""
        asked.require_room(prompts, self.engine.batch.positions)
        sampling = replace(sampling, stop_tokens=self.tokenizer.ends_with(sampling.stop))
        ticket = self.worker.submit(prompts, sampling, asked.n)
        echoes = [
            self.tokenizer.decode(prompt) if echo else "" for prompt in prompts
        ]  # whose tokens are known now
        order = [(prompt, text) for prompt, text in zip(prompts, echoes) for _ in range(asked.n)]
        choices = [Choice(index, prompt, echo) for index, (prompt, echo) in enumerate(order)]
        if asked.stream:
            wants_usage = asked.stream_options is not None and asked.stream_options.include_usage
            lines = stream(form, self.worker.read(ticket), choices, prompts, wants_usage)
            return StreamingResponse(lines, media_type="text/event-stream", headers=NO_CACHE)
        watch = asyncio.create_task(_watch(request, ticket))
        try:
            async for index, delta in self.worker.read(ticket):
                choices[index].add(delta)
        finally:
            watch.cancel()
        body = form.envelope(form.kind, [form.whole(choice) for choice in choices])
        return JSONResponse(body | {"usage": usage(prompts, choices)})


async def stream(
    form: Form,
    deltas: AsyncGenerator[tuple[int, Written]],
    choices: list[Choice],
    prompts: list[list[int]],
    wants_usage: bool,
) -> AsyncIterator[str]:
    """Server-sent events, a chunk each, and [DONE]; an echo goes out with a choice's first chunk."""
    echoes = [choice.text for choice in choices]
    for choice in choices:
        choice.text = ""
    last: dict[str, Any] = {"usage": None} if wants_usage else {}
    try:
        async with aclosing(deltas):
            async for index, delta in deltas:
                choice = choices[index]
                piece = form.piece(choice, delta)
                if not choice.begun and echoes[index]:
                    piece["text"] = echoes[index] + piece["text"]
                    choice.text += echoes[index]
                choice.add(delta)
                choice.begun = True
                yield f"data: {json.dumps(form.envelope(form.chunk, [piece]) | last)}\n\n"
        if wants_usage:
            yield f"data: {json.dumps(form.envelope(form.chunk, []) | {'usage': usage(prompts, choices)})}\n\n"
    except EngineFailed as error:
        yield f"data: {json.dumps(failure(f'The engine failed: {error}', 'server_error'))}\n\n"
    yield "data: [DONE]\n\n"


async def _watch(request: Request, ticket: Ticket) -> None:
    """Ends the ticket when the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    ticket.deltas.put_nowait(HTTPException(499, "The client has gone away."))


def application(
    service: Service,
    api_key: str = "",
    max_body_bytes: int = 2**20,
    origins: Sequence[str] = (),
) -> App:
    """The ASGI application; with an `api_key`, /v1/ asks for it as a bearer token. Pages of `origins` may ask it."""
    service.guarded = bool(api_key)
    app = FastAPI(title="Counterflow", lifespan=service.life, docs_url=None, redoc_url=None)
    app.post("/v1/completions", **COMPLETED)(service.completions)
    app.post("/v1/chat/completions", **COMPLETED)(service.chat)
    reads: Mapping[str, tuple[Callable[..., Any], type[Response]]] = {
        "/v1/models": (service.models, JSONResponse),
        "/v1/models/{name:path}": (service.model, JSONResponse),
        "/health": (service.health, PlainTextResponse),
        "/metrics": (service.numbers, PlainTextResponse),
        "/": (service.page, HTMLResponse),
    }
    for path, (read, kind) in reads.items():
        errors = MISSING if "{" in path else REFUSED if path.startswith("/v1/") else {}
        app.get(path, response_model=None, response_class=kind, responses=errors)(read)
        app.head(path, include_in_schema=False)(read)
    for error, handler in HANDLERS.items():
        app.add_exception_handler(error, handler)
    describe(app, service.name, service.engine.model.config.vocab_size, service.guarded)
    guarded: App = Guard(app, service.metrics, api_key, max_body_bytes)
    if not origins:
        return guarded
    return CORSMiddleware(guarded, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
