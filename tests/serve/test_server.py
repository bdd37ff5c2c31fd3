"""The server by OpenAI's own client and by plain requests: what comes is the engine's text, and errors have a form."""

import asyncio
import http.client
import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from time import sleep

import openai
import pytest
from starlette.exceptions import HTTPException

from counterflow.errors import ConfigError
from counterflow.infer.engine import Engine, EngineSettings
from counterflow.infer.request import Sampling, TokenLogprob
from counterflow.infer.sample import sample_tokens
from counterflow.serve.answers import ChatForm, CompletionForm
from counterflow.serve.guard import Guard
from counterflow.serve.listen import ServerSettings, listening
from counterflow.serve.metrics import Metrics
from tests.infer.models import finish
from tests.serve.service import learnt, running

PROMPT = "the pipeline "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return learnt(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def toy(tokenizer):
    with running(tokenizer) as server:
        yield server


@pytest.fixture(scope="module")
def client(toy):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{toy.port}/v1", api_key="none", max_retries=0) as client:
        yield client


def greedy(toy, tokenizer, prompt: str, count: int) -> str:
    model = toy.service.engine.model
    tokens = [tokenizer.eos, *tokenizer.encode(prompt)]
    return tokenizer.decode(list(sample_tokens(model, tokens, count, 0.0, stop=frozenset([tokenizer.eos]))))


def test_a_completion_is_the_models_text_whole_and_as_a_stream(toy, client, tokenizer):
    asked = {"model": "toy", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    answer = client.completions.create(**asked)
    expected = greedy(toy, tokenizer, PROMPT, 12)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "length")
    read = 1 + len(tokenizer.encode(PROMPT))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (read, 12)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == expected
    assert chunks[-2].choices[0].finish_reason == "length" and len(chunks) > 3
    assert chunks[-1].choices == [] and chunks[-1].usage == answer.usage


def test_chat_speaks_as_the_assistant_and_stops_before_the_next_turn(toy, client, tokenizer):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    asked = {"model": "toy", "messages": turns, "max_tokens": 9, "temperature": 0}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    expected = greedy(toy, tokenizer, "System: Be brief.\n\nUser: hello\n\nAssistant:", 9)
    assert answer.choices[0].message.content == expected and answer.choices[0].message.role == "assistant"
    named = answer.choices[0].logprobs.content
    assert len(named) == 9 and all(one.top_logprobs[0].logprob == one.logprob for one in named)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[1].choices[0].delta.role is None
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == expected


def test_lists_of_prompts_token_ids_and_samples_come_in_order(toy, client, tokenizer):
    ids = [tokenizer.eos, *tokenizer.encode(PROMPT)]
    texts = client.completions.create(
        model="toy", prompt=[PROMPT, "def"], max_tokens=6, temperature=0
    ).choices
    given = client.completions.create(model="toy", prompt=[ids, [5, 6]], max_tokens=6, temperature=0).choices
    alone = client.completions.create(model="toy", prompt=ids, max_tokens=6, temperature=0).choices
    assert texts[0].text == given[0].text == alone[0].text == greedy(toy, tokenizer, PROMPT, 6)
    asked = {"model": "toy", "prompt": [PROMPT, "def"], "max_tokens": 6, "n": 3, "seed": 7}
    many = client.completions.create(**asked)
    assert [choice.index for choice in many.choices] == list(range(6))
    assert [c.text for c in client.completions.create(**asked).choices] == [c.text for c in many.choices]
    assert len({choice.text for choice in many.choices}) > 2
    assert many.usage.prompt_tokens == len(ids) + 1 + len(tokenizer.encode("def"))


def test_echo_and_logprobs_score_a_prompt_as_the_engine_does(toy, tokenizer):
    """What lm-eval asks: the prompt's tokens with their log-probabilities, and the likeliest beside each."""
    ids = [tokenizer.eos, *tokenizer.encode(PROMPT)]
    engine = Engine(toy.service.engine.model, EngineSettings(drafts=0))
    sampling = Sampling(1, temperature=0, logprobs=1, prompt_logprobs=True)
    sequence = engine.add(ids, sampling)[0]
    (delta,) = finish(engine)[sequence]
    named = [*delta.prompt_logprobs, *delta.logprobs]
    for prompt in (ids, PROMPT):
        asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
        choice = toy.complete(**asked)["choices"][0]
        said = choice["logprobs"]
        assert choice["text"] == PROMPT + tokenizer.decode(sequence.tokens[len(ids) :])
        assert said["token_logprobs"][0] is None and said["top_logprobs"][0] is None
        for ours, theirs, top in zip(
            named[1:], said["token_logprobs"][1:], said["top_logprobs"][1:], strict=True
        ):
            assert abs(ours.logprob - theirs) < 1e-4
            assert len(top) == 1 and abs(max(top.values()) - ours.top[0][1]) < 1e-4
        assert said["text_offset"][:3] == [0, 0, len(tokenizer.decode(ids[:2]))]
    scored = toy.complete(prompt=PROMPT, max_tokens=0, logprobs=0, echo=True)["choices"][0]
    assert scored["text"] == PROMPT and len(scored["logprobs"]["tokens"]) == len(ids)


def test_the_end_token_is_among_the_logprobs_of_a_text_that_it_ends(toy, tokenizer):
    """Clients such as lm-eval ask for one token behind a text and cut the last entry off."""
    asked = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    prompts = [[token, 5] for token in range(185, 300, 3)]  # after some of these the model ends at once
    choices = toy.complete(prompt=prompts, **asked)["choices"]
    ended = next(choice for choice in choices if choice["finish_reason"] == "stop")
    said, prompt = ended["logprobs"], prompts[ended["index"]]
    assert ended["text"] == tokenizer.decode(prompt)
    assert [len(each) for each in said.values()] == [len(prompt) + 1] * 4
    assert said["tokens"][-1] == tokenizer.bpe.id_to_token(tokenizer.eos)
    assert said["token_logprobs"][-1] == max(said["top_logprobs"][-1].values())
    chat = {"messages": [{"role": "user", "content": "hello"}], "logprobs": True, "temperature": 0}
    status, body = toy.ask("/v1/chat/completions", {"model": "toy", "max_tokens": 40, **chat})
    choice = json.loads(body)["choices"][0]
    read = len(choice["logprobs"]["content"])
    assert status == 200 and read == json.loads(body)["usage"]["completion_tokens"]


def test_stops_end_a_text(toy, tokenizer):
    whole = toy.complete(prompt=PROMPT, max_tokens=20, temperature=0)["choices"][0]["text"]
    stop = whole[6:9]
    choice = toy.complete(prompt=PROMPT, max_tokens=20, temperature=0, stop=["\0\0", stop])["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")


def test_a_stop_string_that_is_a_special_token_ends_a_text_at_that_token(toy):
    """Texts do not hold it, so it is found by its id."""
    asked = {"prompt": "a", "n": 64, "max_tokens": 20, "seed": 1, "temperature": 5, "logprobs": 0}
    texts = {}
    for stop in (None, "<|fim_hole|>"):
        for choice in toy.complete(**asked, stop=stop)["choices"]:
            texts[stop, choice["index"]] = choice
    held = [at for at in range(64) if "<|fim_hole|>" in texts[None, at]["logprobs"]["tokens"]]
    for at in held:
        whole, ended = (texts[stop, at]["logprobs"]["tokens"] for stop in (None, "<|fim_hole|>"))
        assert ended == whole[: whole.index("<|fim_hole|>") + 1]
        assert texts["<|fim_hole|>", at]["finish_reason"] == "stop"
    assert held


def test_bytes_of_tokens_are_the_characters_own(tokenizer):
    """Where a character takes several tokens each has its part, under a name of its own."""
    ids = tokenizer.encode("a🧪")
    found = ChatForm("toy", tokenizer, True).logprobs(
        [TokenLogprob(id_, -1.0, ((id_, -1.0),)) for id_ in ids]
    )
    entries = found["content"] + [entry["top_logprobs"][0] for entry in found["content"]]
    assert b"".join(bytes(entry["bytes"]) for entry in entries) == "a🧪a🧪".encode()
    assert [entry["token"] for entry in entries[:3]] == ["a", r"bytes:\xf0", r"bytes:\x9f"]
    said = CompletionForm("toy", tokenizer, True).logprobs(ids, [TokenLogprob(id_, -1.0) for id_ in ids], 7)
    assert said["text_offset"] == [7, 8, 8, 8, 8] and len(set(said["tokens"])) == 5


WRONG = {
    "no JSON": b"{",
    "not UTF-8": b'{"prompt": "\xff"}',
    "a list": b"[]",
    "deep": b"[" * 50_000,
    "half a character": b'{"model": "toy", "prompt": "\\ud800"}',
    "a huge number": b'{"model": "toy", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    "empty": b"",
    **{
        str(fields): json.dumps({"model": "toy", "prompt": "a"} | fields).encode()
        for fields in (
            {"model": "\ud800"},
            {"stop": "\ud800", "max_tokens": -1},
            {"prompt": []},
            {"prompt": [[]]},
            {"prompt": [300]},
            {"prompt": [-1]},
            {"prompt": ["a", 1]},
            {"prompt": None},
            {"prompt": [1] * 300},
            {"prompt": ["a"] * 2000},
            {"n": 0},
            {"n": 10**9},
            {"n": 128, "prompt": ["a"] * 1000},
            {"max_tokens": -1},
            {"max_tokens": "5"},
            {"temperature": -1},
            {"temperature": float("nan")},
            {"temperature": "hot"},
            {"top_p": 0},
            {"top_k": -3},
            {"logprobs": 21},
            {"stop": [""]},
            {"stop": ["a"] * 99},
            {"stream": "yes"},
            {"best_of": 4},
            {"suffix": "x"},
            {"presence_penalty": 1},
            {"logit_bias": {"5": 1}},
            {"max_tokns": 5},
        )
    },
}


@pytest.mark.parametrize("body", WRONG.values(), ids=[name[:40] for name in WRONG])
def test_malformed_requests_get_an_error_in_openais_form(toy, body):
    for path in ("/v1/completions", "/v1/chat/completions"):
        status, answer = toy.ask(path, raw=body)
        assert status in (400, 404), answer
        error = json.loads(answer)["error"]
        assert error["message"] and error["type"] == "invalid_request_error"


def error_of(answer: tuple[int, bytes]) -> tuple[int, str | None, str | None, str]:
    """(status, code, field, message) of an answer in OpenAI's form."""
    error = json.loads(answer[1])["error"]
    assert error["type"] == "invalid_request_error"
    return answer[0], error["code"], error["param"], error["message"]


COMPLETE, CHAT = (
    {"model": "toy", "prompt": "a"},
    {"model": "toy", "messages": [{"role": "user", "content": "a"}]},
)
CODES = [
    (COMPLETE | {"model": "gpt-4"}, 404, "model_not_found", "model", "this server has 'toy'"),
    (COMPLETE | {"max_tokens": -1}, 400, "invalid_value", "max_tokens", "max_tokens is -1; it must be at least 0"),
    (COMPLETE | {"n": 0}, 400, "integer_below_min_value", "n", "n is 0; input should be greater than or equal to 1"),
    (COMPLETE | {"prompt": [5] * 300}, 400, "context_length_exceeded", "prompt", "context length is 256 tokens; "),
    (COMPLETE | {"max_tokens": 1000}, 400, "context_length_exceeded", "prompt", "Ask for 255 tokens at most"),
    (CHAT | {"messages": [{"role": "user", "content": "x y " * 300}]}, 400, "context_length_exceeded", "messages", ""),
    (COMPLETE | {"max_tokns": 5}, 400, "unknown_parameter", "max_tokns", "'max_tokns' is not known here"),
    ({"model": "toy"}, 400, "missing_required_parameter", "prompt", "'prompt' is missing"),
    (COMPLETE | {"max_tokens": "5"}, 400, "invalid_type", "max_tokens", "max_tokens is '5'; input should be"),
    (CHAT | {"messages": []}, 400, "empty_array", "messages", "messages is []"),
    (CHAT | {"messages": [{"role": "dog", "content": "a"}]}, 400, "invalid_value", "messages", "role is 'dog'"),
    (CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, 400, "invalid_type",
     "messages.0.content.0.text", "is 5; input should be a valid string"),
    (CHAT | {"tools": [{"type": "function"}]}, 400, "unsupported_value", "tools", "not supported: leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "code", "field", "says"), CODES, ids=[case[2] for case in CODES])
def test_errors_have_openais_codes_and_name_what_was_wrong(toy, body, status, code, field, says):
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    *found, message = error_of(toy.ask(path, body))
    assert found == [status, code, field] and says in message


def test_errors_of_what_is_no_request(toy):
    for raw, says in (
        (b'{"model": ', "not JSON (Expecting value, at character 10)"),
        (b"\xff", "0xff"),
        (b"[]", "object"),
    ):
        status, _, field, message = error_of(toy.ask("/v1/completions", raw=raw))
        assert status == 400 and field is None and says in message, message
    assert error_of(toy.ask("/v1/nothing"))[:2] == (404, "unknown_url")
    assert error_of(toy.ask("/v1/completions"))[:2] == (405, "method_not_supported")
    assert error_of(toy.ask("/v1/models/other"))[:2] == (404, "model_not_found")


def test_reading_routes_answer_a_probe_by_head(toy):
    for path in ("/health", "/metrics", "/v1/models", "/v1/models/toy", "/"):
        assert toy.ask(path, method="HEAD") == (200, b"")
    assert toy.ask("/v1/models/other", method="HEAD")[0] == 404


@pytest.mark.parametrize(
    "host", ["evil.example:8000", "192.168.0.3", "localhost.evil.example", "[::2]:80", ""]
)
def test_without_a_key_loopbacks_names_alone_are_answered(toy, host):
    """A web page may have its own name lead to this machine."""
    status, code, *_ = error_of(toy.ask("/v1/models", headers={"Host": host}))
    assert (status, code) == (403, "host_not_allowed")
    for own in (f"localhost:{toy.port}", "LocalHost", "[::1]:80", "127.0.0.3", "chat.localhost:3"):
        assert toy.ask("/v1/models", headers={"Host": own})[0] == 200


def test_a_storm_of_requests_good_and_bad_loses_none(toy):
    """45 good ones and 105 bad ones, twenty at a time; `python -m bench.campaign requests` asks more."""
    bad = list(WRONG.values())
    dice = random.Random(0)

    def is_answered(number: int) -> bool:
        if number % 10 < 7:
            return toy.ask("/v1/completions", raw=dice.choice(bad))[0] in (400, 404)
        body = toy.complete(prompt=PROMPT[: number % 13] + "x", max_tokens=number % 7 + 1, n=1 + number % 2)
        return all(choice["finish_reason"] for choice in body["choices"])

    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(is_answered, range(150)))
    toy.settle()
    assert toy.ask("/health") == (200, b"ok\n")
    engine = toy.service.engine
    assert engine.blocks.available == engine.blocks.num_blocks


def test_a_client_that_goes_away_ends_its_text(toy):
    before = toy.service.engine.statistics.tokens
    body = json.dumps({"model": "toy", "prompt": "a", "max_tokens": 240, "n": 8, "stream": True}).encode()
    for stream in (True, False):
        raw = body if stream else body.replace(b'"stream": true', b'"stream": false')
        with socket.create_connection(("127.0.0.1", toy.port)) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
            if stream:
                connection.recv(100)
        toy.settle()
    assert toy.service.engine.statistics.tokens - before < 2 * 8 * 240


def test_metrics_and_page(toy):
    toy.complete(prompt="a", max_tokens=3)
    status, text = toy.ask("/metrics")
    lines = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))
    assert status == 200 and float(lines['counterflow_tokens_total{rank="0"}']) >= 3
    assert lines["counterflow_loading_seconds"] == "0.0"
    assert float(lines['counterflow_http_requests_total{path="/v1/completions",status="200"}']) >= 1
    assert (
        lines["counterflow_request_seconds_count"] == lines['counterflow_request_seconds_bucket{le="+Inf"}']
    )
    status, page = toy.ask("/")
    assert status == 200 and b"v1/completions" in page


