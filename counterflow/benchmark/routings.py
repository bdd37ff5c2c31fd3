"""Experts drawn for tokens as training meets them and as it should not: what benches of dispatch send."""

import torch
from torch import Tensor

from counterflow.errors import ConfigError, nearest

ROUTINGS = ("uniform", "node-limited", "skewed", "one expert", "empty rank")


def drawn(
    routing: str, tokens: int, experts: int, top: int, ranks: int, generator: torch.Generator
) -> Tensor:
    """Distinct experts of each token, (tokens, top).

    node-limited: of one half of the ranks; skewed: the first ones far more often; one expert: the first is every
    token's; empty rank: none of the first rank's.   Fails: ConfigError on another word.
    """
    if routing not in ROUTINGS:
        raise ConfigError(f"routing is '{routing}'; {nearest(routing, ROUTINGS)}")
    scores = torch.rand(tokens, experts, generator=generator)
    if routing == "node-limited":
        half = torch.randint(2, (tokens, 1), generator=generator)
        scores += (torch.arange(experts) // (experts // 2) == half) * 2.0
    elif routing == "skewed":
        scores *= torch.arange(1, experts + 1).float() ** -0.5
    elif routing == "one expert":
        scores[:, 0] = 2.0
    elif routing == "empty rank":
        scores[:, : experts // ranks] = -1.0
    return scores.topk(top, dim=-1).indices
