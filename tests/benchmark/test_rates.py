"""Measured rates become a file that the planner reads."""

import pytest

from counterflow.benchmark.rates import RatesSettings, measure_rates, rates_toml
from counterflow.errors import ConfigError
from counterflow.plan.hardware import hardware


def test_two_processes_measure_and_the_planner_reads_it(tmp_path):
    settings = RatesSettings("tiny", 32, 1, "fp32", processes=2, device="cpu", repeats=1, seconds=0.001)
    found = measure_rates(settings)
    (tmp_path / "mine.toml").write_text(rates_toml(settings, found))
    mine = hardware(file=str(tmp_path / "mine.toml"))
    assert mine.flops_per_s("fp32") == pytest.approx(found.product_flops_per_s, rel=1e-2)
    parts, card = mine.efficiencies, mine.card
    assert card.fp32_flops * parts.attention == pytest.approx(found.attention_flops_per_s, rel=1e-2)
    assert card.memory_bytes_per_s * parts.memory == pytest.approx(found.passes_bytes_per_s, rel=1e-2)
    assert (
        mine.fabric.bytes_per_s == pytest.approx(found.link_bytes_per_s, rel=1e-2)
        and found.link_bytes_per_s > 1e6
    )
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