def test_the_key_the_limits_and_a_graceful_stop(tokenizer):
    with running(tokenizer, max_queue=2, sequences=1, api_key="secret", max_body_bytes=3000) as server:
        key = {"Authorization": "Bearer secret"}
        asked = {"model": "toy", "prompt": "a", "max_tokens": 50}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            status, body = server.ask("/v1/completions", asked, headers)
            assert status == 401 and json.loads(body)["error"]["code"] == "invalid_api_key"
        assert server.ask("/health")[0] == 200 and server.ask("/v1/models", headers=key)[0] == 200
        status, body = server.ask("/v1/completions", asked | {"prompt": "a" * 4000}, key)
        assert status == 413 and json.loads(body)["error"]["code"] == "body_too_large"
        with ThreadPoolExecutor(8) as pool:
            statuses = list(pool.map(lambda _: server.ask("/v1/completions", asked, key)[0], range(8)))
        assert set(statuses) == {200, 429} and statuses.count(200) >= 3
        last = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = json.dumps(asked | {"stream": True})
        last.request("POST", "/v1/completions", body, {"Content-Type": "application/json"} | key)
        answer = last.getresponse()
        first = answer.read(10)
    assert first and answer.read().endswith(b"data: [DONE]\n\n"), "what was under way is written to its end"
    last.close()


