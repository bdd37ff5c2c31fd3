"""A run killed at random moments and resumed, held against the same run left alone: tensors and metrics.

    python bench/kills.py 20 tiny train.tokens=2e5 keep.checkpoint_every=2

Each SIGKILL comes within `WITHIN_S` of the line that introduces the run or goes on with it; after each, every
checkpoint that is there must load. Prints one line of JSON a kill, and one of the comparison, which is exact on a CPU.
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from counterflow.train.checkpoint import WRITING, Checkpoints
from counterflow.train.folder import CHECKPOINTS
from counterflow.train.metrics import read

WITHIN_S = 4.0
MEASURED = ("_s", "seconds", "_bytes")
"""Ends of the names of metrics that no two runs share."""


def main(kills: int, words: list[str]) -> None:
    """Train once undisturbed, once killed so often, and compare."""
    with tempfile.TemporaryDirectory() as place:
        whole, killed = Path(place) / "whole", Path(place) / "killed"
        subprocess.run(command(words, whole), check=True, stdout=subprocess.DEVNULL)
        dice = random.Random(time.time_ns())
        for number in range(1, kills + 1):
            kill(command(words, killed), dice.uniform(0.0, WITHIN_S))
            kept = Checkpoints(killed / CHECKPOINTS, 9)
            for step in kept.steps():
                kept.verify(step)
            writing = bool(list(kept.folder.glob("*" + WRITING)))
            print(
                json.dumps({"kill": number, "checkpoints": kept.steps(), "while writing": writing}),
                flush=True,
            )
        subprocess.run(command(words, killed), check=True, stdout=subprocess.DEVNULL)
        mine, theirs = final_state(killed), final_state(whole)
        different = [
            name for name in mine.keys() | theirs.keys() if not same(mine.get(name), theirs.get(name))
        ]
        metrics = timeless(killed) == timeless(whole)
        print(json.dumps({"tensors": len(theirs), "different": different, "metrics are the same": metrics}))


def command(words: list[str], folder: Path) -> list[str]:
    """The run of these words in a folder of its own."""
    return [sys.executable, "-m", "counterflow", "train", *words, f"keep.folder={folder}"]


def kill(words: list[str], after_s: float) -> None:
    """Start a run, and end it so long after it has introduced itself."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None, "asked for"
        while " parameters in " not in (line := process.stdout.readline()):
            assert line, "the run ended before it trained"
        time.sleep(after_s)
        process.kill()
    assert process.returncode == -signal.SIGKILL, (
        "the run ended before it could be killed: give it more tokens"
    )


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint."""
    kept = Checkpoints(folder / CHECKPOINTS, 9)
    step = kept.steps()[-1]
    metadata: Any = dcp.FileSystemReader(str(kept.path(step))).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in metadata.items()}
    kept.load(step, tensors)
    return tensors


def same(mine: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    """Whether both are there and equal bit for bit."""
    return mine is not None and theirs is not None and torch.equal(mine, theirs)


def timeless(folder: Path) -> list[dict[str, Any]]:
    """What a run has measured but for times and memory."""
    return [{key: each for key, each in row.items() if not key.endswith(MEASURED)} for row in read(folder)]


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
