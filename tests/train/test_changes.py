"""A run goes on in another layout with the same batches, and under those other settings that take a checkpoint up."""

import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from counterflow.config.run import Parallel, RunConfig, Train
from counterflow.config.runs import RUNS
from counterflow.errors import ConfigError, NonFiniteError
from counterflow.plan import layout
from counterflow.train import begin, lr
from counterflow.train.changes import Change, recorded, together
from counterflow.train.folder import run_config
from counterflow.train.loop import train
from counterflow.train.metrics import read
from counterflow.train.report import SECTIONS, open_run
from counterflow.train.restore import model_of
from tests.train.runs import small_run, stop_after

LENGTH = 16
RAMPS = [(0, 8, 0.0), (4, 8, 1.0), (8, 32, 0.5), (16, 32, 0.7), (6, 24, 0.9), (12, 12, 0.3)]
"""First batch, full batch, and where the ramp between them ends."""
LAYOUTS = [
    ("1f1b", 1, 1, 2),
    ("1f1b", 1, 1, 1),
    ("1f1b", 1, 2, 2),
    ("1f1b", 1, 4, 2),
    ("zb1p", 3, 2, 1),
    ("interleaved-1f1b", 2, 2, 1),
    ("dualpipe", 2, 1, 2),
    ("dualpipe", 2, 2, 1),
    ("dualpipe", 4, 1, 1),
    ("dualpipev", 2, 3, 1),
]
"""Schedule, pipeline ranks, data ranks, micro-batch."""


def brief(folder: Path, *more: str) -> RunConfig:
    """A small run with little held out, which is most of its time."""
    return small_run(folder, "data.held_out=0.02", *more)


@cache
def runs_it(parallel: Parallel, microbatches: int) -> bool:
    """Whether there is a schedule for so many micro-batches: the rule is asked, not what is known of it."""
    return parallel.pipeline == 1 or bool(layout.schedule_of(parallel, microbatches).rows)


def spread(schedule: str, pipeline: int, data: int, micro: int, ramp: tuple[int, int, float]) -> RunConfig:
    start, full, until = ramp
    train = Train(
        tokens=50 * LENGTH - 3,
        batch_start=start,
        batch_size=full,
        batch_ramp_until=until,
        micro_batch_size=micro,
    )
    parallel = Parallel(schedule=schedule, pipeline=pipeline, data=data)
    return replace(RUNS["tiny"], train=train, parallel=parallel)


def accepted(run: RunConfig) -> bool:
    try:
        layout.require_layout(run)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("ramp", RAMPS)
