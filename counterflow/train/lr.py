"""What changes over a run, as functions of the share of its tokens already seen: rate, λ, γ, batch.

No state: a resumed run asks the same functions at the same place, and no layout is asked: a run that goes on in another
one trains the same batches. The batch ramp's shape is not published; here it is linear in tokens, by
`train.batch_increment`. Every batch is whole, the last one too, so that a layout which can run the first batch and
the increment can run them all. Not taken: a last batch cut to the planned length, which other layouts could not run.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from counterflow.config.run import Train


def learning_rate(train: Train, done: float, warmup: float = 0.0) -> float:
    """Linear warm-up, constant, cosine to the floor, constant, and a last lower constant. [§4.2]

    `done` is the share at the end of the step, so that the first one trains too; `warmup` the share of the run that the
    warm-up takes at least.
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


def in_tokens(train: Train, sequence_length: int) -> Train:
    """The same length without `steps`: as many tokens as those have, where they are fewer."""
    if not train.steps:
        return train
    low, high = 1, train.steps * train.batch_size
    while low < high:  # searched for, since the ramp is a share of the length
        middle = (low + high + 1) // 2
        longer = replace(train, steps=0, tokens=float(middle * sequence_length))
        fits = num_steps(longer, sequence_length) <= train.steps
        low, high = (middle, high) if fits else (low, middle - 1)
    tokens = float(low * sequence_length)
    return replace(train, steps=0, tokens=min(train.tokens or tokens, tokens))


def total_samples(train: Train, sequence_length: int) -> int:
    """Sequences that hold the run's tokens: whoever has trained on as many is done, in whatever layout."""
    return max(1, math.ceil(train.tokens / sequence_length))


def batch_size(train: Train, sequence_length: int, sample: int) -> int:
    """Sequences of the step that begins at global sample index `sample`."""
    ramp = train.batch_ramp_until * total_samples(train, sequence_length)
    if not train.batch_start or sample >= ramp:
        return train.batch_size
    grown, unit = (train.batch_size - train.batch_start) * sample / ramp, train.batch_increment
    unit = unit or train.micro_batch_size
    return train.batch_start + int(grown / unit) * unit


def steps(train: Train, sequence_length: int, sample: int = 0) -> Iterator[int]:
    """The batch of every step of the run from `sample` on, in order."""
    total = total_samples(train, sequence_length)
    while sample < total:
        batch = batch_size(train, sequence_length, sample)
        yield batch
        sample += batch


def warmup(train: Train, sequence_length: int) -> float:
    """Share of the run's samples that the warm-up takes: `lr.warmup`, or as many as its least number of steps has.

    The latter not beyond the end of the constant phase, so that the phases keep their order.
    """
    least = sum(islice(steps(train, sequence_length), train.lr.warmup_steps))
    share = least / total_samples(train, sequence_length)
    return max(train.lr.warmup, min(share, train.lr.constant_until))


def num_steps(train: Train, sequence_length: int, sample: int = 0) -> int:
    """Optimizer steps of the run from `sample` on: those of the ramp one by one, the rest by division."""
    return _rest(train, sequence_length, sample)[0]


def end(train: Train, sequence_length: int, sample: int = 0) -> int:
    """The global sample index at which the run that goes on at `sample` ends, its last batch whole."""
    return _rest(train, sequence_length, sample)[1]


def _rest(train: Train, sequence_length: int, sample: int) -> tuple[int, int]:
    total, count = total_samples(train, sequence_length), 0
    while train.batch_start and sample < min(total, train.batch_ramp_until * total):
        sample += batch_size(train, sequence_length, sample)
        count += 1
    whole = max(0, math.ceil((total - sample) / train.batch_size))
    return count + whole, sample + whole * train.batch_size
