"""The published sizes, from the formula and from the tensors themselves on the meta device."""

import pytest
import torch

from counterflow.config.models import MODELS
from counterflow.model.transformer import Transformer
from counterflow.plan.count import count_parameters


def test_v3_671b_has_the_published_counts():
    """671.03 B, 36.63 B active without the embedding look-up; MTP 11.61 B, with the head 2.54 B active."""
    counts, head = count_parameters(MODELS["v3-671b"]), 129280 * 7168
    assert round(counts.total / 1e9, 2) == 671.03
    assert round(counts.active / 1e9, 2) == 36.63
    assert round(counts.mtp / 1e9, 2) == 11.61
    assert round((counts.mtp_active + 2 * head) / 1e9, 2) == 2.54


def test_v3_16b_has_the_published_counts():
    """15.7 B; 2.4 B active as the paper truncates it, 2.45 B to two places."""
    counts = count_parameters(MODELS["v3-16b"])
    assert round(counts.total / 1e9, 1) == 15.7
    assert round(counts.active / 1e9, 2) == 2.45
    assert round(counts.mtp / 1e9, 2) == 0.59


@pytest.mark.parametrize("name", MODELS)
def test_formula_equals_the_tensors_on_the_meta_device(name):
    with torch.device("meta"):
        model = Transformer(MODELS[name])
    sizes = {parameter_name: parameter.numel() for parameter_name, parameter in model.named_parameters()}
    counts = count_parameters(MODELS[name])
    assert sum(size for key, size in sizes.items() if not key.startswith("mtp.")) == counts.total
    assert sum(size for key, size in sizes.items() if key.startswith("mtp.")) == counts.mtp
