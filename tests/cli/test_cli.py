"""Help answers in a blink without torch; words become settings one way; mistakes are one line and an exit code."""

import io
import subprocess
import sys
import time
from pathlib import Path

import pytest

from counterflow.cli import VERBS, main
from counterflow.cli.train import split
from counterflow.config.load import to_toml
from counterflow.train import manifest
from counterflow.train.folder import CHECKPOINTS, RUN_TOML, SAMPLE
from counterflow.train.manifest import path_of
from tests.train.runs import overrides, small_run

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    "words", [["--help"], [], ["train", "--help"], ["models"], ["generate", "--help"], ["serve", "--help"]]
)
def test_help_imports_no_torch(words):
    code = f"import sys\nfrom counterflow.cli import main\ntry: main({words})\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("False"), done.stdout + done.stderr


def test_what_is_complete_or_wrong_is_said_without_torch(tmp_path):
    """A finished run, changed settings, a folder, a text, a vocabulary or a model that cannot be: before any import."""
    config, run = small_run(tmp_path), tmp_path / "run"
    for step, sample in ((20, 80), (24, 96)):
        (checkpoint := path_of(run / CHECKPOINTS, step)).mkdir(parents=True)
        (checkpoint / "weights").write_text("weights")
        manifest.write(checkpoint, {"sample": sample}, {})
    (run / RUN_TOML).write_text(to_toml(config))
    (run / SAMPLE).touch()
    (tmp_path / "chat.jsonl").write_text('{"messages": "text"}')
    train, nowhere = ["train", "tiny", *overrides(tmp_path)], str(tmp_path / "nowhere")
    commands = {
        f"{run} is complete (step 24); keep.resume=never trains it anew.": train,
        "train.seed was 0, is 5": [*train, "train.seed=5"],
        "data.fim_rate was 0.1, is 0.0": [*train, "data.fim_rate=0"],
        f"data.sources.0.path was '{tmp_path / 'text.txt'}', is 'a.txt'": [*train, "data.sources=a.txt"],
        "is 'a.txt' and 'b.txt'": [*train, 'data.sources=["a.txt", "b.txt"]'],
        "has no checkpoint and keep.resume is 'must'": [
            *train,
            "keep.resume=must",
            f"keep.folder={nowhere}",
        ],
        "the folder /proc/x cannot be written": [*train, "keep.folder=/proc/x"],
        "source 'gone' is not there": [*train, "data.sources=gone", f"keep.folder={nowhere}"],
        "are not read by name": [*train, "data.sources=owner/Stories", f"keep.folder={nowhere}"],
        "chat.jsonl:1 has no 'text'": [
            *train,
            f"data.sources={tmp_path / 'chat.jsonl'}",
            f"keep.folder={nowhere}",
        ],
        "model.vocab_size is 100": [*train, "model.vocab_size=100", f"keep.folder={nowhere}"],
        "needs 13.": ["train", "v3-671b", "train.device=cpu", f"keep.folder={nowhere}"],
        f"{nowhere} is no run": ["generate", "--run", nowhere],
        "known there: run": ["serve", "--run", nowhere],
        "is no run and no exported model": ["export", nowhere, f"{nowhere}2"],
        "nowhere has no config.json": ["import", nowhere, f"{nowhere}2"],
        "--run is missing": ["evaluate", "perplexity", "x"],
        "--performer is missing": ["evaluate", "binoculars", "x", "--observer", str(run)],
    }
    code = f"""
import sys
from counterflow.cli import main
for words in {list(commands.values())}:
    print(main(words), flush=True)
print('torch' in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, errors = done.stdout.splitlines(), done.stderr.splitlines()
    assert said[1:] == ["0", *["2"] * (len(commands) - 1), "False"]
    for expected, line in zip(commands, [said[0], *errors], strict=True):
        assert expected in line
    assert not (tmp_path / "nowhere").exists()


def test_help_answers_in_under_a_second():
    """The best of three, since a busy machine is not the command's fault."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "counterflow", "--help"], capture_output=True, text=True, check=True
        )
        times.append(time.perf_counter() - start)
    assert min(times) < 1.0
    assert all(verb in done.stdout for verb in VERBS)


