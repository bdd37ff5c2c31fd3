"""Whole packages are held out, and nothing of theirs is trained on under another name."""

import pytest

from counterflow.benchmark.packages import read, split, write
from counterflow.errors import DataError


def source(seed: int, lines: int = 12) -> str:
    """Lines that are this seed's alone."""
    return "".join(f"def function_{seed}_{line}(argument):  # of seed {seed}\n" for line in range(lines))


def environment(root, packages: int = 12):
    """Packages of three files of their own, one that is the same in all, and one too small to count."""
    for number in range(packages):
        folder = root / f"package{number:02d}"
        folder.mkdir(parents=True)
        for file in range(3):
            (folder / f"{file}.py").write_text(source(number * 3 + file))
        (folder / "same.py").write_text(source(-1))
        (folder / "tiny.py").write_text("x = 1\n")
    return root


def test_a_package_is_on_one_side_and_every_text_once(tmp_path):
    parts = split(environment(tmp_path), share=0.3)
    assert 0 < len(parts.packages) < 6 and parts.duplicates == 11
    held = {source(int(name[-2:]) * 3 + file) for name in parts.packages for file in range(3)}
    assert held == set(parts.held_out)
    assert len(parts.train) == (12 - len(parts.packages)) * 3 + 1 and not held & set(parts.train)


def test_vendored_copies_with_edits_are_no_held_out_text(tmp_path):
    """One package, too large to be held out, has an edited copy of the first file of every other."""
    root = environment(tmp_path)
    (root / "huge").mkdir()
    for number in range(12):
        (root / "huge" / f"{number}.py").write_text("# vendored here\n" + source(number * 3))
    (root / "huge" / "pad.py").write_text(source(1000, lines=400))
    parts = split(root, share=0.3)
    assert parts.packages and "huge" not in parts.packages
    assert parts.near_duplicates == len(parts.packages)
    assert len(parts.held_out) == 2 * len(parts.packages)


def test_the_bytes_of_training_are_bounded_and_texts_come_back(tmp_path):
    parts = split(environment(tmp_path / "root"), share=0.3, most=3000)
    assert 0 < sum(map(len, parts.train)) <= 3000
    write(parts.held_out, tmp_path / "held.jsonl")
    assert read(tmp_path / "held.jsonl") == parts.held_out
    assert parts.described()["held_out_files"] == len(parts.held_out)


def test_a_folder_of_one_package_cannot_be_split(tmp_path):
    with pytest.raises(DataError, match="1 packages"):
        split(environment(tmp_path, packages=1))
