"""Real processes: one process's losses, norms and checkpoints in any layout; a killed rank ends or restarts all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from counterflow.cli import main
from counterflow.config.load import load_run
from counterflow.schedule import trace
from counterflow.train.checkpoint import Checkpoints
from counterflow.train.folder import CHECKPOINTS
from counterflow.train.restore import restore
from tests import processes
from tests.train.runs import overrides

pytestmark = pytest.mark.slow
BATCH = (
    "train.batch_size=8",
    "train.micro_batch_size=1",
    "train.tokens=1280",
    "keep.eval_every=3",
    "data.held_out=0.05",
)


def command(folder: Path, run: str, *more: str) -> list[str]:
    words = overrides(folder, *BATCH, f"keep.folder={folder / run}", *more)
    return [sys.executable, "-m", "counterflow", "train", "tiny", *words]


def train(folder: Path, run: str, *more: str, code: int = 0) -> tuple[list[dict], str]:
    """Steps of a run, and what it printed."""
    done = processes.run(command(folder, run, *more))
    assert done.returncode == code, done.stdout + done.stderr
    return metrics(folder / run), done.stdout + done.stderr


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(one: list[dict], other: list[dict]) -> None:
    """Two runs' losses, norms and counts; 1e-4 of a loss covers five steps of rounding that Adam magnifies."""
    assert len(one) == len(other) == 5
    for a, b in zip(one, other):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-3
        )
        assert a["mtp_loss"] == pytest.approx(b["mtp_loss"], rel=1e-4)
    assert one[0]["loss"] == pytest.approx(other[0]["loss"], rel=1e-6)
    assert one[0]["grad_norm"] == pytest.approx(other[0]["grad_norm"], rel=1e-6)
    assert one[0]["load"] == other[0]["load"]
    held = [step["held_out_loss"] for step in one if "held_out_loss" in step]
    assert held and held == pytest.approx(
        [step["held_out_loss"] for step in other if "held_out_loss" in step], rel=1e-4
    )


def assert_same_weights(folder: Path, run: str, other: str) -> None:
    """Two runs' last checkpoints."""
    for (name, a), (_, b) in zip(*(restore(folder / one)[0].named_parameters() for one in (run, other))):
        assert torch.allclose(a, b, atol=1e-3), name


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of runs over one text, and in it `alone`, the run of one process."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder, "alone")
    return folder


def test_dualpipe_over_two_by_two_ranks_is_one_process_run(runs):
    """The same steps, timed before, and weights; only a pipeline leaves a timeline, of one data rank."""
    layout = ("parallel.pipeline=2", "parallel.data=2")
    steps, _ = train(runs, "wide", *layout, "keep.report=true", "train.minutes=9")
    assert_same(metrics(runs / "alone"), steps)
    assert Checkpoints(runs / "wide" / CHECKPOINTS, 9).steps() == [5]
    assert_same_weights(runs, "wide", "alone")
    assert (runs / "wide" / "timeline.svg").is_file() and (runs / "wide" / "trace.json").is_file()
    spans = trace.read((runs / "wide" / "trace.json").read_text())
    assert len({(span.rank, span.what) for span in spans}) == len(spans), "two data ranks in one picture"
    assert "A step of the pipeline" in (runs / "wide" / "report.html").read_text()
    assert not any((runs / "alone" / name).exists() for name in ("timeline.svg", "report.html", "sample.txt"))


def test_ranks_start_from_another_runs_weights(runs):
    """The first of them writes step 0 alone; on the samples of the other run's first step the loss is lower."""
    steps, _ = train(runs, "further", "parallel.data=2", f"from={runs / 'alone'}", "train.steps=1")
    assert Checkpoints(runs / "further" / CHECKPOINTS, 9).steps() == [0, 1]
    assert steps[0]["loss"] < metrics(runs / "alone")[0]["loss"]


def test_experts_shared_over_two_hops_change_nothing(runs):
    """Four ranks on two nodes: the steps, and the weights in the checkpoint that they write together."""
    hops = ("parallel.data=4", "parallel.expert=4", "parallel.dispatch=two_hop", "parallel.node_ranks=2")
    steps, _ = train(runs, "hops", *hops)
    assert_same(metrics(runs / "alone"), steps)
    assert all(len(step["dispatch_bytes"]) == 2 and min(step["dispatch_bytes"]) > 0 for step in steps)
    assert_same_weights(runs, "hops", "alone")


LAYOUTS = [
    ("parallel.data=2", "parallel.expert=2"),
    ("parallel.pipeline=2", "parallel.data=2", "parallel.expert=2"),
    ("parallel.data=2",),
    ("parallel.pipeline=3", "parallel.schedule=1f1b"),
    (),
]
"""Each goes on from a checkpoint of the one before; experts are shared, then shared in DualPipe, then no more."""


