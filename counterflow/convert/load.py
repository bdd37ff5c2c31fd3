"""A model out of a released folder, in the precision asked for.

The model's memory is made once and untouched; the shards are mapped one after another and copied into it, FP8 blocks
multiplied out tensor by tensor. Every name and shape is compared before the first weight is read.
"""

from pathlib import Path

import torch

from counterflow.config.model import ModelConfig
from counterflow.config.released import from_released, read_json, scales_of
from counterflow.convert.folder import CONFIG
from counterflow.convert.shards import Shards
from counterflow.data.tokenizer import Tokenizer, fitting
from counterflow.data.tokenizer import load as load_tokenizer
from counterflow.data.tokenizer_files import TOKENIZER
from counterflow.model.transformer import Transformer, keep_experts
from counterflow.model.weights import load_released


def load_folder(
    folder: Path, dtype: torch.dtype = torch.float32, part: tuple[int, int] = (0, 1)
) -> tuple[Transformer, Tokenizer]:
    """Model on the CPU, routers' biases in fp32 whatever `dtype`, and its tokenizer.

    `part` (index, parts) of the experts are held, and only these are read.

    Fails: CheckpointError with the tensor's name, ConfigError, DataError.   Cost: the model, and one tensor.
    """
    released = read_json(folder / CONFIG)
    config, scales = from_released(released), scales_of(released)
    with Shards(folder, exponents=scales == "exponents") as shards:
        tokenizer = fitting(load_tokenizer(folder / TOKENIZER), config.vocab_size, str(folder / TOKENIZER))
        model = empty_model(config, dtype, part)
        load_released(model, shards.shapes, shards.read)
    return model, tokenizer


def empty_model(config: ModelConfig, dtype: torch.dtype, part: tuple[int, int] = (0, 1)) -> Transformer:
    """A model, with a part of the experts, with memory for its weights that nothing has touched yet."""
    model = Transformer(config)
    if part[1] > 1:
        keep_experts(model, *part)
    for parameter in model.parameters():
        parameter.data = torch.empty_like(parameter, dtype=dtype)
    return model
