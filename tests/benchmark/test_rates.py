"""Measured rates become a file that the planner reads."""

from dataclasses import replace

import pytest

from counterflow.benchmark.rates import RatesSettings, measure_rates, rates_toml
from counterflow.errors import ConfigError
from counterflow.plan.hardware import hardware

SETTINGS = RatesSettings("tiny", 32, 1, "fp32", processes=2, device="cpu", repeats=1, seconds=0.001)


@pytest.fixture(scope="module")
def found():
    """Of two processes."""
    return measure_rates(SETTINGS)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_processes_measure_and_the_planner_reads_it(found, precision, tmp_path):
    """In the other precision the same numbers, since many a CPU emulates its products."""
    (tmp_path / "mine.toml").write_text(rates_toml(replace(SETTINGS, precision=precision), found))
    mine = hardware(file=str(tmp_path / "mine.toml"))
    assert mine.flops_per_s(precision) == pytest.approx(found.product_flops_per_s, rel=1e-2)
    parts, card = mine.efficiencies, mine.card
    peak = getattr(card, f"{precision}_flops")
    assert peak * parts.attention == pytest.approx(found.attention_flops_per_s, rel=1e-2)
    assert card.memory_bytes_per_s * parts.memory == pytest.approx(found.passes_bytes_per_s, rel=1e-2)
    fabric = mine.fabric.bytes_per_s
    assert fabric == pytest.approx(found.link_bytes_per_s, rel=1e-2) and found.link_bytes_per_s > 1e6
    assert {"card.launch_s", "card.reserved_bytes", "efficiencies.grouped_product"} <= set(mine.measured)
    assert 1e8 < found.reserved_bytes < 2e9 and 1e-6 < found.launch_s < 1e-3


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"model": "tinny"}, "model is 'tinny'"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"processes": 0}, "processes is 0"),
    ],
)
def test_impossible_settings_are_refused(wrong, says):
    with pytest.raises(ConfigError, match=says):
        measure_rates(RatesSettings(**wrong))
