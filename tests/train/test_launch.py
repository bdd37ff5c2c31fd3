"""Ranks that ended: the one to blame, and a word where none of them had one."""

import os
import re
import signal
import socket
import subprocess
import sys
from time import time

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from counterflow.errors import PeerLostError, RankError
from counterflow.train.launch import PEER_LOST, _explain, get_error_handler
from tests import processes


def ended(*codes: int, later: dict[int, int] | None = None, error_file: str = "") -> ChildFailedError:
    """Ranks with these exit codes, all seen at once but those that were seen so many seconds later."""
    failures = {}
    for rank, code in enumerate(codes):
        failures[rank] = ProcessFailure(rank, 1000 + rank, code, error_file)
        failures[rank].timestamp = int(time()) + (later or {}).get(rank, 0)
    return ChildFailedError("counterflow", failures)


def test_the_kill_of_an_agent_is_not_blamed_over_the_rank_that_raised():
    assert _explain(ended(1, -signal.SIGKILL, later={1: 31}), 0, "") == 1
    assert _explain(ended(2, PEER_LOST, -signal.SIGTERM), 0, "") == 2
    with pytest.raises(RankError, match=r"rank 1 \(process 1001\) was killed by SIGKILL"):
        _explain(ended(PEER_LOST, -signal.SIGKILL, -signal.SIGTERM), 0, "")


def test_ranks_that_all_lost_another_are_not_silent(tmp_path, monkeypatch):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    get_error_handler().record_exception(PeerLostError("Timed out waiting 1800000ms"))
    said = "lost its connection to another, and no rank said why: PeerLostError: Timed out waiting 1800000ms"
    with pytest.raises(RankError, match=re.escape(said)):
        _explain(ended(PEER_LOST, PEER_LOST, error_file=str(file)), 0, "")


def test_what_one_rank_prepares_is_waited_for_without_a_clock():
    """The group's own limit, lowered to a tenth of what is prepared, ends a sum that a rank is late for."""
    code = """
import time
from datetime import timedelta
import torch, torch.distributed as dist
from counterflow.train.launch import on_ranks
def act(mesh):
    dist.distributed_c10d._set_pg_timeout(timedelta(milliseconds=50), dist.group.WORLD)
    assert mesh.first_does(lambda: time.sleep(0.5) or 7) == 7
    assert mesh.all_do(lambda: time.sleep(0.5 * mesh.rank) or mesh.rank) == mesh.rank
    if mesh.first:
        time.sleep(0.5)
    mesh.sum(torch.ones(1))
on_ranks(2, "cpu", [], act)
"""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        processes.Popen(
            [sys.executable, "-c", code],
            env=os.environ | meeting | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [PEER_LOST, PEER_LOST], said
    assert (
        "rank 1 lost its connection to another" in said[1]
        and "imed out" in said[1]
        and said[1].count("counterflow:") == 1
    )
