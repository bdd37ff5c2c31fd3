"""A run of a few seconds on a small text: its text and its overrides, and how it is stopped."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from counterflow.config.load import load_run
from counterflow.config.run import RunConfig

WORDS = [
    "the",
    "pipeline",
    "is",
    "fed",
    "from",
    "both",
    "ends",
    "and",
    "what",
    "one",
    "waits",
    "for",
    "on",
    "the",
    "wire",
    "the",
    "other",
    "computes",
    "through",
]
MODEL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "dense_intermediate_size": 48,
    "moe_intermediate_size": 16,
}


def write_text(path: Path) -> Path:
    """Some 40 KB of sentences that a model can learn something of."""
    lines = [
        " ".join(WORDS[(start * 7 + step * (1 + start % 3)) % len(WORDS)] for step in range(12)) + ".\n"
        for start in range(600)
    ]
    path.write_text("".join(lines))
    return path


def overrides(folder: Path, *more: str) -> list[str]:
    """Of the run `tiny`: a model of some thousand parameters, 24 steps of 4 × 32 tokens, without page and sample."""
    text = folder / "text.txt"
    if not text.exists():
        write_text(text)
    return [
        *(f"model.{key}={value}" for key, value in MODEL.items()),
        f"data.sources={text}",
        f"data.cache_dir={folder / 'cache'}",
        "data.sequence_length=32",
        "data.held_out=0.1",
        f"keep.folder={folder / 'run'}",
        "keep.checkpoint_every=5",
        "keep.eval_every=10",
        "keep.report=false",
        "train.tokens=3072",
        "train.batch_size=4",
        "parallel.pipeline=1",
        "train.batch_start=0",
        "train.micro_batch_size=2",
        "train.ema_decay=0.9",
        "train.threads=1",
        "train.device=cpu",
        "train.precision=fp32",
        *more,
    ]


def small_run(folder: Path, *more: str) -> RunConfig:
    """The run itself."""
    return load_run("tiny", overrides(folder, *more))


def stop_after(patch: pytest.MonkeyPatch, step: int, how: int | Callable[[], None] = signal.SIGTERM) -> None:
    """Send this process a signal, or do what ends a run, when the step has been made, and not only timed."""
    from counterflow.train.fit import LONG
    from counterflow.train.trainer import Trainer

    plain = Trainer.step

    def counted(self):
        values = plain(self)
        if self.steps == step and self.run.train.tokens < LONG:
            how() if callable(how) else os.kill(os.getpid(), how)
        return values

    patch.setattr(Trainer, "step", counted)
