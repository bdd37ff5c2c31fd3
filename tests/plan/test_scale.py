"""Overhead of all-to-all as clusters grow, and schedules on equal cards."""

from dataclasses import replace

import pytest

from counterflow.config.models import MODELS
from counterflow.errors import ConfigError
from counterflow.plan import scale
from counterflow.plan.hardware import hardware
from counterflow.plan.published import REPORT_JOB
from counterflow.plan.scale import VARIANTS, Variant, curve, grown, schedules

pytestmark = pytest.mark.pure
H800 = hardware("h800")


def test_a_grown_model_keeps_its_computation():
    base = MODELS["v3-671b"]
    for variant in VARIANTS:
        model = grown(base, 512, 8, variant)
        width = model.num_experts_per_token * model.moe_intermediate_size
        assert width == base.num_experts_per_token * base.moe_intermediate_size
        assert model.num_routed_experts == 4 * 512 * variant.narrower


def test_sec3_2_1_overhead_stays_away_at_a_constant_ratio_and_comes_without_the_node_limit():
    limited, free = (curve(REPORT_JOB, H800, variant, (8, 64)) for variant in (VARIANTS[0], VARIANTS[3]))
    assert all(point.exposed < 0.01 for point in limited)
    assert limited[1].alone > 0.5, "there is something to hide"
    assert free[1].exposed > limited[1].exposed + 0.05
    assert all(0 <= point.exposed <= point.pair for point in (*limited, *free))


def test_a_slow_fabric_breaks_it():
    (point,) = curve(REPORT_JOB, H800, Variant("slow", fabric="ethernet"), (64,))
    assert point.exposed > 1


def test_schedules_are_compared_with_transfers_counted(monkeypatch):
    """DualPipe hides what 1F1B leaves open; who has more stages than the model has layers is left out."""
    some = (("1f1b", 4, None), ("dualpipe", 4, None), ("interleaved-1f1b", 16, 8))
    monkeypatch.setattr(scale, "contenders", lambda: some)
    job = replace(REPORT_JOB, batch_size=64 * 16)
    rows = {row.layout.schedule: row for row in schedules(job, H800, 256, 64, "projections")}
    assert rows.keys() == {"1f1b", "dualpipe"}
    assert all(row.seconds > row.free_s > row.free_idle_s > 0 and row.peak_bytes > 0 for row in rows.values())
    assert rows["dualpipe"].seconds / rows["dualpipe"].free_s < rows["1f1b"].seconds / rows["1f1b"].free_s


def test_nothing_to_compare_is_said():
    with pytest.raises(ConfigError, match="no schedule can be compared on 7 GPUs"):
        schedules(REPORT_JOB, H800, 7, 64, "none")
