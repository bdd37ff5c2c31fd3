"""A variant's measurement, as `bench/ablate_balance.py` and `ablate_mtp.py` make it."""

import math
from pathlib import Path

import pytest

from counterflow.benchmark.ablate import BALANCE, measure
from counterflow.config.load import load_run
from tests.train.runs import overrides


@pytest.mark.slow
def test_a_variant_is_measured(tmp_path: Path) -> None:
    run = load_run("tiny", [*overrides(tmp_path), "train.steps=2", *BALANCE["none"]])
    found = measure(run)
    assert found["steps"] == 2 == len(found["loss_course"])
    assert math.isfinite(found["held_out_bpb"])
    loads = [sum(load) for load in found["final_load"].values()]
    assert max(loads) == 4 * 32 * run.model.num_experts_per_token
