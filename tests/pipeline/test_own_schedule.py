"""The example of docs/SCHEDULES.md, taken from the page: checked, drawn, trained with, as text and as a function."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from counterflow.benchmark.equality import Layout, compare, small_model
from counterflow.errors import ScheduleError
from counterflow.plan.layout import imported
from counterflow.schedule.check import check
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
    assert text == imported("gpipe:gpipe", 2, 4)
    for name in ("gpipe.txt", "gpipe:gpipe"):
        assert compare(Layout(name, 2, 4), small_model(2, 1))["exact"] == 0.0


def test_the_pages_error_is_what_one_sees(folder):
    broken = (folder / "gpipe.txt").read_text().replace("1: F0 F1 F2 F3 B0 ", "1: F0 F1 F2 F3 ")
    with pytest.raises(ScheduleError) as raised:
        check(from_text(broken))
    assert f"counterflow: {raised.value}" in PAGE


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