@pytest.mark.parametrize(
    ("key", "pieces", "read"), [(b"wrong", 5, 5), (b"secret", 5, 5), (b"secret", 50, 16)]
)
def test_the_rest_of_a_refused_body_is_read_before_the_answer(key, pieces, read):
    """Up to a bound; a connection that is closed with bytes unread is reset, and the answer lost."""
    left = [{"type": "http.request", "body": b"x" * 1000, "more_body": n > 0} for n in range(pieces)]
    answers = []

    async def receive():
        return left.pop()

    async def send(message):
        if message["type"] == "http.response.start":
            answers.append((message["status"], pieces - len(left)))

    async def app(scope, receive, send):
        try:
            while (await receive())["more_body"]:
                pass
        except HTTPException as error:
            await send({"type": "http.response.start", "status": error.status_code})

    headers = [(b"authorization", b"Bearer " + key)]
    scope = {"type": "http", "path": "/v1/x", "method": "POST", "headers": headers}
    asyncio.run(Guard(app, Metrics(), "secret", 1000)(scope, receive, send))
    assert answers == [(401 if key == b"wrong" else 413, read)]


def test_the_server_describes_itself(toy):
    status, body = toy.ask("/openapi.json")
    found = json.loads(body)
    asked = found["components"]["schemas"]["ChatAsked"]
    assert status == 200 and asked["properties"]["model"]["enum"] == ["toy"]
    assert {"type": "null"} in asked["properties"]["tools"]["anyOf"] and asked["required"] == [
        "model",
        "messages",
    ]
    answers = found["paths"]["/v1/completions"]["post"]["responses"]
    assert set(answers) == {"200", "400", "401", "404", "413", "429", "503"}


