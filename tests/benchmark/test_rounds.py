"""Rounds end in time on a CPU: fewer are made, warm-ups too, and all ranks make as many."""

from counterflow.benchmark import rounds
from counterflow.benchmark.rounds import Rounds
from counterflow.comm.mesh import Mesh


def made(monkeypatch, limit_s: float, warmups: int, number: int) -> tuple[int, int, list[tuple[int, int]]]:
    """(acts, times kept, what was told) of rounds of half a second each."""
    now, acts, told = [0.0], [], []
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: now[0])

    def act() -> None:
        acts.append(None)
        now[0] += 0.5

    kept = Rounds(Mesh()).time({"it": act}, warmups, number, limit_s, lambda *of: told.append(of))
    return len(acts), len(kept["it"]), told


def test_all_rounds_are_made_where_there_is_time(monkeypatch):
    acts, kept, told = made(monkeypatch, 60.0, 3, 20)
    assert (acts, kept) == (23, 20) and told[0] == (1, 23) and told[-1] == (23, 23)


def test_fewer_are_made_where_there_is_less(monkeypatch):
    acts, kept, told = made(monkeypatch, 5.0, 20, 20)
    assert (acts, kept) == (10, 8) and told[0] == (1, 40) and told[-1] == (10, 10)


def test_one_is_kept_where_there_is_none(monkeypatch):
    assert made(monkeypatch, 0.1, 20, 20)[:2] == (3, 1)
    assert made(monkeypatch, 0.1, 0, 2)[:2] == (2, 2)
