"""Bytes on the wire are those of rows that leave a rank; shares are of the ceiling that a backend is held against."""

import json
import sys
from pathlib import Path

import pytest
import torch

from counterflow.benchmark.all_to_all import AllToAll, contenders, routes, row_bytes, wire_rows
from counterflow.benchmark.routings import ROUTINGS
from counterflow.benchmark.shown import ceiling_of, focus, table
from counterflow.cli import main
from counterflow.comm.mesh import Mesh
from counterflow.errors import ConfigError
from counterflow.plan.hardware import hardware
from tests import processes


def test_rows_that_stay_home_do_not_count_and_a_token_counts_once_a_rank():
    """Four experts on two ranks: a token with both experts of the other rank crosses once, one at home never."""
    ids = [torch.tensor([[0, 1], [1, 2], [2, 3]]), torch.tensor([[0, 3]])]
    assert wire_rows(ids, 4) == [[0, 2], [1, 0]]
    assert wire_rows([torch.tensor([[0, 1], [2, 3]])], 4) == [[2]]  # one rank: no wire, what stays


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_token_names_distinct_experts_and_ranks_draw_their_own(routing):
    wish = AllToAll(tokens=(40,), experts=16, top=3, routing=routing)
    first, second = routes(wish, Mesh(data=2, expert=2), 40)
    assert first.shape == second.shape == (40, 3)
    assert all(len(set(token.tolist())) == 3 for token in first) and not torch.equal(first, second)


def test_a_routing_that_is_none_is_named():
    with pytest.raises(ConfigError, match="routing is 'skewd'; did you mean 'skewed'"):
        routes(AllToAll(routing="skewd"), Mesh(data=2, expert=2), 4)


def test_a_row_in_fp8_has_a_scale_for_every_128_numbers():
    assert row_bytes(7168, fp8=False) == 14336
    assert row_bytes(7168, fp8=True) == 7168 + 56 * 4
    assert row_bytes(129, fp8=True) == 129 + 2 * 4


def line(what: str, name: str, rate: float) -> dict:
    return {
        "tokens": 64,
        "what": what,
        "name": name,
        "wire_bytes": 1e6,
        "median_s": 1e6 / rate,
        "p95_s": 1e6 / rate,
        "bytes_per_s": rate,
    }


def test_shares_are_of_the_same_means_with_the_same_budget():
    rates = {"push, 8 programs": 200e9, "push, 16 programs": 400e9, "copy engine": 500e9, "NCCL": 100e9}
    assert ceiling_of("nvlink, 8 SMs", rates) == ceiling_of("nvlink, 8 SMs, FP8", rates) == "push, 8 programs"
    assert ceiling_of("copy_engine", rates) == "copy engine"
    assert ceiling_of("collective", rates) == "NCCL"
    assert ceiling_of("two_hop", rates) == "copy engine"  # none of its own: the fastest
    rows = [line("ceiling", name, rate) for name, rate in rates.items()]
    rows += [line(what, "nvlink, 8 SMs", 150e9) for what in ("transport", "dispatch", "combine")]
    *_, last = table({"rows": rows}, 64)
    assert last[0] == "nvlink, 8 SMs" and last[3] == "150"
    assert (last[4], last[6], last[8]) == ("0.75", "0.75", "0.75")


def test_the_table_is_of_the_report_s_size_or_the_nearest_below():
    def sizes(*numbers: int) -> dict:
        return {"rows": [{"tokens": number} for number in numbers]}

    assert [focus(sizes(128, 4096, 8192)), focus(sizes(128, 1024)), focus(sizes(8192))] == [4096, 1024, 8192]


def test_kernels_of_gpus_are_no_contenders_on_a_cpu():
    names = {one.backend for one in contenders(AllToAll(), Mesh(data=2, expert=2))}
    assert "collective" in names and not names & {"nvlink", "copy_engine", "local"}


def bench(*words: str) -> str:
    """What a bench prints, in a process of its own."""
    root = Path(__file__).parents[2]
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "HOME": "/tmp"}
    done = processes.run([sys.executable, *words], env=environment, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_verb_prints_draws_and_writes(tmp_path):
    words = "--device cpu --tokens 16 32 --hidden 64 --experts 8 --top 2 --rounds 2 --warmups 1 --backends collective"
    said = bench("-m", "counterflow", "bench", "all-to-all", *words.split(), "--folder", str(tmp_path))
    assert "collective, FP8" in said and "32 tokens a rank, 2 ranks" in said
    raw = json.loads((tmp_path / "raw.json").read_text())
    matrix = wire_rows(routes(AllToAll((32,), experts=8, top=2), Mesh(data=2, expert=2), 32), 8)
    (gloo,) = (row for row in raw["rows"] if row["tokens"] == 32 and row["what"] == "ceiling")
    assert gloo["wire_bytes"] == sum(map(sum, matrix)) / 2 * 128
    assert (tmp_path / "picture.svg").read_text().startswith("<svg")


def test_rates_are_written_for_the_planner(tmp_path, capsys):
    words = "--model tiny --sequence-length 16 --micro-batch 1 --precision fp32"
    words += " --device cpu --repeats 1 --seconds 0.001"
    file = tmp_path / "here" / "mine.toml"
    assert main(["bench", "rates", *words.split(), "--output", str(file)]) == 0
    assert "plan --hardware" in capsys.readouterr().out
    assert hardware(file=str(file)).card.launch_s > 0


def test_a_bench_that_is_none_names_the_nearest(capsys):
    assert main(["bench", "overlapp"]) == 2
    assert "'overlapp' is no bench" in capsys.readouterr().err


@pytest.mark.slow
def test_a_pair_on_two_processes_is_timed_in_four_ways(tmp_path):
    words = "--device cpu --hidden 32 --intermediate 16 --heads 2 --experts 8 --top 2 --tokens 16 --layers 2"
    words += " --microbatches 4 --backends collective --routing real --rounds 2 --warmups 0 --ratio 1:1"
    said = bench("-m", "counterflow", "bench", "overlap", *words.split(), "--folder", str(tmp_path))
    assert "collective, real" in said and "2 expert ranks, 8 experts of a layer" in said
    for row in json.loads((tmp_path / "raw.json").read_text())["rows"]:
        assert row["repeats"] >= 1 and {len(some) for some in row["seconds"].values()} == {2}
        assert row["cost"] == row["seconds_a_pair"]["overlapped"] / row["seconds_a_pair"]["computation"]
    assert (tmp_path / "picture.svg").read_text().startswith("<svg")