def test_pages_of_allowed_origins_may_ask_with_a_key_and_others_may_not(tokenizer):
    with running(tokenizer, api_key="secret", origins=("https://chat.example",)) as server:
        for origin, allowed in (("https://chat.example", True), ("https://evil.example", False)):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            asks = {
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization",
            }
            connection.request(
                "OPTIONS", "/v1/completions", headers={"Origin": origin, "Host": "x.example"} | asks
            )
            answer = connection.getresponse()
            assert (answer.status == 200) == allowed and answer.read() is not None
            assert answer.headers["Access-Control-Allow-Origin"] == (origin if allowed else None)
            key = {"Authorization": "Bearer secret", "Origin": origin}
            for headers, status in ((key, 200), ({"Origin": origin}, 401)):  # a page reads errors too
                connection.request("GET", "/v1/models", headers=headers)
                answer = connection.getresponse()
                assert answer.status == status and answer.read()
                assert answer.headers["Access-Control-Allow-Origin"] == (origin if allowed else None)
            connection.close()


HALVES = (
    b"",
    b"POST /v1/comp",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90\r\n\r\n{",
)


def test_half_a_request_is_ended_and_holds_no_server_that_stops(tokenizer, capsys):
    with running(tokenizer, receive_s=1) as server:
        with ExitStack() as stack:
            slow = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in HALVES]
            for connection, half in zip(slow, HALVES):
                connection.sendall(half)
            # An answer may take longer than a request.
            body = {"model": "toy", "prompt": "a", "max_tokens": 250, "stream": True}
            assert server.ask("/v1/completions", body)[1].endswith(b"[DONE]\n\n")
            for connection in slow:
                connection.settimeout(20)
                said = connection.makefile("rb").read()
                assert said.startswith(b"HTTP/1.1 408") and b"request_timeout" in said
        last = socket.create_connection(("127.0.0.1", server.port))
        last.sendall(HALVES[-1])
        assert server.ask("/health")[0] == 200
    assert last.recv(9) == b"", "the server has ended without waiting for the rest"
    last.close()
    assert "Traceback" not in capsys.readouterr().err


