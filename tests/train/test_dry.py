"""A dry run says what a start would do, for every named run, and leaves no trace."""

from pathlib import Path

import pytest

from counterflow.cli import main
from counterflow.config.load import load_run
from counterflow.config.runs import RUNS
from counterflow.data.loader import Samples
from tests.train.runs import overrides, small_run


def tree(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("name", RUNS)
def test_every_named_run_is_described_in_an_empty_place(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("The first line.\nThe second.\n")
    assert main(["train", name, "--dry-run", "data.sources=a.txt"]) == 0
    settings, rest = capsys.readouterr().out.split("\n\n", 1)[0], load_run(name)
    assert f'name = "{name}"' in settings and rest.name == name
    assert list(tree(tmp_path)) == [tmp_path / "a.txt"]


def test_layout_memory_and_how_the_text_begins_are_said(tmp_path, capsys):
    words = overrides(tmp_path, "parallel.pipeline=2", "model.num_layers=3", "train.batch_size=8")
    before = tree(tmp_path)
    assert main(["train", "tiny", "--dry-run", *words]) == 0
    said = capsys.readouterr().out
    assert (
        "12 steps, 3.07 K tokens; a step of 8 sequences of 32 tokens is 4 micro-batches of 2 on each" in said
    )
    assert "  rank 0: embedding, layers 0 to 2; head, MTP 1\n  rank 1: head, MTP 1; embedding" in said
    assert "activations" in said and "the start would learn a tokenizer of 300 ids" in said
    assert "1 files" in said and "  | the " in said and "would be kept in" in said
    assert tree(tmp_path) == before


def test_the_first_sample_is_shown_once_the_text_is_tokenised(tmp_path, capsys):
    run = small_run(tmp_path)
    samples = Samples(run.data, run.model.vocab_size, run.train.seed)
    before, first = tree(tmp_path), samples.tokenizer.decode(samples.train(0, 1)[0].tolist(), specials=True)
    assert main(["train", "tiny", "--dry-run", *overrides(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "The first sample, 33 tokens: " in said and f"  | {first.splitlines()[0]}" in said
    assert tree(tmp_path) == before


def test_what_a_start_would_refuse_is_refused(tmp_path, capsys):
    assert main(["train", "tiny", "--dry-run", *overrides(tmp_path, "keep.resume=must")]) == 2
    assert "keep.resume is 'must'" in capsys.readouterr().err
