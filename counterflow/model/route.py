"""Which experts a token goes to, and how their outputs are weighed.

The bias picks and the score weighs: experts are chosen by score + bias, under a limit of groups per token,
and the gates are made of the scores alone, so that balancing load does not bend the output. Losing groups are
masked with −inf, not with 0: a kept expert whose biased score is negative must still win over a masked one.
transformers masks with −inf too.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from counterflow.config.model import ModelConfig


def affinities(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Sigmoid of the router's logits, each expert for itself. [Eq. 15]"""
    return torch.sigmoid(logits)


def choose(scores: Float[Tensor, "T E"], bias: Float[Tensor, "E"], config: ModelConfig) -> Int[Tensor, "T K"]:
    """The K best experts by score + bias in the best groups; nothing is differentiated. [Eq. 14, Eq. 16]"""
    biased = scores.detach() + bias
    if config.num_limited_groups < config.num_groups:
        biased = limit_groups(biased, config.num_groups, config.num_limited_groups)
    return biased.topk(config.num_experts_per_token, dim=-1, sorted=False).indices


def limit_groups(biased: Float[Tensor, "T E"], groups: int, limit: int) -> Float[Tensor, "T E"]:
    """−inf where the group is not among the `limit` best by the sum of its two best. [§2.1.2 node limit]"""
    grouped = biased.unflatten(-1, (groups, -1))
    best = grouped.topk(2, dim=-1).values.sum(-1).topk(limit, dim=-1, sorted=False).indices
    lost = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, False)
    return grouped.masked_fill(lost[..., None], float("-inf")).flatten(-2)


def gates(scores: Float[Tensor, "T E"], ids: Int[Tensor, "T K"], scale: float) -> Float[Tensor, "T K"]:
    """The chosen experts' scores, over their sum, times the routed scaling factor. [Eq. 13]"""
    chosen = scores.gather(-1, ids)
    return chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * scale


def loads(ids: Int[Tensor, "T K"], num_experts: int) -> Int[Tensor, "E"]:
    """How many tokens each expert was given, int64: counts are summed over the batch and must stay exact.

    Not `bincount`, for which a GPU asks the host how large the largest id is.
    """
    flat = ids.flatten()
    return flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))
