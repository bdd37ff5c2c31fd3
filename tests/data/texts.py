"""Small corpora of made-up words for the tests of this folder."""

from pathlib import Path
from random import Random

from counterflow.config.run import Data, Source

WORDS = (
    "ein",
    "paar",
    "Wörter,",
    "that",
    "def f(x):\n",
    "return",
    "12345",
    "+ x\n\n",
    "日本",
    "🙂",
    "(end).\n",
)


def text(seed: int, words: int = 60) -> str:
    """A text of a seed."""
    random = Random(seed)
    return " ".join(random.choice(WORDS) for _ in range(words)) + f" {seed}\n"


def folder(path: Path, documents: int = 60, first: int = 0) -> Path:
    """A folder of texts."""
    path.mkdir(parents=True)
    for seed in range(first, first + documents):
        (path / f"{seed:03d}.txt").write_text(text(seed, 20 + seed % 50), encoding="utf-8", newline="")
    return path


def data(root: Path, *sources: Source, **changes) -> Data:
    """Data over the sources, or over a new folder of texts, with its cache under the root."""
    chosen = sources or (Source(str(folder(root / "texts"))),)
    settings = {"sequence_length": 16, "held_out": 0.2, "cache_dir": str(root / "cache")}
    return Data(sources=chosen, **(settings | changes))
