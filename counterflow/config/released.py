"""A released DeepSeek-V3 `config.json` as a model config, and back, key for key.

What our model cannot be (softmax scoring, tied embeddings, biases …) is refused rather than ignored, and so is a key
that is in none of the tables here: a loader that skips what it does not know gives a model that runs and is wrong. A
key that is null counts as not given.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast, get_type_hints

from counterflow.config.model import ModelConfig, Yarn
from counterflow.config.scalar import scalar
from counterflow.errors import ConfigError
from counterflow.notation import from_json

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

MODEL_TYPES = ("deepseek_v3", "kimi_k2")
"""Names of this one architecture; the first is the one written."""

FIXED: Mapping[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}
"""What the architecture always is; another value in a file is refused."""

READ = (
    "initializer_range",
    "model_type",
    "num_mtp_layers",
    "num_nextn_predict_layers",
    "q_lora_rank",
    "quantization_config",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
)
"""Other keys that are read."""

DERIVED: Mapping[str, tuple[str, ...]] = {
    "num_key_value_heads": ("num_attention_heads",),
    "num_local_experts": ("n_routed_experts",),
    "qk_head_dim": ("qk_nope_head_dim", "qk_rope_head_dim"),
}
"""Sums of others; one that contradicts them is refused."""

BY_NULL: Mapping[str, int] = {"n_shared_experts": 0, "n_group": 1, "topk_group": 1}
"""What null says where a number must be named otherwise: no shared experts, no groups."""

WRITTEN: Mapping[str, Any] = {"attention_dropout": 0.0, "ep_size": 1, "seq_aux": True, "use_cache": True}
"""Written for the loaders that look for them; ignored when read."""

WITHOUT_EFFECT: Mapping[str, str] = {
    "names and versions": "architectures auto_map id2label label2id problem_type tokenizer_class transformers_version",
    "how weights are stored or cut": "dtype pretraining_tp torch_dtype torchscript use_bfloat16",
    "losses of training": "aux_loss_alpha router_aux_loss_coef",
    "what a pass gives back": """chunk_size_feed_forward is_decoder is_encoder_decoder output_attentions
        output_hidden_states output_router_logits return_dict return_dict_in_generate use_return_dict""",
    "ids of tokens": "bos_token_id decoder_start_token_id eos_token_id pad_token_id sep_token_id unk_token_id",
    "how text is drawn": """do_sample early_stopping max_length min_length num_beams num_return_sequences
        repetition_penalty task_specific_params temperature top_k top_p""",
    "not read by MLA": "head_dim",
}
"""Keys that change nothing of what the model computes, by what they say instead."""

YARN_NAMES: Mapping[str, str] = {
    "factor": "factor",
    "original_max_positions": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
YARN_DEFAULTS: Mapping[str, float] = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
}
"""Of the release's own code, for keys that a file leaves out; its files name both mscales, as 1."""
ROPE_FIXED: Mapping[str, Any] = {"attention_factor": None, "partial_rotary_factor": 1.0, "truncate": True}

FP8: Mapping[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
"""`quantization_config` of the one packed form that is read."""
FP8_WITHOUT_EFFECT = frozenset(
    ("modules_to_not_convert", "ignored_layers", "dequantize", "is_checkpoint_fp8_serialized")
)
SCALES: Mapping[str | None, str] = {None: "numbers", "ue8m0": "exponents"}
"""By `scale_fmt`."""


def to_released(config: ModelConfig, bos: int = 0, eos: int | list[int] = 0) -> dict[str, Any]:
    """Every key that transformers, vLLM and SGLang look for; the tokens that begin and end a document by id."""
    released: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in NAMES.items()}
    released |= {**FIXED, **WRITTEN, "model_type": MODEL_TYPES[0]}
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
    }
    if config.yarn is not None:
        scaling = {theirs: getattr(config.yarn, ours) for ours, theirs in YARN_NAMES.items()}
        released["rope_scaling"] = {"type": "yarn", **scaling}
    return released


def from_released(released: Mapping[str, Any]) -> ModelConfig:
    """The model that a released config describes.

    Fails (ConfigError): a key is missing, unknown, or holds what this architecture is not. `initializer_range` is
    read though the 671B file's contradicts the report, `aux_loss_alpha` for the same reason is not: set both.
    """
    nulls = {key: number for key, number in BY_NULL.items() if released.get(key, number) is None}
    released = _given({**released, **nulls})
    _require_known(released)
    missing = [theirs for theirs in NAMES.values() if theirs not in released]
    if missing:
        raise ConfigError(
            f"the released config lacks '{missing[0]}'; a DeepSeek-V3 config.json names it: add the key."
        )
    settings = _typed(ModelConfig, {ours: (theirs, released[theirs]) for ours, theirs in NAMES.items()})
    _require_derived(released)
    rope = _rope(released)
    mtp = "num_nextn_predict_layers" if "num_nextn_predict_layers" in released else "num_mtp_layers"
    settings |= _typed(
        ModelConfig,
        {
            "q_lora_rank": ("q_lora_rank", released.get("q_lora_rank") or 0),
            "num_mtp_modules": (mtp, released.get(mtp) or 0),
            "rope_theta": ("rope_theta", rope.get("rope_theta", 10000.0)),
            "initializer_std": ("initializer_range", released.get("initializer_range", 0.006)),
        },
    )
    return ModelConfig(**settings, yarn=_yarn(rope))


