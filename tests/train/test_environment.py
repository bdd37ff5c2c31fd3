"""Who started this process is read from the environment; what is wrong there is one line before anything waits."""

import socket
from pathlib import Path

import pytest

from counterflow.cli import main
from counterflow.errors import ConfigError
from counterflow.train.environment import first_host, place_here
from tests.train.runs import overrides

STEP = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def given(monkeypatch, variables: dict[str, str]) -> None:
    """These variables and no other of torchrun's and Slurm's."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_only_a_step_of_several_is_sruns(monkeypatch):
    """A batch script has the job's variables and one process; so has an interactive step."""
    given(monkeypatch, STEP | {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "rack[1-2]n[3-4]"})
    place = place_here()
    assert place == (3, 4, 1, "rack1n3", 20077)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert place_here() is None
    monkeypatch.delenv("SLURM_STEP_ID")
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    assert place_here() is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"),
        ("gpu[03-05,9],x", "gpu03"),
        ("gpu[3-4]-ib", "gpu3-ib"),
        ("rack[1-2]n[3-4]", "rack1n3"),
        ("c[1-2]-[5-6].site", "c1-5.site"),
        ("a-1,b[2-3]", "a-1"),
        ("n[7,9-11]x,m[1-2]", "n7x"),
    ],
)
def test_what_follows_a_bracket_belongs_to_the_first_host(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"MASTER_ADDR": None}, "MASTER_ADDR is missing"),
        ({"MASTER_PORT": None}, "MASTER_PORT is missing"),
        ({"MASTER_PORT": "auto"}, "MASTER_PORT is 'auto'"),
        ({"MASTER_PORT": "70000"}, "ports end at 65535"),
        ({"RANK": ""}, "RANK is empty"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "1"}, "this is rank 1 of 1 processes"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
    ],
)
def test_odd_variables_are_named(monkeypatch, changes, wanted):
    given(monkeypatch, {name: text for name, text in (TORCHRUN | changes).items() if text is not None})
    with pytest.raises(ConfigError, match=wanted):
        place_here()


def test_what_is_left_over_without_a_rank_is_nothing(monkeypatch):
    given(monkeypatch, {"WORLD_SIZE": "8", "MASTER_ADDR": "gone", "MASTER_PORT": "odd"})
    assert place_here() is None


def test_processes_that_cannot_meet_end_with_one_line(tmp_path: Path, monkeypatch, capsys):
    words = ["train", "tiny", *overrides(tmp_path)]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given(monkeypatch, TORCHRUN | {"MASTER_PORT": str(taken.getsockname()[1])})
        assert main(words) == 2
    error = capsys.readouterr().err
    assert "is taken by another process" in error and error.count("\n") == 1
    monkeypatch.setenv("MASTER_ADDR", "no..name")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "no name service knows that address" in error and error.count("\n") == 1
