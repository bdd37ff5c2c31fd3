"""Malformed requests to the server: each gets 4xx in OpenAI's form, or an answer where it is none; never 5xx, or none.

In process the application is called as a server calls it, so that headers and paths may hold any byte. By HTTP the
requests go to `counterflow serve`, an exported model's, over a connection each.
"""

import asyncio
import json
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.campaign.spoil import as_json, spoil, spoil_tree
from counterflow.convert.export import Form, export
from counterflow.infer.engine import Engine, EngineSettings
from counterflow.serve.app import Service, application
from tests import processes
from tests.model.configs import random_model
from tests.serve.service import CONFIG, learnt

WAITS_S = 60.0
NO_HTTP = b"Invalid HTTP request received."
"""What uvicorn says where a request breaks HTTP itself, such as one without a host."""
WRITES = ("/v1/completions", "/v1/chat/completions")
PATHS = (*WRITES, "/v1/models", "/v1/models/toy", "/health", "/metrics", "/")
COMPLETION = {"model": "toy", "prompt": "the pipeline", "max_tokens": 2}
CHAT = {"model": "toy", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
        "max_tokens": 2}  # fmt: skip
FIELDS = {
    "n": 2, "stream": True, "stream_options": {"include_usage": True}, "stop": ["a", "bc"], "temperature": 0.7,
    "top_p": 0.9, "top_k": 3, "seed": 5, "user": "me", "frequency_penalty": 0.0, "presence_penalty": 0,
    "logit_bias": {"5": 0}, "metadata": {"a": "b"}, "store": False,
}  # fmt: skip
OF_COMPLETIONS = {"echo": True, "logprobs": 2, "best_of": 1, "suffix": "x"}
OF_CHATS = {"logprobs": True, "top_logprobs": 2, "max_completion_tokens": 2, "tools": [], "tool_choice": "none",
            "response_format": {"type": "text"}, "parallel_tool_calls": True}  # fmt: skip
