"""The tables of schedules and of dispatch backends: a file and a row add one, nothing asks for one by name."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from counterflow.config.backends import BACKENDS
from counterflow.schedule import SCHEDULES
from counterflow.schedule.method import Method
from tests.train.runs import overrides

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "counterflow"
HOMES = dict.fromkeys(SCHEDULES, "schedule/__init__.py") | dict.fromkeys(BACKENDS, "config/backends.py")
"""Where a row is."""
CHOICES: Mapping[str, tuple[str, ...]] = {
    "config/run.py": ("dualpipe", "collective"),
    "plan/published.py": ("dualpipe", "interleaved-1f1b"),
    "benchmark/pair.py": ("nvlink",),
    "benchmark/rates.py": ("nvlink",),
    "benchmark/several_parts.py": ("dualpipe", "dualpipev", "zb1p", "1f1b", "nvlink", "collective"),
}
"""Files that choose a row by name and ask nothing: a setting's default, a published run, what a benchmark shows; in
rates a link's efficiency has a backend's name."""
WORDS = ("local", "collective")
"""Names that are words as well: looked for as whole strings."""
NAMED = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, HOMES.keys() - set(WORDS)))})(?![\w-])")


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every string of a file that is no docstring."""
    tree = ast.parse(path.read_text())
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.lineno, node.value


def named(text: str) -> set[str]:
    """The rows that a string names."""
    return {text} if text in WORDS else set(NAMED.findall(text))


def own_file(name: str) -> str:
    """The file of a row's rule or backend."""
    module = BACKENDS[name].opens.split(":")[0] if name in BACKENDS else SCHEDULES[name].rule.__module__
    return module.removeprefix("counterflow.").replace(".", "/") + ".py"


@pytest.mark.pure
def test_no_rows_name_stands_outside_its_row():
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        file = str(path.relative_to(PACKAGE))
        for line, text in strings(path):
            for name in named(text):
                if file not in (HOMES[name], own_file(name)):
                    found.setdefault(file, set()).add(name)
                    assert name in CHOICES.get(file, ()), (
                        f"counterflow/{file}:{line} names {name}; ask its row's columns, or, where it is chosen and "
                        "nothing else follows from its name, list the file in tests/test_tables.py"
                    )
    assert found == {file: set(names) for file, names in CHOICES.items()}, "the list names what is there"


@pytest.mark.pure
def test_a_name_in_a_string_is_found(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        '"""dualpipe"""\nif name == "dualpipe" or f"take zb1p, {name}" or "interleaved-1f1b":\n    ...\n'
    )
    assert set().union(*(named(text) for _, text in strings(path))) == {
        "dualpipe",
        "zb1p",
        "interleaved-1f1b",
    }


@pytest.mark.pure
def test_a_row_with_nothing_but_its_rule_says_nothing_else():
    """As a schedule of the user's own has it: the rule is asked, the bubble simulated."""
    row = Method(SCHEDULES["1f1b"].rule)
    assert row.allowed(4).start == row.allowed(4).step == 1 and row.microbatches is None
    assert row.bubble is None and row.activations is None
    assert row(2, 4) == SCHEDULES["1f1b"](2, 4)


SCHEDULE = """
from counterflow.schedule.words import Chunk, Kind, Schedule, StageId


def gpipe(ranks, microbatches, stages_per_rank=None):
    kinds = [(kind, mb) for kind in (Kind.F, Kind.B) for mb in range(microbatches)]
    rows = [tuple((Chunk(kind, StageId(0, rank), mb),) for kind, mb in kinds) for rank in range(ranks)]
    return Schedule("gpipe", ranks, tuple(rows))
"""
BACKEND = """
from counterflow.comm.hop import Hop
from counterflow.comm.relay import Relay


def flat(peers, terms):
    return Relay([Hop(peers.whole, terms.experts // peers.whole.size, terms.fp8)])
"""
USED = """
import sys
from counterflow.benchmark import equality, equality_experts
from counterflow.cli import main
from counterflow.schedule import SCHEDULES
from counterflow.schedule.check import check
from counterflow.schedule.text import from_text, to_text

one = check(SCHEDULES["gpipe"](2, 4))
assert from_text(to_text(one)) == one
assert equality.compare(equality.Layout("gpipe", 2, 4), equality.small_model(2, 1))["exact"] == 0.0
both = equality.Layout("gpipe", 2, 4, 2, expert=2, dispatch="flat")
assert equality_experts.compare(both, equality.small_model(2, 1).double()) < equality_experts.BOUND
for words in (
    ["schedule", "gpipe", "1f1b", "--ranks", "4"],
    ["schedule", "gpipe", "--ranks", "2", "--microbatches", "4"],
    ["plan", "tiny", "--gpus", "4"],
    ["plan", "tiny", "parallel.dispatch=flat", "--gpus", "4", "--schedule", "gpipe", "--expert", "2", "--launch", "it"],
    ["train", "it/run.toml", "--dry-run"],
    ["train", "tiny", *sys.argv[1:]],
):
    assert main(words) == 0, words
"""


@pytest.fixture
def package(tmp_path):
    """A folder with a copy of the package in which CONTRIBUTING's word was followed."""
    copy = tmp_path / "counterflow"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "schedule" / "gpipe.py").write_text(SCHEDULE)
    (copy / "comm" / "flat.py").write_text(BACKEND)
    table = copy / "schedule" / "__init__.py"
    table.write_text(table.read_text().replace("schedule import dual", "schedule import dual, gpipe", 1))
    add_row(table, '"gpipe": Method(gpipe.gpipe),')
    add_row(copy / "config" / "backends.py", '"flat": Backend("counterflow.comm.flat:flat"),')
    return tmp_path


def add_row(file: Path, row: str) -> None:
    """A row at the head of a file's table."""
    head = re.compile(r"^[A-Z]+: Mapping\[.*\] = {$", re.M)
    text, found = head.subn(lambda match: f"{match[0]}\n    {row}", file.read_text())
    assert found == 1
    file.write_text(text)


@pytest.mark.slow
def test_a_file_and_a_row_add_a_schedule_and_a_backend(package):
    """They are shown, planned and trained with, and equal to the plain loop."""
    ranks = ("parallel.pipeline=2", "parallel.data=2", "parallel.expert=2")
    rows = ("parallel.schedule=gpipe", "parallel.dispatch=flat")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            USED,
            *overrides(package, *ranks, *rows, "train.micro_batch_size=1", "train.steps=2"),
        ],
        cwd=package,
        env=os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Trained 2 steps" in done.stdout
