"""A released config.json read as a model and written back: nothing lost, nothing guessed, nothing skipped."""

import dataclasses
import json

import pytest

from counterflow.config.model import Yarn
from counterflow.config.models import MODELS
from counterflow.config.released import from_released, read_released, to_released
from counterflow.errors import ConfigError

pytestmark = pytest.mark.pure


def kept(model):
    """The model as far as the released format can say it: balancing and YaRN's absence of one aside."""
    return dataclasses.replace(model, balance=MODELS["tiny"].balance)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_survives_its_released_form(name):
    released = json.loads(json.dumps(to_released(MODELS[name])))
    assert kept(from_released(released)) == kept(MODELS[name])


def test_yarn_and_a_query_without_latent_survive():
    model = dataclasses.replace(MODELS["tiny"], q_lora_rank=0, yarn=Yarn(factor=8.0, mscale=0.5))
    assert kept(from_released(to_released(model))) == kept(model)


def test_the_defaults_of_transformers_are_the_671b():
    """An independent account of the same model: every size that their defaults state is ours."""
    theirs = pytest.importorskip("transformers").DeepseekV3Config().to_dict()
    ours = from_released(theirs | {"num_nextn_predict_layers": 1})
    wanted = MODELS["v3-671b"]
    said = {"max_positions", "yarn", "initializer_std", "balance"}  # theirs: 4096, none, 0.02, none
    for field in dataclasses.fields(wanted):
        if field.name not in said:
            assert getattr(ours, field.name) == getattr(wanted, field.name), field.name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"hidden_size": "big"}, "hidden_size in the released config is 'big'; it must be a whole number"),
        ({"hidden_size": [7168]}, "hidden_size in the released config is [7168]"),
        ({"hidden_size": 64.5}, "must be a whole number"),
        ({"hidden_size": -64}, "model.hidden_size is -64"),
        ({"rope_theta": "ten"}, "rope_theta in the released config is 'ten'"),
        ({"routed_scaling_factor": True}, "must be a number"),
        ({"routed_scaling_factor": float("nan")}, "must be a number"),
        ({"q_lora_rank": {}}, None),
        ({"q_lora_rank": [1]}, "q_lora_rank in the released config is [1]"),
        ({"num_nextn_predict_layers": "one"}, "num_nextn_predict_layers in the released config is 'one'"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn' in the released config; it must be a table"),
        ({"rope_scaling": {"type": "linear"}}, "'yarn' or none is known here"),
        ({"rope_scaling": {"type": "yarn", "factor": "x"}}, "factor in the released config is 'x'"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"topk_method": "greedy"}, "the checkpoint is of another model"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
    ],
)
def test_what_a_file_may_hold_wrong_is_one_error(change, says):
    released = to_released(MODELS["tiny"]) | change
    if says is None:
        assert from_released(released).q_lora_rank == 0
        return
    with pytest.raises(ConfigError) as raised:
        from_released(released)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("text", "says"), [("{", "is not JSON"), ("[]", "no JSON object"), (None, "cannot be read")]
)
def test_an_unreadable_file_is_one_error(tmp_path, text, says):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_released(path)