def test_a_checkpoint_goes_on_in_any_other_layout(runs, capsys):
    """A run whose every step is another layout's, and each layout's way to the end, against all in one process.

    Its batch grows, and its length is no multiple of any layout's batches.
    """
    ramp = (
        "train.batch_start=8",
        "train.batch_size=12",
        "train.batch_increment=4",
        "train.batch_ramp_until=0.5",
    )
    ramp = (*ramp, "train.tokens=1505", "keep.checkpoint_every=1", "keep.checkpoints=9")
    assert main(command(runs, "ramping", *ramp)[3:]) == 0
    alone, kept = metrics(runs / "ramping"), Checkpoints(runs / "changing" / CHECKPOINTS, 9)
    for done, layout in enumerate(LAYOUTS):
        steps, printed = train(runs, "changing", *ramp, *layout)
        assert ("Going on" in printed and f"from step {done}" in printed) == (done > 0)
        assert_same(alone, steps)
        assert [step["batch"] for step in steps] == [8, 8, 8, 12, 12] and steps[-1]["samples"] == 48
        if "parallel.expert=2" in layout:
            assert all(len(s["dispatch_bytes"]) == 1 and s["dispatch_bytes"][0] > 0 for s in steps[done:])
        for step in kept.steps()[done + 1 :] if layout else ():
            shutil.rmtree(kept.path(step))
    capsys.readouterr()
    assert main(command(runs, "changing", *ramp, *LAYOUTS[0])[3:]) == 0
    assert "is complete (step 5)" in capsys.readouterr().out


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_killed_rank_ends_all_with_one_message_or_starts_them_again(tmp_path, restarts):
    words = command(
        tmp_path, "run", "parallel.pipeline=2", f"parallel.restarts={restarts}", "train.tokens=5120",
        "keep.checkpoint_every=2", "keep.checkpoints=1",
    )  # fmt: skip
    kept = Checkpoints(tmp_path / "run" / CHECKPOINTS, 9)
    with processes.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not kept.steps():
            assert time.monotonic() < deadline and process.poll() is None, "a checkpoint comes"
            time.sleep(0.02)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        killed = time.monotonic()
        out, err = process.communicate(timeout=240)
        assert not children(process.pid)
    if restarts:
        assert process.returncode == 0 and "Going on with tiny" in out, out + err
        assert [step["step"] for step in metrics(tmp_path / "run")][-1] == 20
        return
    assert process.returncode == 4 and time.monotonic() - killed < 60
    assert err.count("counterflow:") == 1 and "was killed by SIGKILL" in err and "rank " in err, err
    assert "Traceback" not in err
    assert kept.steps() and load_run(str(tmp_path / "run" / "run.toml")).train.tokens == 5120


def test_an_error_of_all_ranks_is_said_once_and_the_page_is_whole(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CHECKPOINTS).touch()
    done = processes.run(command(tmp_path, "run", "parallel.pipeline=2", "keep.report=true"))
    assert done.returncode == 2 and done.stderr.count("counterflow:") == 1, done.stderr
    assert "a file stands where a folder must be" in done.stderr
    assert (tmp_path / "run" / "picture.png").is_file(), "written after the page"


def children(pid: int) -> list[int]:
    """Processes of a parent, oldest first, that are ranks: each has a session of its own."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat = (path / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(stat[1]) == pid and stat[3] == path.name:
            found.append(int(path.name))
    return sorted(found)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("parallel.pipeline=2", "train.batch_size=7"), "take 8"),
        (("parallel.pipeline=2", "train.batch_size=2"), "at least 4: take 4"),
        (("parallel.pipeline=3",), "take 4"),
        (("parallel.pipeline=2", "parallel.schedule=dualpip"), "did you mean 'dualpipe'?"),
        (("parallel.pipeline=2", "parallel.placement=embed 2 | head"), "parallel.placement is"),
        (("parallel.pipeline=8", "parallel.schedule=1f1b"), "take fewer stages or more layers"),
        (("parallel.pipeline=2", "parallel.schedule=none.txt"), "cannot be read"),
        (("parallel.pipeline=2", "parallel.schedule=json:nothing"), "cannot be imported"),
        (("parallel.data=3",), "take 9"),
        (("parallel.expert=2",), "make the second a multiple"),
        (("parallel.data=2", "parallel.expert=2", "parallel.dispatch=twohop"), "did you mean 'two_hop'?"),
        (("parallel.data=2", "parallel.expert=2", "parallel.dispatch=two_hop"), "set parallel.node_ranks"),
    ],
)
def test_layouts_that_cannot_be_are_one_line(tmp_path, more, says):
    printed = processes.run(command(tmp_path, "run", *more)).stderr
    assert says in printed and "Traceback" not in printed and printed.count("counterflow:") == 1