def test_flags_overrides_and_names_are_read_one_way():
    assert split([]) == ("tiny", [], False)
    assert split(["small", "--train.tokens", "5", "a.b=c", "--x=y"]) == (
        "small",
        ["train.tokens=5", "a.b=c", "x=y"],
        False,
    )
    assert split(["--model", "v3-16b", "-h"]) == ("tiny", ["model=v3-16b"], True)


def test_train_help_lists_settings_with_their_meaning(capsys):
    assert main(["train", "small", "--help"]) == 0
    out = capsys.readouterr().out
    for word in (
        "counterflow train",
        "train.lr.peak",
        "data.fim-rate",
        "prefix, suffix, middle",
        "model.num-layers",
    ):
        assert word.replace("-", "_") in out or word in out, word


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nonsense"], "unknown command 'nonsense'"),
        (["train", "--train.lr.peek", "1"], "did you mean 'train.lr.peak'?"),
        (["train", "--train.tokens"], "--train.tokens has no value"),
        (["train", "tinny"], "did you mean 'tiny'?"),
        (["train", "parallel.dispatch_fp8=true"], "no token is sent to an expert then: leave the first out"),
        (["where"], 'name an item of the report, such as "eq 16"'),
        (["where", "eq 99"], "no item of the report in the code is called 'eq 99'"),
        (
            ["train", "train.lr.warmup=0.9"],
            "train.lr's phases end at 0.9, 0.676, 0.966, 0.9887; they must rise",
        ),
        (["train", "nowhere.toml"], "cannot be read"),
        (["train", "tiny", "model.num_heads=none"], "must be a whole number"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(words, says, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("counterflow: ") and error.count("\n") == 1


def test_models_prints_the_published_counts(capsys):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "671.03 B" in out and "36.63 B" in out and "15.71 B" in out


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("ascii", ["schedule", "dualpipe", "--ranks=4"]),
        ("latin-1", ["train", "--help"]),
        ("ascii", ["plan", "tiny", "--gpus=1"]),
    ],
)
def test_a_terminal_without_a_character_gets_another(monkeypatch, encoding, words):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding, write_through=True))
    assert main(words) == 0
    assert "?" in out.getvalue().decode(encoding)


def test_a_byte_order_mark_is_no_part_of_any_file_that_is_read(tmp_path, capsys):
    """As spreadsheets and editors write it: a schedule as text and as a table, and loads of experts."""
    schedule = ["schedule", "1f1b", "--ranks=2", "--microbatches=4"]
    assert main([*schedule, "--text"]) == 0
    (tmp_path / "s.txt").write_text(capsys.readouterr().out, encoding="utf-8")
    assert main([*schedule, "--csv", str(tmp_path / "s.csv")]) == 0
    (tmp_path / "loads.json").write_text("[4, 1, 1, 2]")
    for words in (
        ["schedule", str(tmp_path / "s.txt")],
        ["schedule", str(tmp_path / "s.csv")],
        ["plan", "--place", str(tmp_path / "loads.json"), "--gpus=2", "--slots=6"],
    ):
        capsys.readouterr()
        assert main(words) == 0
        plain, path = capsys.readouterr().out, next(Path(word) for word in words if word.startswith("/"))
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert main(words) == 0 and capsys.readouterr().out == plain


@pytest.mark.parametrize("content", ["[" * 5000, "9" * 5000])
def test_deep_nesting_and_huge_numbers_are_one_line(tmp_path, capsys, content):
    for name, words in (
        ("loads.json", ["plan", "--place"]),
        ("run.toml", ["train"]),
        ("hardware.toml", ["plan", "tiny", "--gpus=1", "--hardware"]),
    ):
        (tmp_path / name).write_text(f"a = {content}" if name.endswith("toml") else content)
        assert main([*words, str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
