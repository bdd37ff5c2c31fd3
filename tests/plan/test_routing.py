"""Distinct ranks and nodes of a token's experts."""

import random

import pytest

from counterflow.config.models import MODELS
from counterflow.errors import ConfigError
from counterflow.plan.routing import Routing

pytestmark = pytest.mark.pure
V3 = MODELS["v3-671b"]


@pytest.mark.parametrize(
    ("ranks", "distinct"), [(2, 1.99), (4, 3.61), (8, 5.30), (16, 6.52), (32, 7.27), (64, 7.67)]
)
def test_uniform_choices_hit_the_closed_form(ranks, distinct):
    """E (1 − C(E − E/n, K) / C(E, K)) n at E 256, K 8."""
    assert Routing(limited=False).places(V3, ranks) == pytest.approx(distinct, abs=0.01)


@pytest.mark.parametrize(("ranks", "distinct"), [(8, 3.95), (16, 5.73), (32, 6.86), (64, 7.49)])
def test_sec2_1_2_node_limit_keeps_tokens_on_four_groups(ranks, distinct):
    """Simulated elsewhere with the report's rule; 2,000 tokens give a standard error below 0.02."""
    assert Routing().places(V3, ranks) == pytest.approx(distinct, abs=0.06)
    assert Routing().places(V3, 8) <= V3.num_limited_groups


def test_even_loads_are_nearly_the_uniform_choice_and_skewed_ones_are_not():
    even, draw = Routing(loads=(1.0,) * 256), random.Random(0)
    assert even.imbalance(V3, 64) == pytest.approx(1.0)
    assert even.places(V3, 64) == pytest.approx(Routing(limited=False).places(V3, 64), rel=0.02)
    skewed = Routing(loads=tuple(draw.paretovariate(1) for _ in range(256)))
    assert skewed.imbalance(V3, 64) > 1.5
    assert skewed.places(V3, 64) < even.places(V3, 64)


def test_loads_that_do_not_fit_are_refused():
    for number in (float("inf"), float("nan"), -1.0):
        with pytest.raises(ConfigError, match="finite counts"):
            Routing(loads=(1.0, number))
    with pytest.raises(ConfigError, match="3 expert loads for 256 experts"):
        Routing(loads=(1.0, 2.0, 3.0)).places(V3, 8)
    with pytest.raises(ConfigError, match="not all 0"):
        Routing(loads=(0.0, 0.0))
