"""Ranks that ended: the one to blame, and a word where none of them had one."""

import re
import signal
from time import time

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from counterflow.errors import PeerLostError, RankError
from counterflow.train.launch import PEER_LOST, _explain, get_error_handler


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
    said = "lost another, and no rank said why: PeerLostError: Timed out waiting 1800000ms"
    with pytest.raises(RankError, match=re.escape(said)):
        _explain(ended(PEER_LOST, PEER_LOST, error_file=str(file)), 0, "")
