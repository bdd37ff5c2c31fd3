"""A released DeepSeek-V3 `config.json` as a model config, and back, key for key.

What our model cannot be (softmax scoring, tied embeddings, biases …) is refused rather than read past: a
loader that skips what it does not know gives a model that runs and is wrong.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_type_hints

from counterflow.config.model import ModelConfig, Yarn
from counterflow.config.scalar import scalar
from counterflow.errors import ConfigError

NAMES: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_dense_layers": "first_k_dense_replace",
    "num_heads": "num_attention_heads",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "kv_lora_rank": "kv_lora_rank",
    "dense_intermediate_size": "intermediate_size",
    "moe_intermediate_size": "moe_intermediate_size",
    "num_routed_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "num_groups": "n_group",
    "num_limited_groups": "topk_group",
    "routed_scaling_factor": "routed_scaling_factor",
    "max_positions": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
}
"""Ours to theirs, for what must be there."""

FIXED: Mapping[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "ep_size": 1,
    "hidden_act": "silu",
    "model_type": "deepseek_v3",
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}
"""What the architecture always is; another value in a file is refused."""

YARN_NAMES: Mapping[str, str] = {
    "factor": "factor",
    "original_max_positions": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}


def to_released(config: ModelConfig, bos: int = 0, eos: int = 0) -> dict[str, Any]:
    """Every key that transformers, vLLM and SGLang look for; the tokens that begin and end a document by id."""
    released: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in NAMES.items()}
    released |= FIXED
    released |= {
        "architectures": ["DeepseekV3ForCausalLM"],
        "aux_loss_alpha": config.balance.sequence_alpha,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "initializer_range": config.initializer_std,
        "num_key_value_heads": config.num_heads,
        "num_nextn_predict_layers": config.num_mtp_modules,
        "q_lora_rank": config.q_lora_rank or None,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    if config.yarn is not None:
        scaling = {theirs: getattr(config.yarn, ours) for ours, theirs in YARN_NAMES.items()}
        released["rope_scaling"] = {"type": "yarn", **scaling}
    return released


def from_released(released: Mapping[str, Any]) -> ModelConfig:
    """The model that a released config describes.

    Fails (ConfigError): a key is missing, or holds what this architecture is not. `initializer_range` is
    read though the 671B file's contradicts the report, `aux_loss_alpha` for the same reason is not: set both.
    """
    for name, value in FIXED.items():
        if (
            name in released
            and released[name] != value
            and name not in ("attention_dropout", "ep_size", "seq_aux")
        ):
            raise ConfigError(
                f"{name} is {released[name]!r} in the released config; this architecture needs {value!r}: "
                "the checkpoint is of another model."
            )
    missing = [theirs for theirs in (*NAMES.values(), "model_type") if released.get(theirs) is None]
    if missing:
        raise ConfigError(
            f"the released config lacks '{missing[0]}'; a DeepSeek-V3 config.json names it: add the key."
        )
    heads = released["num_attention_heads"]
    if released.get("num_key_value_heads") not in (None, heads):
        raise ConfigError(
            f"num_key_value_heads is {released['num_key_value_heads']} in the released config; MLA has as "
            f"many as num_attention_heads, {heads}: the checkpoint is of another model."
        )
    rope = {**_table(released, "rope_scaling"), **_table(released, "rope_parameters")}
    settings = _typed(ModelConfig, {ours: (theirs, released[theirs]) for ours, theirs in NAMES.items()})
    mtp = "num_nextn_predict_layers" if "num_nextn_predict_layers" in released else "num_mtp_layers"
    settings |= _typed(
        ModelConfig,
        {
            "q_lora_rank": ("q_lora_rank", released.get("q_lora_rank") or 0),
            "num_mtp_modules": (mtp, released.get(mtp) or 0),
            "rope_theta": ("rope_theta", rope.get("rope_theta") or released.get("rope_theta") or 10000.0),
            "initializer_std": ("initializer_range", released.get("initializer_range") or 0.006),
        },
    )
    return ModelConfig(**settings, yarn=_yarn(rope))


def _typed(kind: type, given: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Our names' values, each of the type our setting has; errors say their name."""
    hints = get_type_hints(kind)
    return {
        ours: scalar(value, hints[ours], f"{theirs} in the released config", ": correct the file")
        for ours, (theirs, value) in given.items()
    }


def _table(released: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A table of the file; empty where it is absent or null."""
    value: Any = released.get(name) or {}
    if not isinstance(value, dict):
        raise ConfigError(
            f"{name} is {value!r} in the released config; it must be a table: correct the file."
        )
    return cast("dict[str, Any]", value)


def _yarn(rope: Mapping[str, Any]) -> Yarn | None:
    kind = rope.get("type") or rope.get("rope_type") or "default"
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConfigError(f"rope scaling is '{kind}' in the released config; 'yarn' or none is known here.")
    given = {ours: name for ours, name in YARN_NAMES.items() if rope.get(name) is not None}
    return Yarn(**_typed(Yarn, {ours: (name, rope[name]) for ours, name in given.items()}))


def read_released(path: Path) -> ModelConfig:
    """The model of a `config.json` file."""
    try:
        released = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); give the path of a config.json."
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"{path} is not JSON ({error}); give the config.json of a released checkpoint."
        ) from None
    if not isinstance(released, dict):
        raise ConfigError(f"{path} holds no JSON object; give the config.json of a released checkpoint.")
    return from_released(cast("dict[str, Any]", released))