METHODS = ("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "FOO")


class Request(NamedTuple):
    """What is sent."""

    kind: str
    method: str
    path: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Answer(NamedTuple):
    """What came."""

    status: int
    type: str
    body: bytes


def good(dice: random.Random) -> tuple[str, dict[str, Any]]:
    """The path and fields of a request that must be answered."""
    path = dice.choice(WRITES)
    chat = path == WRITES[1]
    more = FIELDS | (OF_CHATS if chat else OF_COMPLETIONS)
    few = dice.sample([*more], dice.randrange(4)) if dice.random() < 0.7 else []
    few = [name for name in few if name not in ("tools", "tool_choice", "best_of", "suffix")]
    if "top_logprobs" in few and "logprobs" not in few:
        few.append("logprobs")
    if "stream_options" in few and "stream" not in few:
        few.append("stream")
    return path, dict(CHAT if chat else COMPLETION) | {name: more[name] for name in few}


def drawn(dice: random.Random) -> Request:
    """A request that is spoilt, or one in twenty that is not."""
    path, fields = good(dice)
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    method, kind, body = "POST", "good", json.dumps(fields).encode()
    where = dice.random()
    if where < 0.05:
        pass
    elif where < 0.4:
        kind, tree = spoil_tree(dice, fields)
        kind, body = f"field: {kind}", as_json(dice, tree)
    elif where < 0.5:
        name = dice.choice(("prompt", "messages", "stop", "logit_bias", *FIELDS, *OF_CHATS, *OF_COMPLETIONS))
        kind, tree = spoil_tree(dice, fields | {name: spoil_tree(dice, fields.get(name, FIELDS))[1]})
        kind, body = "fields", as_json(dice, tree)
    elif where < 0.7:
        kind, body = spoil(dice, "", body)
    elif where < 0.8:
        kind, method, path = "method or path", dice.choice(("POST", *METHODS)), _path(dice)
    elif where < 0.9:
        kind, headers = "header", [_header(dice), *headers[dice.randrange(3) :], _header(dice)]
    else:
        kind, body = "size", _large(dice, fields)
    return Request(kind, method, path if isinstance(path, bytes) else path.encode(), headers, body)


def _path(dice: random.Random) -> bytes:
    path = dice.choice(PATHS).encode()
    ends = (b"", b"/", b"?a=b&a", b"/%ff", b"/../..")
    return dice.choice((*(path + end for end in ends), b"//" + path, path.upper(), *OTHER_PATHS))


OTHER_PATHS = (b"/v1/models/" + b"x" * 5000, b"/v1/models/%00", b"/docs", b"/openapi.json", b"/v1/embeddings")


def _header(dice: random.Random) -> tuple[bytes, bytes]:
    return dice.choice(HEADERS), dice.choice(HEADER_VALUES)


HEADERS = (
    *(
        b"content-type",
        b"authorization",
        b"origin",
        b"host",
        b"accept",
        b"content-encoding",
        b"expect",
        b"range",
    ),
    *(b"x-a", b"accept-encoding", b"access-control-request-method"),
)
HEADER_VALUES = (
    *(
        b"",
        b"text/plain",
        b"application/json; charset=utf-16",
        b"multipart/form-data",
        b"Bearer \xff",
        b"*",
        b"gzip",
    ),
    *(b"evil.example:8000", b"x" * 5000, b"\xff\xfe", b"bytes=0-1", b"null", b"[::1"),
)


def _large(dice: random.Random, fields: dict[str, Any]) -> bytes:
    return json.dumps(fields | dict([dice.choice(LARGE)])).encode()


LARGE: tuple[tuple[str, Any], ...] = (
    *(
        ("prompt", prompt)
        for prompt in ("a" * 2**21, "<|endoftext|>" * 300, ["a"] * 1000, [3] * 5000, [[5]] * 2000)
    ),
    *(("prompt", [number]) for number in (-1, 2**40, 10**30)),
    ("messages", [CHAT["messages"][0]] * 3000),
    *(("stop", stop) for stop in (["a"] * 100, "a" * 10**5)),
    ("logit_bias", {str(number): 1 for number in range(3000)}),
    *(("n", 129), ("max_tokens", 10**18), ("user", "u" * 10**5), ("top_k", 10**20), ("seed", -(10**20))),
)


def require_form(request: Request, answer: Answer) -> str:
    """The answer's status, which is right for such a request, in the right form.   Fails: AssertionError."""
    asked = f"{request.method} {request.path[:80]!r} {request.headers} {request.body[:300]!r}"
    told = f"{request.kind}: {asked}: {answer.status}"
    said = answer.body[:500]
    assert answer.status < 500, f"{told} {said!r}"
    assert answer.status == 200 or request.kind != "good", f"{told} {said!r}"
    if request.method == "HEAD":
        return str(answer.status)
    if answer.status < 400:
        assert b'"error"' not in said or b'"choices"' in said, f"{told} {said!r}"
        streamed = answer.type.startswith("text/event-stream")
        assert not streamed or answer.body.endswith(b"data: [DONE]\n\n"), f"{told}: the stream has no end"
        return str(answer.status)
    assert answer.type.startswith("application/json"), f"{told} in {answer.type}: {said!r}"
    error = json.loads(answer.body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}, f"{told} {said!r}"
    assert error["message"] and isinstance(error["message"], str) and error["type"], f"{told} {said!r}"
    assert "\n" not in error["message"] and len(error["message"]) < 2000, f"{told} {said!r}"
    return str(answer.status)


async def call(app: Any, request: Request) -> Answer:
    """The application's answer, called as a server calls it."""
    path, _, query = request.path.partition(b"?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "method": request.method,
        "path": _unquoted(path),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": [*request.headers, (b"content-length", str(len(request.body)).encode())],
        "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 8000),
        "state": {},
    }
    parts, sent, done = [], iter((request.body,)), asyncio.Event()

    async def receive() -> dict[str, Any]:
        for body in sent:
            return {"type": "http.request", "body": body, "more_body": False}
        await done.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        parts.append(message)

    try:
        await asyncio.wait_for(app(scope, receive, send), WAITS_S)
    finally:
        done.set()
    head, body = parts[0], b"".join(part.get("body", b"") for part in parts[1:])
    return Answer(head["status"], dict(head["headers"]).get(b"content-type", b"").decode(), body)


def _unquoted(path: bytes) -> str:
    return re.sub(rb"%([0-9a-fA-F]{2})", lambda two: bytes([int(two[1], 16)]), path).decode(
        "utf-8", "replace"
    )


@contextmanager
def opened(place: Path) -> Iterator[Callable[[random.Random], tuple[str, ...]]]:
    """An application in this process."""
    torch.set_num_threads(1)
    tokenizer = learnt(place)
    model = random_model(CONFIG).requires_grad_(False)
    service = Service(
        Engine(model, EngineSettings(max_sequences=8), tokenizer.bytes_of), tokenizer, "toy", 256
    )
    app = application(service)

    def case(dice: random.Random) -> tuple[str, ...]:
        request = drawn(dice)
        return request.kind, require_form(request, runner.run(call(app, request)))

    with asyncio.Runner() as runner:
        life = service.life(app)  # type: ignore[arg-type]
        runner.run(life.__aenter__())
        yield case
        while service.worker.under_way or not service.engine.idle:  # what a client did not wait for ends
            runner.run(asyncio.sleep(0.01))
        runner.run(life.__aexit__(None, None, None))
        blocks = service.engine.blocks
        assert blocks.available == blocks.num_blocks, "blocks of the cache are lost"


@contextmanager
def opened_http(place: Path) -> Iterator[Callable[[random.Random], tuple[str, ...]]]:
    """`counterflow serve` in a process of its own."""
    export(random_model(CONFIG), learnt(place), place / "toy", Form("fp32"))
    words = [sys.executable, "-m", "counterflow", "serve", "--run", str(place / "toy"), "--port", "0"]
    with (
        (place / "errors").open("w") as errors,
        processes.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None, "asked for"
        ports = (re.search(r"http://[^:]+:(\d+)", line) for line in process.stdout)
        port = int(next(found for found in ports if found)[1])

        def case(dice: random.Random) -> tuple[str, ...]:
            request = drawn(dice)
            answer = over_http(port, request)
            if answer.body == NO_HTTP and answer.status == 400:  # nothing of ours was asked
                return request.kind, "400, no HTTP"
            return request.kind, require_form(request, answer)

        yield case
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAITS_S) == 0, "the server did not end well"
    said = (place / "errors").read_text()
    assert "Traceback" not in said, said[-2000:]


def over_http(port: int, request: Request) -> Answer:
    """The answer over a connection of its own."""
    head = [request.method.encode() + b" " + request.path + b" HTTP/1.1", b"connection: close"]
    head += [name + b": " + value for name, value in request.headers]
    head += [b"content-length: " + str(len(request.body)).encode()]
    with socket.create_connection(("127.0.0.1", port), timeout=WAITS_S) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # it may answer before it has read all
            connection.sendall(b"\r\n".join(head) + b"\r\n\r\n" + request.body)
        with connection.makefile("rb") as file:
            return _parsed(file.read())


def _parsed(said: bytes) -> Answer:
    """An answer of HTTP/1.1."""
    head, _, body = said.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    if headers.get(b"transfer-encoding") == b"chunked":
        chunks, rest = [], body
        while size := int(rest.partition(b"\r\n")[0] or b"0", 16):
            start = rest.index(b"\r\n") + 2
            chunks.append(rest[start : start + size])
            rest = rest[start + size + 2 :]
        body = b"".join(chunks)
    return Answer(int(status.split()[1]), headers.get(b"content-type", b"").decode(), body)
