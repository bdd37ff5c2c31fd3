"""A storm of requests on a server: many good ones at once, many malformed ones, and whether each got its answer."""

import http.client
import json
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

LOST = 0
"""In place of a status: no answer came."""


def ask(host: str, port: int, body: bytes, timeout_s: float) -> tuple[int, bytes]:
    """Status and body of a completion; (LOST, reason) if none came."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        return LOST, repr(error).encode()
    finally:
        connection.close()


def good(model: str, dice: random.Random) -> bytes:
    """A request that must succeed."""
    words = " ".join(
        dice.choice(["def", "class", "import", "return", "self", "x"]) for _ in range(dice.randint(1, 40))
    )
    asked = {
        "model": model,
        "prompt": words,
        "max_tokens": dice.randint(1, 32),
        "temperature": dice.choice([0, 0.8]),
    }
    return json.dumps(asked).encode()


def malformed(model: str, dice: random.Random) -> bytes:
    """A good request spoilt: cut, bytes changed, a field of another type, out of range or unknown."""
    body = bytearray(good(model, dice))
    kind = dice.randrange(4)
    if kind == 0:
        return bytes(body[: dice.randrange(len(body))])
    if kind == 1:
        for _ in range(dice.randint(1, 20)):
            body[dice.randrange(len(body))] = dice.randrange(256)
        return bytes(body)
    values: list[Any] = [None, -1, 0, 1e308, 10**30, "", "x", [], [[]], {}, True, [None], "\ud800", [10**9]]
    fields = [
        "model",
        "prompt",
        "max_tokens",
        "temperature",
        "top_p",
        "n",
        "stop",
        "logprobs",
        "stream",
        "seed",
        "zz",
    ]
    return json.dumps(json.loads(bytes(body)) | {dice.choice(fields): dice.choice(values)}).encode()


def storm(host: str, port: int, model: str, count: int, at_once: int, spoilt: bool) -> dict[str, Any]:
    """`count` requests, `at_once` at a time: how many of each status came, how long it took, and odd answers."""
    make, dice = malformed if spoilt else good, random.Random(count)
    bodies = [make(model, dice) for _ in range(count)]
    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(lambda body: ask(host, port, body, 300.0), bodies))
    took = time.perf_counter() - began
    allowed = {200, 400, 404} if spoilt else {200}
    odd = [
        (status, answer[:200].decode(errors="replace")) for status, answer in answers if status not in allowed
    ]
    return {"count": count, "statuses": dict(Counter(s for s, _ in answers)), "took_s": took, "odd": odd[:20]}