def test_every_layout_that_runs_the_full_batch_goes_on_from_any_sample_to_the_end(ramp):
    """From every place at which any layout, or an earlier release, can have stopped. No layout is refused for less."""
    tried = 0
    for first, other in itertools.product(LAYOUTS, repeat=2):
        begun = layout.begun(spread(*first, ramp))
        run = layout.continued_in(spread(*other, ramp), begun.train.batch_increment)
        multiple, least = layout.allowed_batches(run)
        if not accepted(begun) or not accepted(run):
            assert not accepted(begun) or run.train.batch_size % multiple or run.train.batch_size < least
            continue
        tried += 1
        unit, total = run.train.micro_batch_size * run.parallel.data, lr.total_samples(run.train, LENGTH)
        for sample in range(total + 1):
            batches = list(lr.steps(run.train, LENGTH, sample))
            assert all(batch % unit == 0 and runs_it(run.parallel, batch // unit) for batch in set(batches))
            assert sample + sum(batches) >= total > sample + sum(batches[:-1]) or sample == total
    assert tried >= 16


@pytest.mark.parametrize("ramp", RAMPS)
def test_where_both_layouts_run_them_the_batches_are_those_of_the_run_that_never_stopped(ramp):
    """At every stop; and the same share of the run is done, so that rate, weights and biases move alike."""
    tried = 0
    for first, other in itertools.product(LAYOUTS, repeat=2):
        begun = layout.begun(spread(*first, ramp))
        increment, asked = begun.train.batch_increment, spread(*other, ramp)
        if not accepted(begun) or not accepted(
            replace(asked, train=replace(asked.train, batch_increment=increment))
        ):
            continue
        tried += 1
        run = layout.continued_in(asked, increment)
        whole = list(lr.steps(begun.train, LENGTH))
        assert lr.total_samples(run.train, LENGTH) == lr.total_samples(begun.train, LENGTH)
        for done in range(len(whole) + 1):
            assert list(lr.steps(run.train, LENGTH, sum(whole[:done]))) == whole[done:]
    assert tried >= 7


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run stopped at its third step of 24."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        assert train(brief(folder)) > 128
    return folder


@pytest.mark.parametrize(
    "remedy",
    [
        "train.lr.peak=1e-5",
        "train.lr.warmup=0.4",
        "train.lr.warmup_steps=9",
        "train.clip_norm=0.1",
        "train.precision=bf16",
        "train.micro_batch_size=1",
        "train.recompute=attention",
        "train.ema_decay=0.5",
        "train.batch_size=8",
        "train.steps=40",
        "train.tokens=1e6",
        "keep.checkpoints=1",
        "keep.checkpoint_async=false",
        "parallel.restarts=2",
        "parallel.data=2",
        "train.device=auto",
        "name=another",
    ],
)
def test_what_our_errors_advise_is_taken_once_there_is_a_checkpoint(stopped, remedy):
    assert not begin.is_complete(brief(stopped, remedy))


def test_a_layout_that_cannot_be_is_refused_before_an_earlier_run_is_moved(stopped):
    """Also where torchrun has started the ranks, which ask for nothing before."""
    with pytest.raises(ConfigError, match=r"train.batch_size is 4 .* take 6"):
        begin.begin(brief(stopped, "parallel.data=3", "keep.resume=never"), stopped / "run")
    assert [path.name for path in stopped.glob("run*")] == ["run"]


def test_a_change_is_said_and_kept_with_its_step(stopped, capsys):
    first = ["train.tokens=640", "train.lr.peak=1e-3", "train.lr.warmup=0.4", "train.clip_norm=0.5"]
    first += [
        "train.micro_batch_size=1",
        "train.recompute=attention",
        "train.precision=bf16",
        "keep.log_every=2",
    ]
    assert train(brief(stopped, *first)) == 0
    said = capsys.readouterr().err
    assert said.startswith("counterflow: from step 3 on train.tokens was 3072.0, is 640.0; ")
    assert "; train.lr.peak was 0.003, is 0.001; " in said and said.count(" was ") == 8
    kept = {change.setting: change for change in recorded(stopped / "run")}
    assert kept["train.precision"] == Change(3, "train.precision", "'fp32'", "'bf16'") and len(kept) == 8
    assert run_config(stopped / "run").train.lr.peak == 1e-3, "and the file is one to load"
    rows = read(stopped / "run")
    changed = {row["step"]: row["changed"] for row in rows if "changed" in row}
    assert list(changed) == [4] and kept["train.lr.peak"]._asdict() in changed[4]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and rows[3]["lr"] <= 1e-3
    assert "train.lr.peak was 0.003, is 0.001" in SECTIONS["settings"](open_run(stopped / "run"))
    for tokens, decay in ((768, 0.0), (896, 0.5)):  # averages end, and begin again
        assert train(brief(stopped, *first, f"train.tokens={tokens}", f"train.ema_decay={decay}")) == 0
    steps = [change.step for change in recorded(stopped / "run") if change.setting == "train.ema_decay"]
    assert steps == [5, 6] and model_of(stopped / "run", averaged=True)


@pytest.mark.parametrize(
    "damage", ["changes = 5", "[[changes]]", '[[changes]]\nstep="3"\nsetting=""\nwas=""\nnow=""']
)
def test_damaged_changes_are_named(tmp_path, damage):
    (tmp_path / "run.toml").write_text(damage)
    with pytest.raises(ConfigError, match=r"run.toml has changes that are not as they were written"):
        recorded(tmp_path)


def test_weights_that_a_rate_far_too_high_has_spoilt_take_no_checkpoints_place(tmp_path):
    """So the remedy works: without a checkpoint the run begins again, and no good one is pushed out."""
    every = ("keep.checkpoint_every=1", "train.lr.warmup=0.5", "train.tokens=256")
    with pytest.raises(NonFiniteError, match=r"step 1: weights have grown beyond .* lower train.lr.peak"):
        train(brief(tmp_path, *every, "train.lr.peak=1e30"))
    assert train(brief(tmp_path, *every, "train.lr.peak=1e-3")) == 0


def test_changes_are_told_from_the_step_that_the_run_goes_on_from():
    """One that was made later holds from there; one that was taken back is none."""
    earlier = [Change(5, "a", "1", "2"), Change(9, "b", "1", "2"), Change(12, "a", "2", "3")]
    assert together(earlier, [Change(9, "b", "2", "1")], 9) == [
        Change(5, "a", "1", "2"),
        Change(9, "a", "2", "3"),
    ]
    assert together(earlier, [], 20) == earlier
