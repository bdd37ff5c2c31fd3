"""Random rounds find what is wrong: a backend that sends tokens to other experts does not pass."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from counterflow.benchmark import random_rounds
from counterflow.benchmark.carried import balanced
from counterflow.benchmark.routings import ROUTINGS
from counterflow.comm import open_dispatcher
from counterflow.comm.mesh import Mesh
from counterflow.comm.peers import thread_peers


@dataclass(frozen=True)
class Alone(Mesh):
    """A rank's mesh between threads: it tells only its own error."""

    def everyone(self, value):
        return [value]


def play(monkeypatch, wrap, rounds: int) -> list[list[dict]]:
    peers = thread_peers(2, 1)
    monkeypatch.setattr(random_rounds, "process_peers", lambda mesh, node: peers[mesh.rank])
    monkeypatch.setattr(random_rounds, "open_dispatcher", lambda *given: wrap(open_dispatcher(*given)))
    wish = random_rounds.RandomRounds(rounds=rounds, tokens=12, late_s=0.001)

    def rank(index: int) -> list[dict]:
        return list(random_rounds.random_rounds(wish, Alone(data=2, expert=2, rank=index)))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(rank, range(2)))


def test_rounds_pass_and_say_what_they_drew(monkeypatch):
    found = play(monkeypatch, lambda one: one, 30)
    assert [row["routing"] for row in found[0]] == [row["routing"] for row in found[1]]
    assert {row["routing"] for row in found[0]} == set(ROUTINGS)
    assert {row["rank_late"] for row in found[0]} == {0, 1}


def test_tokens_at_other_experts_are_found(monkeypatch):
    with pytest.raises(AssertionError, match="off by"):
        play(monkeypatch, lambda one: balanced(one, 8), 3)
