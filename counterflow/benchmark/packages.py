"""A code corpus from the Python packages of an environment, with whole packages held out.

Files of one package share names, idioms and copied passages, so a split by file lets a model meet in training much of
what it is then asked. Here whole packages are held out, every text is kept once, and a held-out file is dropped where
most of its telling lines stand in the training part: vendored copies go by other names and small edits.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from counterflow.errors import DataError

TELLING = 24
"""Characters from which on a line says where it is from; `return self` stands everywhere."""
NEAR = 0.5
"""Share of a held-out file's telling lines, met in training, from which on it is no new text."""
MIN_BYTES, MAX_BYTES = 200, 1_000_000
"""Smaller files are `__init__`s of a line, larger ones tables of numbers."""


@dataclass
class Split:
    """Texts of training and of the packages held out, and what was left out."""

    train: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    packages: list[str] = field(default_factory=list)
    """Those held out."""
    duplicates: int = 0
    """Files whose very text stood before, in either part."""
    near_duplicates: int = 0
    """Held-out files that training mostly contains."""

    def described(self) -> dict[str, object]:
        """Counts, for a record."""
        return {
            "train_files": len(self.train),
            "train_bytes": sum(map(len, self.train)),
            "held_out_files": len(self.held_out),
            "held_out_bytes": sum(map(len, self.held_out)),
            "held_out_packages": self.packages,
            "duplicates": self.duplicates,
            "near_duplicates": self.near_duplicates,
        }


def split(root: Path, share: float = 0.03, most: float = 1e12) -> Split:
    """The packages in `root` by their names' hashes: those held out have about `share` of the bytes.

    A package with more than half of that share is never held out. Training has `most` bytes at most, of files drawn
    from all its packages.   Fails: DataError without a package on each side.
    """
    files = sorted(_files(root))
    sizes: dict[str, int] = defaultdict(int)
    for name, _, size in files:
        sizes[name] += size
    budget, held = share * sum(sizes.values()), set()
    for name in sorted(sizes, key=lambda each: blake2b(each.encode()).digest()):
        if sizes[name] <= budget / 2 and sum(sizes[each] for each in held) < budget:
            held.add(name)
    if not held or len(held) == len(sizes):
        raise DataError(
            f"{root} has {len(sizes)} packages with .py files; a split needs several: name another folder."
        )
    random.Random(0).shuffle(files)
    return _sorted_out(sorted(files, key=lambda each: each[0] in held), held, most)


def _sorted_out(files: list[tuple[str, Path, int]], held: set[str], most: float) -> Split:
    """Those of training come first, so that all their lines are known when the others are judged."""
    found, seen, lines, taken = Split(packages=sorted(held)), set(), set(), 0
    for name, path, size in files:
        if name not in held and taken + size > most:
            continue
        text = path.read_bytes().decode(errors="ignore")
        digest = blake2b(text.encode(), digest_size=16).digest()
        if digest in seen:
            found.duplicates += 1
            continue
        seen.add(digest)
        mine = {hash(line) for line in map(str.strip, text.split("\n")) if len(line) >= TELLING}
        if name not in held:
            found.train.append(text)
            lines |= mine
            taken += size
        elif len(mine & lines) > NEAR * len(mine):
            found.near_duplicates += 1
        else:
            found.held_out.append(text)
    return found


def _files(root: Path) -> Iterator[tuple[str, Path, int]]:
    """(top-level package, file, bytes) of every .py file that is neither tiny nor a table."""
    for path in root.rglob("*.py"):
        size = path.stat().st_size if path.is_file() else 0
        if MIN_BYTES <= size <= MAX_BYTES:
            yield path.relative_to(root).parts[0], path, size


def write(texts: list[str], path: Path) -> None:
    """Texts as the .jsonl that data.sources reads."""
    with open(path, "w", encoding="utf-8") as out:
        out.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def read(path: Path) -> list[str]:
    """The texts of such a file."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]
