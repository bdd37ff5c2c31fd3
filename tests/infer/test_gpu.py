"""On a GPU the engine writes what it writes on the CPU."""

from copy import deepcopy

import pytest
import torch

from counterflow.infer.engine import EngineSettings
from counterflow.infer.place import placed
from counterflow.infer.request import Sampling
from tests.infer.models import texts, trained_model, write

pytestmark = pytest.mark.gpu

SETTINGS = EngineSettings(adapt=False, max_rows=24, block_size=4)


def prompts() -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(texts(5, 60, seed=7), (1, 40, 9, 17, 3))]


def test_greedy_text_in_fp32_equals_the_cpus():
    """A trained model's best token is rarely within a rounding of the second."""
    sampling = Sampling(20, temperature=0)
    expected, _ = write(trained_model(), prompts(), sampling, SETTINGS)
    model = placed(deepcopy(trained_model()), "cuda", "fp32", SETTINGS)
    given, engine = write(model, prompts(), sampling, SETTINGS)
    assert given == expected and sum(engine.statistics.kept) > 0


def test_bf16_writes_the_language_with_drafts_and_without():
    model = placed(deepcopy(trained_model()), "cuda", "bf16", SETTINGS)
    for settings in (SETTINGS, EngineSettings(drafts=0)):
        given, _ = write(model, prompts(), Sampling(20, temperature=1.0, seed=1, logprobs=2), settings)
        assert all(len(text) == 20 for text in given)
    assert next(model.parameters()).dtype == torch.bfloat16
