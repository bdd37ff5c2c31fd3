"""A released config.json read as a model and written back: nothing lost, nothing guessed, nothing skipped."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from counterflow.config.model import Yarn
from counterflow.config.models import MODELS
from counterflow.config.released import from_released, read_json, read_released, scales_of, to_released
from counterflow.errors import ConfigError
from counterflow.plan.count import count_parameters

pytestmark = pytest.mark.pure

SPAN = {"original_max_position_embeddings": 4096}
YARN = {"type": "yarn", "factor": 8, **SPAN}
CONFIGS = Path(__file__).parents[1] / "data" / "configs"


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
        ({"num_hidden_layers": 1e30}, "4096 is the most"),
        ({"vocab_size": 10**12}, "model.vocab_size is 1000000000000; 2147483647 is the most"),
        ({"rope_theta": 1}, "model.rope_theta is 1.0; it must be above 1"),
        ({"rope_theta": "ten"}, "rope_theta in the released config is 'ten'"),
        ({"routed_scaling_factor": True}, "must be a number"),
        ({"routed_scaling_factor": float("nan")}, "must be a number"),
        ({"q_lora_rank": {}}, None),
        ({"q_lora_rank": [1]}, "q_lora_rank in the released config is [1]"),
        ({"num_nextn_predict_layers": "one"}, "num_nextn_predict_layers in the released config is 'one'"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn' in the released config; it must be a table"),
        ({"rope_scaling": {"type": "linear"}}, "'yarn' or none is known here"),
        ({"rope_scaling": {"type": "yarn", "factor": "x", **SPAN}}, "factor in the released config is 'x'"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"topk_method": "greedy"}, "the checkpoint is of another model"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": None}, "model_type is None"),
        ({"rope_interleave": False}, "rope_interleave is False"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"sliding_window": 4096}, "sliding_window is 4096 in the released config; it is not known here"),
        ({"index_topk": 0}, "index_topk is 0"),
        ({"qk_head_dim": 1}, "qk_head_dim is 1 in the released config; this architecture has 64, as qk_nope"),
        ({"rope_parameters": {"rope_theta": 5e4}}, "rope_theta is 10000.0 and 50000.0"),
        ({"rope_scaling": {"type": "yarn", **SPAN}}, "lacks 'factor'"),
        ({"rope_scaling": {"type": "yarn", "factor": None, **SPAN}}, "lacks 'factor'"),
        ({"rope_scaling": {"type": "yarn", "factor": 8}}, "lacks 'original_max_position_embeddings'"),
        ({"rope_scaling": YARN | {"attention_factor": 1.0}}, "attention_factor is 1.0"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate is False"),
        ({"rope_scaling": YARN | {"short_factor": [1.0]}}, "rope_scaling.short_factor is [1.0]"),
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


def test_yarn_is_the_reference_codes_where_a_file_leaves_its_numbers_out():
    """DeepSeek's own modeling file and transformers: the logits' growth is in the rotary table alone."""
    plain = from_released(to_released(MODELS["tiny"]) | {"rope_scaling": YARN}).yarn
    assert plain == Yarn(8.0, 4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=0.0)


def test_a_null_counts_as_not_given_and_what_changes_nothing_is_read_past():
    tiny = to_released(MODELS["tiny"])
    nulls = dict.fromkeys(("attention_bias", "rope_interleave", "num_key_value_heads", "rope_parameters"))
    nulls |= dict.fromkeys(("quantization_config", "sliding_window", "eos_token_id", "initializer_range"))
    others = {"_attn_implementation": "eager", "torch_dtype": "float16", "pretraining_tp": 1, "head_dim": 7}
    expected = dataclasses.replace(MODELS["tiny"], initializer_std=0.006)
    assert kept(from_released(tiny | nulls | others)) == kept(expected)
    assert scales_of(tiny | nulls) is None
    without = from_released(tiny | {"n_shared_experts": None, "n_group": None, "topk_group": None})
    assert (without.num_shared_experts, without.num_groups, without.num_limited_groups) == (0, 1, 1)


@pytest.mark.parametrize(
    ("name", "yarn", "scales", "sizes"),
    [
        ("deepseek-r1", Yarn(), "numbers", (671, 11.5)),
        ("deepseek-v3.1", Yarn(), "exponents", (671, 11.5)),
        ("moonlight-16b-a3b", None, None, (16.0, 0)),
        ("kimi-k2", Yarn(64.0, beta_fast=1.0), "numbers", (1026, 0)),
    ],
)
def test_published_configurations_are_models_of_their_published_sizes(name, yarn, scales, sizes):
    released = read_json(CONFIGS / f"{name}.json")
    model = from_released(released)
    counted = count_parameters(model)
    assert (counted.total / 1e9, counted.mtp / 1e9) == pytest.approx(sizes, rel=0.01)
    assert (model.yarn, scales_of(released)) == (yarn, scales)
    assert kept(from_released(to_released(model))) == kept(model)


@pytest.mark.parametrize(
    ("packing", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantization_config.quant_method is 'gptq'"),
        ({"weight_block_size": [1, 128]}, "weight_block_size is [1, 128]"),
        ({"scale_fmt": ["ue8m0"]}, "scale_fmt is ['ue8m0']"),
        ({"config_groups": {}}, "quantization_config.config_groups is {}"),
    ],
)
def test_weights_packed_in_another_form_are_refused(packing, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        scales_of({"quantization_config": packing})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "no JSON object"),
        (None, "cannot be read"),
    ],
)
def test_an_unreadable_file_is_one_error(tmp_path, text, says):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_released(path)
