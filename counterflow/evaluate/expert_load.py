"""Which experts a model uses for which text, and a picture of it.

Load is relative: tokens given to an expert over what each would get if all got the same. An expert that one kind of
text uses several times more than another has specialised, which is what balancing without an auxiliary loss is said to
leave room for. Counting moves nothing: the routers' biases stay as they are.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterflow.config.run import Source
from counterflow.data.corpus import documents
from counterflow.data.tokenizer import Tokenizer
from counterflow.errors import ConfigError, DataError
from counterflow.model.transformer import Transformer
from counterflow.progress import watched

FULL = 10.0
"""The relative load at the end of the colour scale, as in the report."""
PICTURES = (".png", ".svg", ".pdf")
"""How the name of a picture may end."""


@torch.no_grad()
def counts(
    model: Transformer, tokenizer: Tokenizer, source: Source, most_tokens: int, window: int = 0
) -> Int[Tensor, "L E"]:
    """Tokens given to each expert of each MoE layer of the main model, over the first tokens of a source, of which the
    model sees a `window` at once; 0: its positions."""
    config = model.config
    window = window or config.max_positions
    total = torch.zeros(config.num_moe_layers, config.num_routed_experts, dtype=torch.int64)
    left = most_tokens
    for document in watched(documents(source), f"reading {source.path}"):
        ids = [tokenizer.bos, *tokenizer.encode(document.text)][:left]
        left -= len(ids)
        for start in range(0, len(ids), window):
            tokens = torch.tensor([ids[start : start + window]], device=model.head.device)
            _, flows = model.trunk(tokens, model.context(*tokens.shape))
            total += torch.stack([flow.counts.cpu() for flow in flows if flow.counts is not None])
        if left <= 0:
            break
    if not total.sum():
        raise DataError(f"'{source.path}' holds no text; give files with text, or the field that holds it.")
    return total


def relative_load(counted: Int[Tensor, "*L E"]) -> Float[Tensor, "*L E"]:
    """1: as many tokens as if all experts had the same. [Fig. 9]"""
    return counted.double() / counted.double().mean(-1, keepdim=True)


def expert_load(
    model: Transformer, tokenizer: Tokenizer, domains: Mapping[str, Source], most_tokens: int, window: int = 0
) -> dict[str, Int[Tensor, "L E"]]:
    """The counts of every domain.   Fails: ConfigError for a model without experts, DataError."""
    if not model.config.num_moe_layers:
        raise ConfigError("the model has no layer with experts; there is no load to measure.")
    return {name: counts(model, tokenizer, source, most_tokens, window) for name, source in domains.items()}


def draw(loads: Mapping[str, Float[Tensor, "L E"]], first_layer: int, path: Path) -> None:
    """A picture, of a form in PICTURES: one strip a layer, a row a domain, a column an expert."""
    from matplotlib.figure import Figure

    names = list(loads)
    layers, experts = loads[names[0]].shape
    figure = Figure(
        figsize=(max(6.0, 0.12 * experts), 1.0 + layers * (0.3 + 0.22 * len(names))), layout="constrained"
    )
    axes = figure.subplots(layers, 1, squeeze=False, sharex=True)[:, 0]
    for layer, axis in enumerate(axes):
        rows = torch.stack([loads[name][layer] for name in names]).numpy()
        shown = axis.imshow(rows, aspect="auto", vmin=0, vmax=FULL, cmap="viridis", interpolation="nearest")
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set_title(f"layer {first_layer + layer}", fontsize=8, loc="left", pad=2)
    axes[-1].set_xlabel("expert", fontsize=8)
    figure.colorbar(shown, ax=list(axes), label="relative expert load")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
