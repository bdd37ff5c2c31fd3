"""Servers of two processes that share the experts: what one process says, they say, whoever writes it.

Ranks come from the environment, as under torchrun, or are started by the command itself.
"""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, STDOUT

import pytest

from counterflow.convert.export import Form, export
from tests import processes
from tests.model.configs import random_model
from tests.serve.service import CONFIG, Reached, learnt, running

pytestmark = pytest.mark.slow
SIZES = ("--max_sequences=2", "--max_queue=1")
"""Two ranks with two texts each, and one that waits: five are taken at once."""
ROOM = 5
GREEDY = [
    {"prompt": prompt, "temperature": 0} for prompt in ("the pipeline ", "d", "def f(x):", "of all ", "\n")
]
SEEDED = [{"prompt": each["prompt"], "n": 1 + seed % 2, "seed": seed} for seed, each in enumerate(GREEDY)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> tuple[Path, list[list[str]]]:
    """An exported model, and the texts that a server of one process gives."""
    root = tmp_path_factory.mktemp("ranks")
    tokenizer = learnt(root)
    export(random_model(CONFIG), tokenizer, root / "toy", Form("fp32"))
    with running(tokenizer) as alone:
        return root / "toy", asked(alone, GREEDY + SEEDED)


def asked(server: Reached, requests: list[dict]) -> list[list[str]]:
    """The texts of each request, several at once."""

    def texts(fields: dict) -> list[str]:
        return [choice["text"] for choice in server.complete(**fields, max_tokens=16)["choices"]]

    with ThreadPoolExecutor(ROOM // 2) as pool:
        return list(pool.map(texts, requests))


@contextmanager
def serving(
    folder: Path, *words: str, torchrun: bool = False
) -> Iterator[tuple[Reached, list[processes.Popen]]]:
    """A server on `folder`: the processes of two ranks, or the one that starts as many as `words` say."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "counterflow", "serve", f"--run={folder}", "--port=0", *SIZES, *words]
    started = [{"RANK": str(rank)} | meeting for rank in range(2)] if torchrun else [{}]
    ranks = [
        processes.Popen(command, env=os.environ | each, stdout=PIPE, stderr=STDOUT, text=True)
        for each in started
    ]
    try:
        assert ranks[0].stdout is not None
        said = ""
        for line in ranks[0].stdout:
            said += line
            if found := re.search(r"^Serving .*127.0.0.1:(\d+) ", line):
                yield Reached(int(found[1])), ranks
                break
        else:
            raise AssertionError(said)
    finally:
        for rank in ranks:
            rank.terminate()  # a kill would leave alone whom it has started
        for rank in ranks:
            rank.communicate(timeout=60)


def numbers(server: Reached, name: str) -> list[float]:
    """Each rank's, as /metrics says."""
    lines = server.ask("/metrics")[1].decode().splitlines()
    return [float(line.split()[1]) for line in lines if line.startswith(f"counterflow_{name}{{rank=")]


def open_stream(server: Reached, **fields) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """A stream whose first piece has come."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = json.dumps({"model": "toy", "prompt": "a", "stream": True, **fields})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200 and answer.read(10)
    return connection, answer


def test_two_ranks_serve_what_one_serves_and_end_when_told_to(place):
    folder, alone = place
    with serving(folder, "--device=cpu", torchrun=True) as (server, ranks):
        assert asked(server, GREEDY + SEEDED) == alone
        assert all(tokens > 0 for tokens in numbers(server, "tokens_total")), "both wrote"
        assert all(reached > 0 for reached in numbers(server, "drafts_reached_total"))
        for fields, says in (({"n": ROOM + 1}, "the server takes 5 at once"), ({"top_p": 0}, "top_p is 0")):
            status, body = server.ask("/v1/completions", {"model": "toy", "prompt": "a"} | fields)
            assert status == 400 and says in json.loads(body)["error"]["message"]
        a_client_goes_away(server)
        connection, answer = open_stream(server, max_tokens=30, temperature=0)
        ranks[0].send_signal(signal.SIGTERM)
        ranks[1].send_signal(signal.SIGTERM)  # as a cluster does: it waits for the first
        assert answer.read().endswith(b"data: [DONE]\n\n"), "what was under way is written to its end"
        connection.close()
        assert [rank.wait(60) for rank in ranks] == [0, 0]


def a_client_goes_away(server: Reached) -> None:
    """Its texts end on both ranks, and a full queue has room again."""
    before = sum(numbers(server, "tokens_total"))
    streams = [open_stream(server, max_tokens=240, temperature=0) for _ in range(ROOM - 1)]
    assert server.ask("/v1/completions", {"model": "toy", "prompt": "a", "n": 2})[0] == 429
    assert numbers(server, "sequences_running") == [2, 2]
    for connection, answer in streams:
        answer.close()
        connection.close()
    for _ in range(600):
        if numbers(server, "sequences_running") == [0, 0]:
            break
        time.sleep(0.05)
    assert numbers(server, "cache_blocks") == numbers(server, "cache_blocks_available")
    assert sum(numbers(server, "tokens_total")) - before < 240 * (ROOM - 1)


def test_a_killed_rank_ends_the_server_with_its_name_and_every_client_is_told(place):
    folder, alone = place
    with serving(folder, "--device=cpu", "--drafts=0", "--ranks=2") as (server, (launcher,)):
        assert asked(server, GREEDY) == alone[: len(GREEDY)]
        streams = [open_stream(server, max_tokens=240, temperature=0) for _ in range(2)]
        found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=True)
        os.kill(max(map(int, found.stdout.split())), signal.SIGKILL)
        for connection, answer in streams:
            error = json.loads(answer.read().decode().split("data: ")[-2])["error"]
            assert "rank 1 is gone" in error["message"] and error["type"] == "server_error"
            connection.close()
        said, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 4
    (error,) = (line for line in said.splitlines() if line.startswith("counterflow: "))
    assert "rank 1" in error and "was killed by SIGKILL" in error and "Traceback" not in said
