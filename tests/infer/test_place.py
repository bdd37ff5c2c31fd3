"""Modules that draft nothing are dropped: the same logits, less memory."""

from copy import deepcopy

import pytest
import torch

from counterflow.errors import ConfigError
from counterflow.infer.engine import EngineSettings
from counterflow.infer.place import placed
from tests.infer.models import texts, trained_model


@pytest.mark.parametrize(("drafts", "modules", "left"), [(-1, -1, 3), (1, -1, 1), (5, 2, 2), (0, -1, 0)])
def test_idle_modules_are_dropped_and_the_logits_stay(drafts, modules, left):
    model, tokens = deepcopy(trained_model()), texts(2, 9, seed=1)
    before, held = model.logits(tokens), sum(p.numel() for p in model.parameters())
    placed(model, "cpu", "fp32", EngineSettings(drafts=drafts, modules=modules))
    assert len(model.mtp) == left and torch.equal(model.logits(tokens), before)
    assert (sum(p.numel() for p in model.parameters()) < held) == (left < 3)


def test_bf16_rounds_weights_and_leaves_the_routers_bias():
    model = placed(deepcopy(trained_model()), "cpu", "bf16", EngineSettings())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.layers[1].router.bias.dtype == torch.float32


@pytest.mark.parametrize(
    ("word", "wrong", "near"),
    [("device", "tpu", "cpu"), ("device", "cuda:0", "cuda"), ("precision", "fp4", "fp32")],
)
def test_an_unknown_place_is_refused(word, wrong, near):
    given = {"device": "cpu", "precision": "fp32", word: wrong}
    with pytest.raises(ConfigError, match=f"{word} is '{wrong}'; did you mean '{near}'"):
        placed(trained_model(), **given, settings=EngineSettings())
