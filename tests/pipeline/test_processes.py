"""Real processes: one process's losses, norms and checkpoints in any layout; a killed rank ends or restarts all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from counterflow.config.load import load_run
from counterflow.schedule import trace
from counterflow.train.checkpoint import Checkpoints
from counterflow.train.folder import CHECKPOINTS
from counterflow.train.restore import restore
from tests import processes
from tests.train.runs import overrides

pytestmark = pytest.mark.slow
BATCH = ("train.batch_size=8", "train.micro_batch_size=1", "train.tokens=1280", "keep.eval_every=3")


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


def test_four_by_two_and_back(tmp_path):
    """DualPipe over 4 × 2 ranks is one process's run; its checkpoint goes on in one process and under 1F1B."""
    plain, _ = train(tmp_path, "plain")
    layout = ("parallel.pipeline=4", "parallel.data=2", "train.batch_size=16", "train.tokens=2560")
    wide, _ = train(tmp_path, "wide", *layout)
    alone, _ = train(tmp_path, "alone", *layout[2:])
    assert_same(alone, wide)
    (step,) = Checkpoints(tmp_path / "wide" / CHECKPOINTS, 9).steps()
    assert step == 5
    for (name, a), (_, b) in zip(
        *(restore(tmp_path / run)[0].named_parameters() for run in ("wide", "alone"))
    ):
        assert torch.allclose(a, b, atol=1e-3), name
    assert (tmp_path / "wide" / "timeline.svg").is_file() and (tmp_path / "wide" / "trace.json").is_file()
    spans = trace.read((tmp_path / "wide" / "trace.json").read_text())
    assert len({(span.rank, span.what) for span in spans}) == len(spans), "two data ranks in one picture"
    assert "A step of the pipeline" in (tmp_path / "wide" / "report.html").read_text()
    assert not (tmp_path / "plain" / "timeline.svg").exists() and len(plain) == 5


def test_shared_experts_change_nothing(tmp_path):
    """Experts spread over data ranks: one process's run, alone, in DualPipe (whose steps are timed before), over two
    hops; and goes on elsewhere."""
    batch = ("train.batch_size=16", "train.tokens=2560", "keep.checkpoint_every=3", "keep.checkpoints=9")
    alone, _ = train(tmp_path, "alone", *batch)
    layouts = {
        "flat": ("parallel.data=2", "parallel.expert=2"),
        "dual": ("parallel.pipeline=4", "parallel.data=2", "parallel.expert=2"),
        "hops": (
            "parallel.data=4",
            "parallel.expert=4",
            "parallel.dispatch=two_hop",
            "parallel.node_ranks=2",
        ),
    }
    for run, layout in layouts.items():
        timed = ("train.minutes=9",) if run == "dual" else ()
        steps, _ = train(tmp_path, run, *batch, *layout, *timed)
        assert_same(alone, steps)
        hops = 2 if run == "hops" else 1
        assert all(len(s["dispatch_bytes"]) == hops and min(s["dispatch_bytes"]) > 0 for s in steps)
    for (name, a), (_, b) in zip(
        *(restore(tmp_path / run)[0].named_parameters() for run in ("dual", "alone"))
    ):
        assert torch.allclose(a, b, atol=1e-3), name
    kept = Checkpoints(tmp_path / "flat" / CHECKPOINTS, 9)
    shutil.rmtree(kept.path(5))
    steps, printed = train(tmp_path, "flat", *batch, *layouts["dual"])
    assert "from step 3" in printed
    assert_same(alone, steps)


def test_a_checkpoint_goes_on_in_any_other_layout(tmp_path):
    """Three steps in one layout, the rest in another, against all in one process."""
    plain, _ = train(tmp_path, "plain")
    layouts = [
        ("parallel.data=2",),
        ("parallel.pipeline=2",),
        ("parallel.pipeline=3", "parallel.schedule=1f1b"),
        (),
    ]
    for number, (first, then) in enumerate(pairwise(layouts)):
        run = f"run{number}"
        train(tmp_path, run, *first, "keep.checkpoint_every=1", "keep.checkpoints=9")
        kept = Checkpoints(tmp_path / run / CHECKPOINTS, 9)
        for step in kept.steps()[3:]:
            for path in kept.path(step).iterdir():
                path.unlink()
            kept.path(step).rmdir()
        steps, printed = train(tmp_path, run, *then)
        assert "from step 3" in printed
        assert_same(plain, steps)


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_killed_rank_ends_all_with_one_message_or_starts_them_again(tmp_path, restarts):
    words = command(
        tmp_path, "run", "parallel.pipeline=2", f"parallel.restarts={restarts}", "train.tokens=25600",
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
        assert [step["step"] for step in metrics(tmp_path / "run")][-1] == 100
        return
    assert process.returncode == 4 and time.monotonic() - killed < 60
    assert err.count("counterflow:") == 1 and "was killed by SIGKILL" in err and "rank " in err, err
    assert "Traceback" not in err
    assert kept.steps() and load_run(str(tmp_path / "run" / "run.toml")).train.tokens == 25600


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
