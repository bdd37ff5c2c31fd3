"""A server on a random model, on a port of its own, in a thread; and plain requests to it."""

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from counterflow.config.run import Source
from counterflow.data.corpus import open_corpus
from counterflow.data.tokenizer import Tokenizer, open_tokenizer
from counterflow.infer.engine import Engine, EngineSettings
from counterflow.serve.app import Service
from counterflow.serve.listen import ServerSettings, listening, server
from tests.data.texts import folder
from tests.model.configs import BASE, random_model

CONFIG = replace(BASE, vocab_size=300, num_mtp_modules=1, max_positions=256)


def learnt(root: Path) -> Tokenizer:
    """300 ids, learnt from forty small texts."""
    folder(root / "texts", 40)
    corpus = open_corpus(Source(str(root / "texts")), 0.2, root / "cache")
    return open_tokenizer("train", 300, [corpus], root / "cache", quiet=True)


@dataclass
class Reached:
    """A server that answers on `port`."""

    port: int

    def ask(
        self, path: str, body=None, headers=None, raw: bytes | None = None, method: str = ""
    ) -> tuple[int, bytes]:
        """Status and body; a POST if there is one to send."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} | (headers or {})
        connection.request(method or ("GET" if data is None else "POST"), path, data, sent)
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found

    def complete(self, **fields) -> dict:
        """A completion's body, which must have come."""
        status, body = self.ask("/v1/completions", {"model": "toy", **fields})
        assert status == 200, body
        return json.loads(body)


@dataclass
class Running(Reached):
    """One in this process."""

    service: Service
    thread: threading.Thread

    def settle(self) -> None:
        """Wait until the engine has nothing to do."""
        for _ in range(600):
            if self.service.worker.under_way == 0 and self.service.engine.idle:
                return
            time.sleep(0.05)
        raise AssertionError("the engine does not come to rest")


@contextmanager
def running(tokenizer: Tokenizer, max_queue: int = 1024, sequences: int = 8, **settings) -> Iterator[Running]:
    """A server while the block lasts."""
    model = random_model(CONFIG).requires_grad_(False)
    engine = Engine(model, EngineSettings(max_sequences=sequences), tokenizer.bytes_of)
    service = Service(engine, tokenizer, "toy", max_queue)
    wish = ServerSettings(port=0, **settings)
    web = server(service, wish)
    with listening(wish) as socket:
        thread = threading.Thread(target=web.run, kwargs={"sockets": [socket]})
        thread.start()
        while not web.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.02)
        try:
            yield Running(socket.getsockname()[1], service, thread)
        finally:  # or a failing test would wait for its server for ever
            web.should_exit = True
            thread.join(timeout=60)
    assert not thread.is_alive(), "the server did not stop"
