"""The shapes of a run: continuous where they should be, and adding up to what was planned."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.config.run import LearningRate, Train
from counterflow.config.runs import RUNS
from counterflow.train import lr

pytestmark = pytest.mark.pure
TRAIN = RUNS["v3-671b"].train


def test_section_4_2_learning_rate_phases():
    """Linear to 2.2e-4 over 2K steps, there until 10T tokens, cosine to 2.2e-5 over 4.3T, 333B there, then 7.3e-6."""
    trillions = 14.8
    assert lr.learning_rate(TRAIN, 0.0) == 0.0
    for tokens, rate in ((5.0, 2.2e-4), (9.9, 2.2e-4), (14.4, 2.2e-5), (14.7, 7.3e-6)):
        assert math.isclose(lr.learning_rate(TRAIN, tokens / trillions), rate, rel_tol=2e-3)
    middle = lr.learning_rate(TRAIN, (10.0 + 2.15) / trillions)
    assert math.isclose(middle, (2.2e-4 + 2.2e-5) / 2, rel_tol=1e-2)
    for mark in (TRAIN.lr.warmup, TRAIN.lr.constant_until, TRAIN.lr.cosine_until):
        before, after = (lr.learning_rate(TRAIN, mark + shift) for shift in (-1e-9, 1e-9))
        assert math.isclose(before, after, rel_tol=1e-6)


@pytest.mark.parametrize("name", ["v3-671b", "v3-16b"])
def test_the_report_warms_up_in_2000_steps(name):
    run = RUNS[name]
    target = run.train.lr.warmup * run.train.tokens
    trained = itertools.accumulate(lr.steps(run.train, run.data.sequence_length))
    warming = sum(1 for _ in itertools.takewhile(lambda n: n * run.data.sequence_length < target, trained))
    assert abs(warming - 2000) <= 20


def test_mtp_weight_and_bias_speed_change_where_the_report_says():
    assert [lr.mtp_weight(TRAIN, tokens / 14.8) for tokens in (9.9, 10.1)] == [0.3, 0.1]
    assert [lr.bias_speed(TRAIN, tokens / 14.8) for tokens in (14.2, 14.4)] == [0.001, 0.0]


def test_the_warm_up_has_its_least_steps_where_the_run_is_long_enough():
    train = Train(
        batch_size=16,
        batch_start=8,
        batch_ramp_until=0.5,
        micro_batch_size=8,
        lr=LearningRate(peak=1.0, warmup=0.01, warmup_steps=20),
        bias_speed=0.001,
        bias_speed_start=0.02,
    )
    for tokens, whole in ((1e5, True), (4e3, False), (16, False), (1e7, True)):
        train = replace(train, tokens=tokens)
        warmup, total, seen = lr.warmup(train, 16), lr.total_samples(train, 16), 0
        rates, speeds, rising = [], [], 0
        for batch in lr.steps(train, 16):
            speeds.append(lr.bias_speed(train, seen / total, warmup))
            rising += seen / total < warmup
            seen += batch
            rates.append(lr.learning_rate(train, seen / total, warmup))
        least = rising >= 20 if whole else math.isclose(warmup, train.lr.constant_until)
        assert least and rates[0] > 0 and sorted(rates[:rising]) == rates[:rising], "every step trains"
        assert speeds[0] == 0.02 and sorted(speeds, reverse=True) == speeds
        assert speeds[rising : rising + 1] in ([0.001], [])


@pytest.mark.parametrize("name", list(RUNS))
def test_a_run_that_warms_up_long_enough_by_itself_is_unchanged(name):
    """The least number of steps serves runs that are made shorter."""
    run = RUNS[name]
    share = lr.warmup(run.train, run.data.sequence_length)
    if name.startswith("v3"):
        assert share == run.train.lr.warmup
    shorter = replace(run.train, tokens=run.train.tokens / 1000)
    assert lr.warmup(shorter, run.data.sequence_length) >= share


def ramping(micro: int, full: int, start: int, increment: int, until: float) -> Train:
    return Train(
        batch_size=full * micro,
        batch_start=min(start, full) * micro,
        batch_increment=increment * micro,
        batch_ramp_until=until,
        micro_batch_size=micro,
    )


RAMPS = st.builds(
    ramping, st.integers(1, 8), st.integers(1, 12), st.integers(0, 12), st.integers(0, 5), st.floats(0.0, 1.0)
)


@given(RAMPS, st.floats(1.0, 1e5), st.integers(2, 64))
def test_batches_rise_by_the_increment_and_the_first_that_holds_the_last_token_is_the_last(
    ramp, tokens, length
):
    train = replace(ramp, tokens=tokens)
    batches, total = list(lr.steps(train, length)), lr.total_samples(train, length)
    assert total * length >= tokens and (total - 1) * length < tokens
    assert sum(batches) >= total > sum(batches[:-1])
    start, unit = train.batch_start or train.batch_size, train.batch_increment or train.micro_batch_size
    assert all(batch == train.batch_size or (batch - start) % unit == 0 for batch in batches)
    assert batches == sorted(batches) and max(batches) <= train.batch_size
    assert (lr.num_steps(train, length), lr.end(train, length)) == (len(batches), sum(batches))


@given(st.integers(1, 60), RAMPS, st.sampled_from([0.0, 900.0]))
def test_a_length_in_steps_is_that_many_steps(steps, ramp, tokens):
    train = replace(ramp, tokens=tokens, steps=steps)
    found = lr.in_tokens(train, 16)
    batches = list(lr.steps(found, 16))
    assert found.steps == 0 and len(batches) <= steps
    if not tokens:
        assert len(batches) == steps
        assert train.batch_start or set(batches) == {train.batch_size}, "whole steps"
    else:
        assert found.tokens <= tokens, "the shorter of two"