def test_a_failed_engine_says_so_to_everybody_and_the_server_ends(tokenizer, monkeypatch):
    with running(tokenizer) as server, ThreadPoolExecutor(4) as pool:

        def fails(works):
            while server.service.worker.under_way < 4:  # all are heard, however busy the machine is
                sleep(0.01)
            return 1 / 0

        monkeypatch.setattr(server.service.engine, "run", fails)
        asked = {"model": "toy", "prompt": "a"}
        for status, body in pool.map(lambda _: server.ask("/v1/completions", asked), range(4)):
            assert status == 503 and "division by zero" in json.loads(body)["error"]["message"]
        server.thread.join(timeout=20)
        assert not server.thread.is_alive() and isinstance(server.service.worker.failure, ZeroDivisionError)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"host": "0.0.0.0"}, "no API key"),
        ({"host": "example.org"}, "no API key"),
        ({"port": 70000}, "port is 70000"),
        ({"max_queue": 0}, "max_queue is 0"),
        ({"receive_s": 0}, "receive_s is 0"),
        ({"origins": ("chat.example",)}, "allow_origin is 'chat.example'; it must be as browsers send it"),
    ],
)
def test_unsafe_settings_are_refused(wrong, says):
    with pytest.raises(ConfigError, match=says):
        ServerSettings(**wrong)


def test_a_port_that_is_taken_is_named(toy):
    with pytest.raises(ConfigError, match=f"127.0.0.1 port {toy.port} cannot be listened on"):
        listening(ServerSettings(port=toy.port))
    with pytest.raises(ConfigError, match=r"cannot be listened on \((?!Unknown)"):
        listening(ServerSettings(host="nowhere.invalid", api_key="key"))
