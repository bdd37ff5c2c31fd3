"""What changes over a run, as functions of the share of its tokens already seen: rate, λ, γ, batch.

No state: a resumed run asks the same functions at the same place. The batch ramp's shape is not published; here it
is linear in tokens, in steps that the schedule allows, and the last step is cut (or, where so few micro-batches are
not allowed, the one before it grown) so that the run ends where it was planned.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

from counterflow.config.run import Train


def learning_rate(train: Train, done: float, warmup: float = 0.0) -> float:
    """Linear warm-up, constant, cosine to the floor, constant, and a last lower constant. [§4.2]

    `warmup` is the share of the run that the warm-up takes at least.
    """
    lr = train.lr
    warmup = max(warmup, lr.warmup)
    if done < warmup:
        return lr.peak * done / warmup
    if done < lr.constant_until:
        return lr.peak
    if done < lr.cosine_until:
        way = (done - lr.constant_until) / (lr.cosine_until - lr.constant_until)
        return lr.peak * (lr.floor + (1 - lr.floor) * 0.5 * (1 + math.cos(math.pi * way)))
    return lr.peak * (lr.floor if done < lr.last_from else lr.last)


def mtp_weight(train: Train, done: float) -> float:
    """λ: the weight of the MTP losses."""
    return train.mtp_weight if done < train.mtp_change_at else train.mtp_weight_late


def bias_speed(train: Train, done: float, warmup: float = 0.0) -> float:
    """γ: how far a router's bias moves in a step."""
    if done >= train.bias_stop_at:
        return 0.0
    if not train.bias_speed_start or done >= warmup:
        return train.bias_speed
    return train.bias_speed_start + (train.bias_speed - train.bias_speed_start) * done / warmup


class Grain(NamedTuple):
    """Samples that a batch is a multiple of, and the fewest it may have: what micro-batches and the schedule allow."""

    multiple: int
    least: int


def in_tokens(train: Train, sequence_length: int, grain: Grain) -> Train:
    """The same length without `steps`: as many tokens as those have, where they are fewer."""
    if not train.steps:
        return train
    low, high = 1, train.steps * train.batch_size // grain.multiple
    while low < high:  # searched for, since the ramp is a share of the length
        middle = (low + high + 1) // 2
        longer = replace(train, steps=0, tokens=middle * grain.multiple * sequence_length)
        fits = num_steps(longer, sequence_length, grain) <= train.steps
        low, high = (middle, high) if fits else (low, middle - 1)
    tokens = float(low * grain.multiple * sequence_length)
    return replace(train, steps=0, tokens=min(train.tokens or tokens, tokens))


def total_samples(train: Train, sequence_length: int, grain: Grain | None = None) -> int:
    """Sequences of the whole run: its tokens, rounded up to what a batch may be."""
    grain = grain or Grain(train.micro_batch_size, train.micro_batch_size)
    return max(math.ceil(train.tokens / (sequence_length * grain.multiple)) * grain.multiple, grain.least)


def batch_size(train: Train, sequence_length: int, sample: int, grain: Grain | None = None) -> int:
    """Sequences of the step that begins at global sample index `sample`; the last step takes what is left."""
    grain = grain or Grain(train.micro_batch_size, train.micro_batch_size)
    total = total_samples(train, sequence_length, grain)
    batch, ramp = train.batch_size, train.batch_ramp_until * total
    if train.batch_start and sample < ramp:
        grown = train.batch_start + (train.batch_size - train.batch_start) * sample / ramp
        batch = int(grown / grain.multiple) * grain.multiple
    left = total - sample
    return left if left - batch < grain.least else batch


def steps(train: Train, sequence_length: int, grain: Grain | None = None) -> Iterator[int]:
    """The batch of every step of the run, in order."""
    sample, total = 0, total_samples(train, sequence_length, grain)
    while sample < total:
        batch = batch_size(train, sequence_length, sample, grain)
        yield batch
        sample += batch


def warmup(train: Train, sequence_length: int, grain: Grain | None = None) -> float:
    """Share of the run's samples that the warm-up takes: `lr.warmup`, or as many as its least number of steps has.

    The latter not beyond the end of the constant phase, so that the phases keep their order.
    """
    least = sum(islice(steps(train, sequence_length, grain), train.lr.warmup_steps))
    share = least / total_samples(train, sequence_length, grain)
    return max(train.lr.warmup, min(share, train.lr.constant_until))


def num_steps(train: Train, sequence_length: int, grain: Grain | None = None) -> int:
    """Optimizer steps of the whole run: those of the ramp one by one, the rest by division."""
    grain = grain or Grain(train.micro_batch_size, train.micro_batch_size)
    sample, count, total = 0, 0, total_samples(train, sequence_length, grain)
    while train.batch_start and sample < min(total, train.batch_ramp_until * total):
        sample += batch_size(train, sequence_length, sample, grain)
        count += 1
    whole, rest = divmod(total - sample, train.batch_size)
    return count + whole + (rest >= grain.least or (rest > 0 and not whole))
