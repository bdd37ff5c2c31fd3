"""A run through the command line: whole, resumed, stopped, killed, and refused with one clear line."""

import errno
import os
import signal
import sys
import time
from pathlib import Path
from subprocess import PIPE, STDOUT

import pytest
import torch

from counterflow.cli import main
from counterflow.errors import ConfigError
from counterflow.train import begin
from counterflow.train.checkpoint import Checkpoints
from counterflow.train.folder import CHECKPOINTS, run_config
from counterflow.train.manifest import MANIFEST
from counterflow.train.metrics import read
from tests import processes
from tests.train.runs import overrides, small_run, stop_after, write_text


def counterflow(folder: Path, *more: str) -> int:
    return main(["train", "tiny", *overrides(folder, *more)])


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    import torch.distributed.checkpoint as dcp

    kept = Checkpoints(folder / "run" / CHECKPOINTS, 9)
    path = kept.path(kept.steps()[-1])
    metadata = dcp.FileSystemReader(str(path)).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in metadata.items()}
    kept.load(kept.steps()[-1], tensors)
    return tensors


def different(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return [
        name
        for name in a.keys() | b.keys()
        if name not in a or name not in b or not torch.equal(a[name], b[name])
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert counterflow(folder, "keep.report=true") == 0
    return folder


def test_a_run_leaves_all_that_it_promises(whole, capsys):
    run = whole / "run"
    for name in (
        "run.toml",
        "provenance.json",
        "tokenizer.json",
        "metrics.jsonl",
        "report.html",
        "picture.png",
        "sample.txt",
    ):
        assert (run / name).stat().st_size > 0, name
    steps = read(run)
    assert [step["step"] for step in steps] == list(range(1, 25))
    assert steps[0]["lr"] == 3e-3, (
        "the first step trains, at the rate of its end: the warm-up is shorter than it"
    )
    assert steps[-1]["held_out_bpb"] > 0 and steps[9]["held_out_bpb"] > 0 and "held_out_bpb" not in steps[0]
    assert (
        main(
            [
                "generate",
                "--run",
                str(run),
                "--prompt",
                "the pipeline",
                "--max-tokens",
                "5",
                "--temperature",
                "0",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.startswith("the pipeline")
    assert main(["generate", "--run", str(run), "--averaged", "--max-tokens", "3"]) == 0


def test_drafts_change_no_text_and_stats_tell_what_they_brought(whole, capsys):
    words = [
        "generate",
        "--run",
        str(whole / "run"),
        "--prompt",
        "the",
        "--max-tokens",
        "40",
        "--temperature",
        "0",
    ]
    texts = []
    for drafts in ("-1", "0", "3"):
        assert main([*words, "--drafts", drafts, "--stats"]) == 0
        said = capsys.readouterr()
        texts.append(said.out)
        assert "(after 2 of prompt)" in said.err and "(39 in " in said.err
        assert ("Drafted tokens that were kept" in said.err) == (drafts != "0")
    assert len(set(texts)) == 1
    assert main([*words, "--drafts", "-2"]) == 2 and "drafts is -2" in capsys.readouterr().err
    assert main([*words, "--device", "tpu"]) == 2 and "device is 'tpu'" in capsys.readouterr().err


def test_a_complete_run_says_so_and_trains_no_more(whole, capsys):
    """In any layout, though others would have taken other batches."""
    before = (whole / "run" / "metrics.jsonl").read_text()
    for layout in (
        (),
        ("parallel.data=2", "train.batch_size=8"),
        ("parallel.pipeline=2", "train.batch_size=12"),
    ):
        assert counterflow(whole, *layout) == 0
        assert "is complete (step 24)" in capsys.readouterr().out
    assert (whole / "run" / "metrics.jsonl").read_text() == before


def started(folder: Path, *more: str) -> processes.Popen:
    """The same command in a process of its own, which has said what it is about to train."""
    write_text(folder / "text.txt")
    words = [sys.executable, "-m", "counterflow", "train", "tiny", *overrides(folder, *more)]
    process = processes.Popen(words, stdout=PIPE, stderr=STDOUT, text=True)
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if " parameters in " in line:
            return process
    raise AssertionError(said)


def reach(folder: Path, step: int) -> None:
    """Wait until a run has measured so many steps."""
    deadline = time.monotonic() + 120
    while len(read(folder / "run")) < step:
        assert time.monotonic() < deadline, f"step {step} does not come"
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU])
def test_what_a_scheduler_or_a_lost_terminal_sends_saves_as_sigterm_does(tmp_path, number, capsys):
    write_text(tmp_path / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2, number)
        assert counterflow(tmp_path) == 128 + number
    assert "Stopped at step 2 and saved" in capsys.readouterr().out
    assert Checkpoints(tmp_path / "run" / CHECKPOINTS, 9).steps() == [2]


def test_a_pipe_whose_reader_has_gone_saves_too(tmp_path, monkeypatch):
    """As behind `| head -1`; what is said later goes nowhere, and leaves no error at the end."""
    write_text(tmp_path / "text.txt")
    reader, writer = os.pipe()
    monkeypatch.setattr("counterflow.progress.FIRST_AFTER_S", 0.0)
    monkeypatch.setattr("counterflow.progress.EVERY_S", 0.0)
    with os.fdopen(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        stop_after(monkeypatch, 2, lambda: os.close(reader))
        assert counterflow(tmp_path) == 128 + signal.SIGPIPE
    assert Checkpoints(tmp_path / "run" / CHECKPOINTS, 9).steps() == [2]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_stop(tmp_path, number):
    process = started(tmp_path, "train.tokens=1e6", "keep.checkpoint_every=100000")
    reach(tmp_path, 2)
    process.send_signal(number)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number
    assert "the same command goes on from here" in rest
    assert len(Checkpoints(tmp_path / "run" / CHECKPOINTS, 1).steps()) == 1


def test_other_settings_in_the_same_folder_are_refused(whole, capsys):
    for setting, said in (
        ("model.num_layers=3", "model.num_layers was 2, is 3"),
        ("train.seed=1", "train.seed was 0, is 1"),
        ("data.sequence_length=16", "data.sequence_length was 32, is 16"),
        ("data.fim_rate=0.5", "data.fim_rate was 0.1, is 0.5"),
        ("data.tokenizer=other.json", "data.tokenizer was 'train', is 'other.json'"),
        ("train.minutes=9", "train.minutes was 0.0, is 9.0. Give another length as train.tokens=..."),
    ):
        assert counterflow(whole, setting) == 2
        error = capsys.readouterr().err
        assert said in error and "keep.resume=never" in error


def test_never_moves_the_earlier_run_aside(tmp_path):
    assert counterflow(tmp_path, "train.tokens=128") == 0
    assert counterflow(tmp_path, "train.tokens=256", "keep.resume=never") == 0
    assert len(list(tmp_path.glob("run*/run.toml"))) == 2


def test_must_resume_fails_without_a_checkpoint(tmp_path, capsys):
    assert counterflow(tmp_path, "keep.resume=must") == 2
    assert "has no checkpoint" in capsys.readouterr().err


def test_a_truncated_newest_checkpoint_is_passed_over_and_the_result_is_the_same(whole, tmp_path, capsys):
    write_text(tmp_path / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 12)
        assert counterflow(tmp_path) == 128 + signal.SIGTERM
    kept = Checkpoints(tmp_path / "run" / CHECKPOINTS, 9)
    assert kept.steps() == [10, 12]
    data = next(kept.path(12).glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])
    assert counterflow(tmp_path) == 0
    assert "is truncated" in capsys.readouterr().err
    assert different(final_state(tmp_path), final_state(whole)) == []


def test_other_text_under_the_same_settings_is_refused(tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        assert counterflow(tmp_path) == 128 + signal.SIGTERM
    with (tmp_path / "text.txt").open("a") as file:
        file.write("Something else.\n" * 50)
    assert counterflow(tmp_path) == 2
    assert "was trained on other text" in capsys.readouterr().err


def test_no_run_and_no_checkpoint_are_said(tmp_path, capsys):
    assert main(["generate", "--run", str(tmp_path / "nowhere")]) == 2
    assert "is no run" in capsys.readouterr().err
    assert main(["train", "tinny"]) == 2
    assert "did you mean 'tiny'?" in capsys.readouterr().err
    assert main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_a_first_try_that_failed_does_not_stand_in_the_way(tmp_path, capsys):
    assert counterflow(tmp_path, "data.sources=nowhere") == 2
    assert "source 'nowhere' is not there" in capsys.readouterr().err
    assert counterflow(tmp_path, "train.tokens=128") == 0


def test_a_run_that_diverges_exits_with_3_and_leaves_its_page(tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        from counterflow.train.trainer import Trainer

        plain = Trainer.step

        def spoilt(self):
            if self.steps == 6:
                dict(self.optimizer.masters())["head"].value.fill_(float("nan"))
            return plain(self)

        patch.setattr(Trainer, "step", spoilt)
        assert counterflow(tmp_path, "keep.report=true") == 3
    assert "step 7: weight 'head' is not finite" in capsys.readouterr().err
    assert Checkpoints(tmp_path / "run" / CHECKPOINTS, 9).steps() == [5]
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_run_bounded_in_minutes_stopped_and_resumed_is_the_unbounded_one(whole, tmp_path, capsys):
    """Timing leaves no trace: bit for bit, also with given weights' averages, and no second timing at resuming."""
    bounded = ("train.minutes=9", "train.tokens=3072")
    write_text(tmp_path / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 7)
        assert counterflow(tmp_path, *bounded) == 128 + signal.SIGTERM
    assert "tokens/s here: training 3,072 tokens in 24 steps" in capsys.readouterr().out
    assert counterflow(tmp_path, "train.minutes=8", "train.tokens=3072") == 2
    assert "train.minutes was 9.0, is 8.0" in capsys.readouterr().err
    (Checkpoints(tmp_path / "run" / CHECKPOINTS, 9).path(7) / MANIFEST).write_text("{")
    assert counterflow(tmp_path, *bounded) == 0
    said = capsys.readouterr()
    assert "is corrupt" in said.err and "from step 5;" in said.out and "tokens/s here" not in said.out
    assert different(final_state(tmp_path), final_state(whole)) == []
    assert run_config(tmp_path / "run").train.tokens == 3072 and counterflow(tmp_path) == 0
    assert "is complete" in capsys.readouterr().out


def test_minutes_become_whole_steps(tmp_path):
    """A second and a half, of which timing takes its part, whatever the machine."""
    assert counterflow(tmp_path, "train.tokens=0", "train.minutes=0.025", "keep.eval_every=1000") == 0
    steps, kept = read(tmp_path / "run"), run_config(tmp_path / "run").train
    assert steps[-1]["tokens"] == kept.tokens == 4 * 32 * len(steps) and kept.minutes == 0
    assert steps[-1]["lr"] < 0.1 * max(step["lr"] for step in steps) or len(steps) < 30, (
        "shapes follow the length"
    )


def test_a_length_in_steps_is_decided_once_and_other_layouts_go_on_with_it(tmp_path):
    """A batch that grows does so in other steps where batches are multiples of other numbers."""
    ramp = ("train.steps=7", "train.batch_size=8", "train.batch_start=4", "train.batch_ramp_until=1")
    write_text(tmp_path / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        assert counterflow(tmp_path, *ramp) == 128 + signal.SIGTERM
    tokens = run_config(tmp_path / "run").train.tokens
    other = small_run(tmp_path, *ramp, "parallel.data=2")
    assert begin.continued(other, tmp_path / "run", 0).train.tokens != tokens
    assert not begin.is_complete(other)
    assert begin.continued(other, tmp_path / "run", 1).train.tokens == tokens


def test_patience_ends_a_run_which_is_then_complete_until_it_has_more(tmp_path, capsys):
    still = ("train.lr.peak=1e-30", "train.bias_speed=0", "keep.eval_every=1", "train.steps=9")
    write_text(tmp_path / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        assert counterflow(tmp_path, *still, "train.patience=3") == 128 + signal.SIGTERM
        assert counterflow(tmp_path, *still, "train.patience=3") == 0
    assert "stopped early: the last 3 held-out losses were no better" in capsys.readouterr().out
    assert [step["step"] for step in read(tmp_path / "run")] == [1, 2, 3, 4]
    assert counterflow(tmp_path, *still, "train.patience=3") == 0
    assert "is complete (step 4)" in capsys.readouterr().out
    assert counterflow(tmp_path, *still) == 0
    assert len(read(tmp_path / "run")) == 9


def test_what_a_killed_save_left_goes_before_the_next_one(tmp_path):
    """A disk that holds no more than is kept has no room beside it."""
    left = [
        tmp_path / "run" / CHECKPOINTS / name for name in ("step-00000013.writing", "step-00000005.removing")
    ]
    for folder in left:
        folder.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("counterflow.train.loop.begin", lambda run, folder: None)
        assert counterflow(tmp_path) == 0
    assert not any(folder.exists() for folder in left)


def test_a_folder_below_one_that_is_not_ours_is_locked_inside(tmp_path, monkeypatch, capsys):
    folder, plain = tmp_path / "run", os.open

    def refused(path, flags, *rest, **more):
        if Path(path).parent == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return plain(path, flags, *rest, **more)

    monkeypatch.setattr("counterflow.train.begin.os.open", refused)
    with (
        begin.locked(folder),
        pytest.raises(ConfigError, match="another process is training"),
        begin.locked(folder),
    ):
        raise AssertionError("locked twice")
    with begin.locked(folder):
        assert (folder / ".lock").is_file()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_once_and_trained_on(tmp_path, monkeypatch, capsys, number):
    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", none)
    with begin.locked(tmp_path / "run", quiet=True), begin.locked(tmp_path / "run"):
        pass
    error = capsys.readouterr().err
    assert error.count("has no locks") == 1 and os.strerror(number) in error
