"""Verbs that write with a model, over several processes that share its experts: what one process says, they say."""

import json
import os
import socket
import sys
from pathlib import Path

import pytest
import torch

from counterflow.cli import main
from counterflow.convert.load import load_folder
from counterflow.errors import ConfigError
from counterflow.model.transformer import expert_shards
from tests import processes
from tests.train.runs import overrides

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """`run`, with 16 experts a layer, and its export `out`."""
    folder = tmp_path_factory.mktemp("processes")
    assert main(["train", "tiny", *overrides(folder, "train.tokens=512", "model.max_positions=64")]) == 0
    assert main(["export", str(folder / "run"), str(folder / "out")]) == 0
    return folder


def says(*words: str, code: int = 0) -> str:
    """What a command prints as its answer, in processes of its own."""
    done = processes.counterflow(*words)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def as_torchrun(*words: str) -> None:
    """A command as two processes that find their ranks in the environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [
        processes.Popen(
            [sys.executable, "-m", "counterflow", *words],
            env=os.environ | meeting | {"RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]


def test_generate_says_on_two_ranks_what_it_says_on_one(place, capsys):
    words = ["generate", "--run", str(place / "run"), "--prompt", "the wire ", "--max_tokens=30", "--seed=3"]
    assert main(words) == 0
    alone = capsys.readouterr().out
    assert says(*words, "--ranks", "2") == alone and len(alone) > 30


def test_texts_and_bits_per_byte_of_an_exported_folder_are_the_same_on_two_ranks(place):
    """Every problem's text, by one rank or the other; bits per byte to the rounding of sums in another order."""
    kept = {}
    for ranks, say in ((1, lambda *words: main(list(words))), (2, as_torchrun)):
        to = [f"--json={place / f'{ranks}.json'}", f"--run={place / 'out'}"]
        say("evaluate", "humaneval", *to, "--problems=3", "--max_tokens=12", "--unconfined")
        texts = (place / f"{ranks}.jsonl").read_text()
        say("evaluate", "perplexity", str(place / "text.txt"), *to, "--max_bytes=2000")
        kept[ranks] = texts, json.loads((place / f"{ranks}.json").read_text())["texts"][0]["bits_per_byte"]
    assert kept[1][0] == kept[2][0] and kept[1][0].count("\n") == 3
    assert kept[1][1] == pytest.approx(kept[2][1], rel=1e-6)


def test_a_part_of_the_experts_is_all_that_is_read(place, monkeypatch):
    from counterflow.convert.shards import Shards

    whole, read = load_folder(place / "out")[0].state_dict(), []
    real = Shards.read
    monkeypatch.setattr(Shards, "read", lambda self, name: read.append(name) or real(self, name))
    model, _ = load_folder(place / "out", part=(1, 4))
    shards = expert_shards(model)
    assert shards
    for name, value in model.state_dict().items():
        full = whole[name].flatten()
        start = shards[name].offset if name in shards else 0
        assert torch.equal(value.flatten(), full[start : start + value.numel()])
        assert value.numel() * (4 if name in shards else 1) == len(full)
    experts = {int(name.split(".experts.")[1].split(".")[0]) for name in read if ".experts." in name}
    assert experts == {4, 5, 6, 7}


def test_experts_that_cannot_be_shared_are_refused(place):
    with pytest.raises(ConfigError, match="16 experts and 3 ranks"):
        load_folder(place / "out", part=(0, 3))


def test_what_a_rank_finds_wrong_is_not_taken_for_the_end_of_another():
    """Also where an agent watches, which says of ranks that died how they ended, and nothing of what they found."""
    code = """
from counterflow import errors
from counterflow.train.launch import on_ranks
def act(mesh):
    raise errors.RankError("rank 1 does not answer")
on_ranks(1, "cpu", [], act)
"""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    there = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "one"}
    there |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = processes.run([sys.executable, "-c", code], env=os.environ | there)
    assert "RankError: rank 1 does not answer" in done.stderr and done.returncode == 1
