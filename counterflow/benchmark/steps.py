"""Seconds of whole training steps on random tokens: what the text says does not change how long a step takes."""

import time

import torch

from counterflow.config.run import RunConfig
from counterflow.train.trainer import Trainer


class RandomTokens:
    """Samples of random tokens, in the place of a run's text."""

    def __init__(self, run: RunConfig) -> None:
        self.length, self.vocab = run.data.sequence_length, run.model.vocab_size

    def train(self, index: int, count: int) -> torch.Tensor:
        """(count, length + 1)."""
        generator = torch.Generator().manual_seed(index)
        return torch.randint(self.vocab, (count, self.length + 1), generator=generator)


def seconds_of_steps(trainer: Trainer, warmups: int, steps: int) -> list[float]:
    """Of the steps after the `warmups`, the device having come to the end of each."""
    wait = torch.cuda.synchronize if trainer.device.type == "cuda" else _nothing
    found = []
    for _ in range(warmups + steps):
        wait()
        start = time.perf_counter()
        trainer.step()
        wait()
        found.append(time.perf_counter() - start)
    return found[warmups:]


def _nothing() -> None:
    pass
