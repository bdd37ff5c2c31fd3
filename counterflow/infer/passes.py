"""Passes of the model over rows of a cache: the trunk's, and one MTP module's. The layers are the model's own."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterflow.infer.attend import attend
from counterflow.infer.cache import Cache, Rows
from counterflow.model.layer import Context, Layer
from counterflow.model.mtp import MtpModule
from counterflow.model.transformer import Transformer


def run_trunk(model: Transformer, tokens: Int[Tensor, "T"], rows: Rows, cache: Cache) -> Float[Tensor, "T D"]:
    """Hidden states after the final norm, each row at its position of its sequence."""
    h = model.embed(tokens)
    for index, layer in enumerate(model.layers):
        h = _run_layer(model, layer, h, rows, cache, index)
    return model.norm(h)


def run_module(
    model: Transformer,
    depth: int,
    hidden: Float[Tensor, "T D"],
    tokens: Int[Tensor, "T"],
    rows: Rows,
    cache: Cache,
) -> Float[Tensor, "T D"]:
    """Hidden states of MTP depth `depth` (from 0) after the module's norm.

    `hidden` is the depth before's at the rows' positions, `tokens` those that stand depth + 1 further on.
    """
    module = model.mtp[depth]
    assert isinstance(module, MtpModule), "a depth is an MTP module"
    h = module.merge(hidden, model.embed(tokens), None)
    h = _run_layer(model, module.layer, h, rows, cache, model.config.num_layers + depth)
    return module.norm(h)


def logits_of(model: Transformer, h: Float[Tensor, "T D"]) -> Float[Tensor, "T V"]:
    """The head's logits in fp32."""
    return (h @ model.head.t()).float()


def _run_layer(
    model: Transformer, layer: torch.nn.Module, h: Tensor, rows: Rows, cache: Cache, index: int
) -> Float[Tensor, "T D"]:
    assert isinstance(layer, Layer), "the trunk is made of layers"
    context = Context(1, rows.rope, model.dispatcher, sequence_scale=0.0)
    h = h + attend(layer.attention, layer.attn_norm(h), rows, cache, index)
    return layer.combine(layer.mlp(layer.dispatch(layer.feed(h, context)))).h
