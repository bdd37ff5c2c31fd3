"""The benchmark counts the right products and its contenders are models of one size."""

import dataclasses

import pytest

from counterflow.benchmark.train_step import CONTENDERS, Setting, compare, floor, products
from counterflow.config.models import MODELS
from counterflow.plan.count import count_parameters
from tests.model.configs import BASE

SETTING = Setting(MODELS["tiny"], sequences=2, length=256, precision="fp32", threads=1)


def test_products_are_six_operations_a_parameter_and_token_beside_attention():
    """2 forward, 4 backward for every matrix a token meets; the router's and the norms' gains are left out."""
    model = SETTING.model
    linear = sum(6.0 * m * k * n * count / 3 for count, (batch, m, k, n) in products(SETTING) if batch == 1)
    gains = (
        model.num_layers * (2 * model.hidden_size + model.q_lora_rank + model.kv_lora_rank)
        + model.hidden_size
    )
    routers = model.num_moe_layers * model.num_routed_experts * model.hidden_size
    matrices = count_parameters(model).active - gains - routers
    assert linear == 6.0 * matrices * SETTING.tokens


def test_floor_times_what_products_lists():
    setting = dataclasses.replace(SETTING, model=BASE, sequences=1, length=40)
    seconds, operations = floor(setting, repeats=1)
    assert seconds > 0
    assert operations == sum(2.0 * count * b * m * k * n for count, (b, m, k, n) in products(setting))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_contenders_are_of_one_size_and_finish(precision):
    setting = Setting(BASE, sequences=2, length=32, precision=precision, threads=1)
    results = compare(setting, list(CONTENDERS), rounds=1, steps=1, tell=lambda line: None)
    assert len({result["parameters"] for result in results.values()}) == 1
    assert all(result["median"] > 0 and result["peak_bytes"] > 0 for result in results.values())


def test_a_contender_that_dies_ends_the_wait():
    with pytest.raises(RuntimeError, match="'transformer' ended"):
        compare(SETTING, ["transformer"], rounds=1, steps=1)
