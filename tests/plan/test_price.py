"""What a run costs, and what breaking adds."""

import pytest

from counterflow.errors import ConfigError
from counterflow.plan.price import Reliability, price

pytestmark = pytest.mark.pure


def test_tab1_hours_and_dollars_follow_from_the_published_rate():
    """180K hours a trillion tokens is 1,543.2 tokens/s/GPU; 2,664K hours, $5.328M and 54.2 days for 14.8T."""
    found = price(14.8e12, 1e12 / 180e3 / 3600, 2048, 700)
    assert found.gpu_hours == pytest.approx(2664e3)
    assert found.dollars == pytest.approx(5.328e6)
    assert found.days == pytest.approx(54.2, abs=0.05)
    assert found.gpu_hours_per_trillion == pytest.approx(180e3)


def test_youngs_interval_wastes_least():
    waste = {}
    best = price(1e12, 1500, 2048, 700).interval_s
    for factor in (0.5, 0.9, 1.0, 1.1, 2.0):
        waste[factor] = price(
            1e12, 1500, 2048, 700, reliability=Reliability(interval_s=best * factor)
        ).overhead
    assert min(waste, key=waste.__getitem__) == 1.0
    assert price(1e12, 1500, 2048, 700).days_with_failures > price(1e12, 1500, 2048, 700).days


def test_nothing_fails_and_nothing_is_lost():
    found = price(1e12, 1500, 8, 700, reliability=Reliability(failures_per_gpu_day=0, checkpoint_s=0))
    assert found.failures == found.overhead == 0


def test_impossible_rates_are_refused():
    with pytest.raises(ConfigError, match="restart_s is -1"):
        Reliability(restart_s=-1)
