"""Where a result came from: the commit is the package's own or unknown, never that of a checkout around it."""

import json
import re
import subprocess
from datetime import datetime
from pathlib import Path

import pytest

from counterflow.train import provenance as module
from counterflow.train.provenance import commit, provenance


def git(folder: Path, *words: str) -> None:
    settings = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "core.hooksPath=/dev/null")
    subprocess.run(["git", "-C", str(folder), *settings, *words], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A repository with one commit whose counterflow/train/provenance.py the module believes to be."""
    file = tmp_path / "counterflow" / "train" / "provenance.py"
    file.parent.mkdir(parents=True)
    file.write_text("one\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    monkeypatch.setattr(module, "__file__", str(file))
    return tmp_path


def test_facts_are_text_and_say_what_the_numbers_depend_on():
    facts = provenance()
    assert json.loads(json.dumps(facts)) == facts
    assert all(isinstance(value, str) and value for value in facts.values())
    assert {
        "commit",
        "python",
        "torch",
        "numpy",
        "cpu",
        "cores",
        "threads",
        "memory",
        "started",
    } <= facts.keys()
    started = datetime.fromisoformat(facts["started"]).utcoffset()
    assert started is not None and not started


def test_a_clean_checkout_gives_its_commit_and_a_changed_one_says_so(checkout):
    clean = commit()
    assert re.fullmatch("[0-9a-f]{12}", clean)
    (checkout / "notes.txt").write_text("not part of the code\n")
    assert commit() == clean
    (checkout / "counterflow" / "train" / "provenance.py").write_text("two\n")
    assert commit() == clean + "+changes"


def test_a_package_installed_inside_another_checkout_has_no_commit(checkout, monkeypatch):
    inside = checkout / ".venv" / "counterflow" / "train" / "provenance.py"
    inside.parent.mkdir(parents=True)
    inside.write_text("installed\n")
    monkeypatch.setattr(module, "__file__", str(inside))
    assert commit() == "unknown"


def test_without_git_the_commit_is_unknown(monkeypatch, checkout):
    monkeypatch.setenv("PATH", str(checkout))
    assert commit() == "unknown"


def test_outside_a_checkout_the_commit_is_unknown(tmp_path, monkeypatch):
    alone = tmp_path / "counterflow" / "train" / "provenance.py"
    alone.parent.mkdir(parents=True)
    alone.touch()
    monkeypatch.setattr(module, "__file__", str(alone))
    assert commit() == "unknown"
