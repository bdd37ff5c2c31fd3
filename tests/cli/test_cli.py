"""Help answers in a blink without torch; words become settings one way; mistakes are one line and an exit code."""

import subprocess
import sys
import time

import pytest

from counterflow.cli import VERBS, main
from counterflow.cli.train import split

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    "words", [["--help"], [], ["train", "--help"], ["models"], ["generate", "--help"], ["serve", "--help"]]
)
def test_help_imports_no_torch(words):
    code = f"import sys\nfrom counterflow.cli import main\ntry: main({words})\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("False"), done.stdout + done.stderr


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
        (["nonsense"], "'nonsense' is no verb"),
        (["train", "--train.lr.peek", "1"], "did you mean 'train.lr.peak'?"),
        (["train", "--train.tokens"], "--train.tokens has no value"),
        (["train", "tinny"], "did you mean 'tiny'?"),
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
