"""A model as a folder that the ecosystem's tools load: shards and index, config, tokenizer and generation settings.

The config is written in full, the keys that say "sigmoid" and "noaux_tc" included: servers that find them missing run
softmax routing without a bias and say nothing. MTP modules stand where the released checkpoints have them, or are left
out and the config says so. A prompt begins a document: the tokenizer files put the beginning token before it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Bpe
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from counterflow.config.model import ModelConfig
from counterflow.config.released import FP8
from counterflow.config.released import to_released as config_to_released
from counterflow.convert.folder import CONFIG, whole_folder
from counterflow.convert.shards import as_stored, write_shards
from counterflow.data.tokenizer import Tokenizer
from counterflow.data.tokenizer_files import GENERATION, TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, write_json
from counterflow.errors import ConfigError, nearest
from counterflow.model.transformer import Transformer
from counterflow.model.weights import to_released
from counterflow.progress import watched

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}
"""Of the weights that are not in blocks; the routers' biases are fp32 in all of them."""

LATENT_EPS = 1e-6
"""Of transformers' norms of latents, whatever the config says."""


@dataclass(frozen=True)
class Form:
    """How the weights are written."""

    dtype: str = "bf16"
    """bf16, fp32, or fp8: e4m3 in blocks of 128 × 128 with their scales, the rest bf16."""
    mtp: bool = True
    """Write the multi-token modules too."""
    shard_gib: float = 4.0
    """Size of a shard, in GiB; one is held in memory beside the model."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is '{self.dtype}'; {nearest(self.dtype, DTYPES)}")
        if not self.shard_gib > 0:
            raise ConfigError(f"shard_gib is {self.shard_gib}; it must be above 0.")


def export(model: Transformer, tokenizer: Tokenizer, folder: Path, form: Form) -> None:
    """Write the folder, whole or not at all.   Fails: CheckpointError; see `whole_folder`."""
    names = [(name, tensor) for name, tensor in to_released(model) if form.mtp or not _is_mtp(model, name)]
    needed = sum(tensor.numel() for _, tensor in names) * (
        1 if form.dtype == "fp8" else DTYPES[form.dtype].itemsize
    )
    with whole_folder(folder, needed) as new:
        tensors = watched(names, "exporting", len(names), "tensors")
        write_shards(_stored(tensors, form), new, form.shard_gib * 2**30)
        _write_tokenizer(tokenizer, model.config.max_positions, new)
        write_json(new / GENERATION, _generation(tokenizer))
        write_json(new / CONFIG, _config(model, tokenizer, form))


def _is_mtp(model: Transformer, name: str) -> bool:
    layer = name.removeprefix("model.layers.").split(".")[0]
    return layer.isdigit() and int(layer) >= model.config.num_layers


def _stored(tensors: Iterator[tuple[str, Tensor]], form: Form) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        dtype = torch.float32 if name.endswith("e_score_correction_bias") else DTYPES[form.dtype]
        in_blocks = form.dtype == "fp8" and "_proj" in name and "eh_proj" not in name
        yield from as_stored(name, tensor.detach(), dtype, in_blocks)


def _config(model: Transformer, tokenizer: Tokenizer, form: Form) -> dict[str, Any]:
    config = config_to_released(model.config, tokenizer.bos, _ends(tokenizer))
    config["torch_dtype"] = str(DTYPES[form.dtype]).removeprefix("torch.")
    if not form.mtp:
        config["num_nextn_predict_layers"] = 0
    if form.dtype == "fp8":
        config["quantization_config"] = dict(FP8)
    return dict(sorted(config.items()))


def _ends(tokenizer: Tokenizer) -> int | list[int]:
    """The end of a document, and behind it what else ends a text."""
    others = sorted(tokenizer.ends - {tokenizer.eos})
    return [tokenizer.eos, *others] if others else tokenizer.eos


def _generation(tokenizer: Tokenizer) -> dict[str, Any]:
    """What `counterflow generate` does unless told otherwise."""
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": _ends(tokenizer)}
    if tokenizer.pad is not None:
        ids["pad_token_id"] = tokenizer.pad
    return {**ids, "do_sample": True, "temperature": 0.8, "top_p": 0.95}


def _write_tokenizer(tokenizer: Tokenizer, positions: int, folder: Path) -> None:
    """tokenizer.json, which puts the beginning token before a text, and what transformers wants beside it.

    Names of control tokens stay text in transformers too, unless a chat template needs them read: it writes names.
    """

    def word(token: int) -> str:
        return str(tokenizer.bpe.id_to_token(token))

    template = tokenizer.beside.template
    source = tokenizer.plain if template is None else tokenizer.bpe
    bpe, bos = Bpe.from_str(source.to_str()), word(tokenizer.bos)
    bpe.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos)])
    (folder / TOKENIZER).write_text(bpe.to_str(), encoding="utf-8")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": word(tokenizer.eos),
        "clean_up_tokenization_spaces": False,
        "model_max_length": positions,
        "split_special_tokens": template is None,
    }
    if tokenizer.pad is not None:
        settings["pad_token"] = word(tokenizer.pad)
    write_json(folder / TOKENIZER_CONFIG, settings)
    if template is not None:
        (folder / TEMPLATE).write_text(template, encoding="utf-8")


def differences(config: ModelConfig, tokenizer: Tokenizer) -> list[str]:
    """What transformers does otherwise with such a folder, a line each."""
    found = []
    if tokenizer.beside.template is not None:
        found.append(
            "In transformers a text that spells a control token becomes one: its chat template is read so. Give "
            "split_special_tokens=True for texts that are not yours."
        )
    if config.rms_norm_eps != LATENT_EPS:
        found.append(
            f"transformers norms the latents with {LATENT_EPS:g} instead of rms_norm_eps, here "
            f"{config.rms_norm_eps:g}: its logits differ by some 1e-4 of the largest."
        )
    return found
