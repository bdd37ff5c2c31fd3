"""Logits against transformers' DeepseekV3, weights carried over both ways by released names."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from counterflow.config.model import Yarn
from counterflow.config.released import to_released as config_to_released
from counterflow.errors import CheckpointError
from counterflow.model.transformer import Transformer
from counterflow.model.weights import entries, from_mapping, to_released
from tests.model.configs import BASE, random_model

transformers = pytest.importorskip("transformers")

CONFIGS = {
    "query_latent": BASE,
    "no_query_latent": replace(BASE, q_lora_rank=0),
    "one_group": replace(BASE, num_groups=1, num_limited_groups=1),
    "many_groups": replace(
        BASE, num_routed_experts=16, num_groups=8, num_limited_groups=3, num_experts_per_token=5
    ),
    "yarn": replace(BASE, yarn=Yarn(factor=4.0, original_max_positions=16), max_positions=64),
    "yarn_with_mscale_left_out": replace(BASE, yarn=Yarn(8.0, 16, mscale_all_dim=0.0), max_positions=64),
    "all_moe": replace(BASE, num_dense_layers=0),
    "mostly_dense": replace(BASE, num_dense_layers=2),
    "shared_experts": replace(BASE, num_shared_experts=3, routed_scaling_factor=1.0),
}
BOUND = 1e-4
"""fp32 with unit-scale logits: sums in another order differ by about 1e-6; the issue asks for 1e-4."""


def saved_by_us(model: Transformer, folder) -> str:
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.contiguous().clone() for name, tensor in to_released(model)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_to_released(model.config)))
    return str(folder)


def judge(folder: str):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers_both_ways(name, tmp_path):
    ours = random_model(CONFIGS[name])
    theirs = judge(saved_by_us(ours, tmp_path / "ours"))
    tokens = torch.randint(0, BASE.vocab_size, (2, 29))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert (ours.logits(tokens) - expected).abs().max() < BOUND * expected.abs().max()
        theirs.save_pretrained(tmp_path / "theirs")
        back = Transformer(CONFIGS[name])
        from_mapping(back, load_file(tmp_path / "theirs" / "model.safetensors"))
        assert torch.equal(back.logits(tokens), ours.logits(tokens))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_named_once(name):
    model = Transformer(CONFIGS[name])
    ours = [entry.name for entry in entries(CONFIGS[name])]
    assert sorted(ours) == sorted(model.state_dict())
    released = [part for entry in entries(CONFIGS[name]) for block in entry.released for part in block]
    assert len(released) == len(set(released))


def test_missing_misshapen_and_left_over_tensors_are_named():
    model = random_model(replace(BASE, num_mtp_modules=1))
    good = {name: tensor.clone() for name, tensor in to_released(model)}
    name = "model.layers.2.mlp.experts.7.up_proj.weight"
    with pytest.raises(CheckpointError, match=name):
        from_mapping(model, {key: value for key, value in good.items() if key != name})
    with pytest.raises(CheckpointError, match=name):
        from_mapping(model, {**good, name: good[name][:-1]})
    with pytest.raises(CheckpointError, match=r"model\.layers\.9\.extra"):
        from_mapping(model, {**good, "model.layers.9.extra": torch.zeros(1)})
    copy = "model.layers.3.shared_head.head.weight"
    with pytest.raises(CheckpointError, match=copy):
        from_mapping(model, {**good, copy: good[copy] + 1})


@pytest.mark.parametrize("depths", [1, 2])
def test_draft_logits_equal_transformers_mtp_module(depths, tmp_path, monkeypatch):
    """Each of its modules drafts at the last position from the token drafted before; ours is given those."""
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    ours = random_model(replace(BASE, num_mtp_modules=depths), seed=5)
    patterns = [rf"model\.layers\.{BASE.num_layers + depth}\." for depth in range(depths)]
    family = transformers.DeepseekV3ForCausalLM
    monkeypatch.setattr(family, "_keys_to_ignore_on_load_unexpected", patterns)
    theirs = judge(saved_by_us(ours, tmp_path))
    mtp = MtpModel.from_pretrained(theirs, device_map={"": "cpu"}).eval()
    tokens = torch.randint(0, BASE.vocab_size, (1, 18))
    with torch.no_grad():
        hidden = theirs.model(tokens[:, :-1]).last_hidden_state
        cache = MtpCache(config=theirs.config.get_mtp_config())
        positions = torch.arange(1, 18)[None]
        drafted, logits, _ = mtp(tokens[:, 1:], hidden, None, positions, cache)
        for depth in range(depths):
            given = torch.cat([tokens, drafted[:, :depth]], dim=1)
            draft = ours.draft_logits(given)[depth][:, -1]
            assert (draft - logits[:, depth]).abs().max() < BOUND * logits.abs().max()