def scales_of(released: Mapping[str, Any]) -> str | None:
    """What the scales of its FP8 blocks are, by its config: numbers or exponents; None where no weight is packed.

    Fails: ConfigError where weights are packed in any other form.
    """
    packing = _given(_table(released, "quantization_config"))
    if not packing:
        return None
    kind = packing.pop("scale_fmt", None)
    _require_fixed(packing, FP8, "quantization_config.", "weights in another form cannot be unpacked")
    _refuse_unknown(packing, {*FP8, *FP8_WITHOUT_EFFECT}, "quantization_config.")
    if kind not in tuple(SCALES):
        raise ConfigError(
            f"quantization_config.scale_fmt is {kind!r} in the released config; scales are numbers, which have none, "
            "or exponents, 'ue8m0': fetch the checkpoint in one of these."
        )
    return SCALES[kind]


def _given(table: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that are not null."""
    return {key: value for key, value in table.items() if value is not None}


def _require_known(released: Mapping[str, Any]) -> None:
    """Refuse what the architecture is not, and any key that is not known to change nothing."""
    kind = released.get("model_type")
    if kind not in MODEL_TYPES:
        raise ConfigError(
            f"model_type is {kind!r} in the released config; this architecture goes by {' or '.join(MODEL_TYPES)}: "
            "the checkpoint is of another model."
        )
    _require_fixed(released, FIXED, "", "the checkpoint is of another model")
    without_effect = " ".join(WITHOUT_EFFECT.values()).split()
    known = {*NAMES.values(), *READ, *DERIVED, *FIXED, *WRITTEN, *without_effect}
    _refuse_unknown(released, known, "")


def _require_fixed(table: Mapping[str, Any], fixed: Mapping[str, Any], where: str, why: str) -> None:
    for name, value in fixed.items():
        if name in table and table[name] != value:
            raise ConfigError(
                f"{where}{name} is {table[name]!r} in the released config; this architecture needs "
                f"{'it left out' if value is None else repr(value)}: {why}."
            )


def _refuse_unknown(table: Mapping[str, Any], known: Collection[str], where: str) -> None:
    unknown = next((name for name in table if name not in known and not name.startswith("_")), None)
    if unknown is not None:
        raise ConfigError(
            f"{where}{unknown} is {table[unknown]!r} in the released config; it is not known here and may change what "
            "the model computes: if it changes nothing, take it out of the file."
        )


def _require_derived(released: Mapping[str, Any]) -> None:
    """Refuse a number that contradicts the ones it follows from."""
    for name, parts in DERIVED.items():
        expected = sum(released[part] for part in parts)
        if released.get(name, expected) != expected:
            raise ConfigError(
                f"{name} is {released[name]!r} in the released config; this architecture has {expected}, as "
                f"{' + '.join(parts)}: the checkpoint is of another model."
            )


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


def _rope(released: Mapping[str, Any]) -> dict[str, Any]:
    """All that the file says of rotary positions, in whichever of its tables."""
    rope: dict[str, Any] = {}
    plain = {"rope_theta": released.get("rope_theta")}
    for table in (plain, _table(released, "rope_scaling"), _table(released, "rope_parameters")):
        for name, value in _given(table).items():
            name = "rope_type" if name == "type" else name
            if rope.setdefault(name, value) != value:
                raise ConfigError(
                    f"{name} is {rope[name]!r} and {value!r} in the released config; it must be one: correct the file."
                )
    return rope


def _yarn(rope: Mapping[str, Any]) -> Yarn | None:
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "yarn"):
        raise ConfigError(f"rope scaling is {kind!r} in the released config; 'yarn' or none is known here.")
    _require_fixed(rope, ROPE_FIXED, "rope_scaling.", "nothing else is implemented")
    _refuse_unknown(rope, {"rope_type", "rope_theta", *YARN_NAMES.values(), *ROPE_FIXED}, "rope_scaling.")
    if kind == "default":
        return None
    missing = next((name for name in YARN_NAMES.values() if name not in {**YARN_DEFAULTS, **rope}), None)
    if missing is not None:
        raise ConfigError(
            f"the released config's rope_scaling lacks '{missing}'; YaRN cannot be computed without it: add the key."
        )
    given = {ours: (name, {**YARN_DEFAULTS, **rope}[name]) for ours, name in YARN_NAMES.items()}
    return Yarn(**_typed(Yarn, given))


def read_released(path: Path) -> ModelConfig:
    """The model of a `config.json` file."""
    return from_released(read_json(path))


def read_json(path: Path) -> dict[str, Any]:
    """What a `config.json` holds.   Fails: ConfigError."""
    try:
        released = from_json(path.read_bytes())
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
    return cast("dict[str, Any]", released)
