"""The example of docs/SCHEDULES.md, taken from the page: checked, drawn, trained with, as text and as a function."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from counterflow.benchmark.equality import Layout, compare, small_model
from counterflow.cli import main
from counterflow.errors import ScheduleError
from counterflow.schedule.check import check
from counterflow.schedule.named import checked, made
from counterflow.schedule.text import from_text
from tests.train.runs import overrides

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "SCHEDULES.md").read_text()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With gpipe.txt and gpipe.py as the page has them."""
    (tmp_path / "gpipe.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.S)[1])
    (tmp_path / "gpipe.txt").write_text(re.search(r"```\n(gpipe, 2 stages\n.*?)```", PAGE, re.S)[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_text_and_function_are_the_same_sound_schedule_of_equal_gradients(folder):
    text = check(from_text((folder / "gpipe.txt").read_text()))
    assert text == made("gpipe:gpipe", 2, 4)
    for name in ("gpipe.txt", "gpipe:gpipe"):
        assert compare(Layout(name, 2, 4), small_model(2, 1))["exact"] == 0.0


def test_the_pages_error_is_what_one_sees(folder):
    broken = (folder / "gpipe.txt").read_text().replace("1: F0 F1 F2 F3 B0 ", "1: F0 F1 F2 F3 ")
    with pytest.raises(ScheduleError) as raised:
        check(from_text(broken))
    assert f"counterflow: {raised.value}" in PAGE


@pytest.mark.parametrize("name", ["gpipe.txt", "gpipe:gpipe"])
def test_it_is_planned_with(folder, capsys, name):
    """Its bubble is simulated, as no formula is known; other numbers than a file's are refused."""
    words = ("plan", "tiny", "train.batch_size=16", "--gpus", "2", "--pipeline", "2", "--schedule", name)
    assert main([*words, "--micro-batch", "4", "--launch", "launch"]) == 0
    assert f"PP2 EP1 DP1 mb4 {name}" in capsys.readouterr().out
    assert f'schedule = "{name}"' in (folder / "launch" / "run.toml").read_text()
    assert main(["train", "launch/run.toml", "--dry-run"]) == 0
    assert f"{name} over 2 pipeline ranks, which hold:" in capsys.readouterr().out
    assert main([*words, "--micro-batch", "2"]) == (2 if name == "gpipe.txt" else 0)


@pytest.mark.parametrize("name", ["gpipe.txt", "gpipe:gpipe"])
def test_a_name_that_is_another_schedule_by_now_is_looked_up_anew(folder, name):
    assert checked(name, 2, 4).name == "gpipe"
    (folder / "gpipe.txt").write_text((folder / "gpipe.txt").read_text().replace("gpipe", "other"))
    assert checked(name, 2, 4).name == ("other" if name == "gpipe.txt" else "gpipe")
    assert checked("1f1b", 2, 4) is checked("1f1b", 2, 4), "made once"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpipe.txt", "gpipe:gpipe"])
def test_it_trains_and_is_drawn(folder, name):
    words = overrides(folder, "parallel.pipeline=2", f"parallel.schedule={name}", "train.micro_batch_size=1")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"}

    def counterflow(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "counterflow", *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "Trained 24 steps" in counterflow("train", "tiny", *words)
    assert "gpipe" in counterflow(
        "schedule", name, "--ranks", "2", "--microbatches", "4", "--svg", "gpipe.svg"
    )
    assert (folder / "gpipe.svg").read_text().startswith("<svg")
