"""A length that fits the machine: a few steps are timed before the first one, and leave no trace.

What five minutes can train differs by a factor of ten between machines, and all that changes over a run is a function
of its share done; so a bound in minutes becomes tokens once, before step 0, and the run is from there on the one that
was given those tokens. Not taken: a clock looked at during the run, which would make rate, λ and γ follow the machine's
load and no run the same twice. A machine that gets slower later therefore takes longer; the bar says how long, and
Ctrl-C saves what there is.
"""

import sys
import time
from dataclasses import replace
from statistics import median
from typing import NamedTuple

from counterflow.config.run import Train
from counterflow.progress import Progress, say
from counterflow.train import lr
from counterflow.train.trainer import Trainer
from counterflow.units import seconds

FEWEST, MOST = 4, 20
"""Steps that are timed; the first half of them, which pays for memory and kernels, does not count."""
ENOUGH_S = 4.0
"""Seconds of steps after which no more than the fewest are timed."""
RESERVED = 0.03
"""Of the time, for checkpoints and for steps that take longer than the timed ones."""
LONG = 1e15
"""Tokens of the run that the timed steps belong to: so many that the rate is next to nothing at its start."""


class Pace(NamedTuple):
    """Seconds of what a run does again and again."""

    step: float
    held_out: float
    """Of one sample."""


def fit(trainer: Trainer) -> None:
    """Give a run with `train.minutes` as many tokens as fit, or fewer if it asks for fewer, and say so in one line.

    A collective: every rank takes part in the steps, the first one's clock decides.
    """
    start, asked, mesh = time.perf_counter(), trainer.run.train, trainer.mesh
    pace = timed(trainer)
    spent = time.perf_counter() - start

    def decide() -> tuple[Train, str]:
        steps = affordable(trainer, asked.minutes * 60 - spent, pace)
        fewest = replace(asked, steps=steps, minutes=0.0)
        train = lr.in_tokens(fewest, trainer.run.data.sequence_length)
        return train, described(trainer, train, pace)

    train, line = mesh.first_does(decide)
    trainer.set_length(train)
    if mesh.first:
        say(line)


def timed(trainer: Trainer) -> Pace:
    """The median seconds of real steps and of held-out samples; the trainer is as it was before, bit for bit."""
    asked, mesh = trainer.run.train, trainer.mesh
    kept = {name: piece.value.clone() for name, piece in trainer.given().items()}
    trainer.set_length(replace(asked, tokens=LONG, batch_start=0))
    took: list[float] = []
    with Progress("timing steps", shown=mesh.first, file=sys.stdout) as progress:
        while mesh.first_does(lambda: len(took) < FEWEST or (len(took) < MOST and sum(took) < ENOUGH_S)):
            start = time.perf_counter()
            trainer.step()
            took.append(time.perf_counter() - start)
            progress.update(len(took), f"{len(took)} made")
    few = min(trainer.samples.num_held_out, 2 * asked.micro_batch_size * mesh.data)
    start = time.perf_counter()
    trainer.held_out_loss(few)
    held_out = (time.perf_counter() - start) / few
    trainer.begin_again(kept)
    trainer.set_length(asked)
    return Pace(median(took[len(took) // 2 :]), held_out)


def affordable(trainer: Trainer, left_s: float, pace: Pace) -> int:
    """Steps that can be made and measured in so many seconds, the last measurement over the whole held-out part."""
    return max(
        1, int((left_s * (1 - RESERVED) - trainer.samples.num_held_out * pace.held_out) / each(trainer, pace))
    )


def each(trainer: Trainer, pace: Pace) -> float:
    """Seconds of a step with its share of a measurement on the way."""
    keep, samples = trainer.run.keep, trainer.samples
    return pace.step + min(keep.eval_samples, samples.num_held_out) * pace.held_out / keep.eval_every


def described(trainer: Trainer, train: Train, pace: Pace) -> str:
    """What was decided, as the user reads it."""
    length, minutes = trainer.run.data.sequence_length, trainer.run.train.minutes
    steps, tokens = lr.num_steps(train, length), lr.end(train, length) * length
    whole = steps * each(trainer, pace) + trainer.samples.num_held_out * pace.held_out
    return (
        f"About {train.batch_size * length / pace.step:,.0f} tokens/s here: training {tokens:,} tokens in {steps:,} "
        f"steps, about {seconds(whole)} (train.minutes is {minutes:g}); set train.tokens for another length."
    )
