"""How many ranks and nodes a token's experts lie on: what dispatch sends follows from these expectations.

A token goes once to every rank that has an expert of its, and between nodes once to every node (deduplication, two
hops [§3.2.2]). Expectations are exact for uniform choices; with the group limit they are drawn, since the groups that
are kept are those with the best experts and so nearly all hit; with measured loads a token's choices are taken as
independent, which is right to the second order in a load's share.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb, inf
from random import Random

from counterflow.config.model import ModelConfig
from counterflow.errors import ConfigError
from counterflow.plan.placement import shared

DRAWN_SCORES = 512_000
"""Scores drawn for an expectation: 2,000 tokens of 256 experts, which is within 0.3 %."""


@dataclass(frozen=True)
class Routing:
    """Whose experts tokens choose. Without loads, uniformly among those that the model's groups allow."""

    loads: tuple[float, ...] = ()
    """Tokens given to each expert of a layer, measured; empty: uniform."""
    limited: bool = True
    """Whether the model's group limit holds."""

    def __post_init__(self) -> None:
        if self.loads and not (all(load >= 0 for load in self.loads) and 0 < sum(self.loads) < inf):
            raise ConfigError(
                "expert loads must be finite counts from 0 on, not all 0; give a layer's tokens by expert."
            )

    def places(self, model: ModelConfig, count: int) -> float:
        """Distinct ones of `count` equal places (ranks, or nodes) that a token's experts lie on."""
        experts, chosen = model.num_routed_experts, model.num_experts_per_token
        if self.loads:
            return sum(1 - (1 - share) ** chosen for share in self._shares(model, count))
        if self.limited and model.num_limited_groups < model.num_groups:
            return _limited_places(experts, model.num_groups, model.num_limited_groups, chosen, count)
        sizes = Counter(map(len, shared(experts, count)))
        missed = {size: comb(experts - size, chosen) / comb(experts, chosen) for size in sizes}
        return sum(times * (1 - missed[size]) for size, times in sizes.items())

    def imbalance(self, model: ModelConfig, count: int) -> float:
        """The fullest of `count` places' load over the mean; 1 when uniform."""
        return max(self._shares(model, count)) * count if self.loads else 1.0

    def _shares(self, model: ModelConfig, count: int) -> Sequence[float]:
        if len(self.loads) != model.num_routed_experts:
            raise ConfigError(
                f"{len(self.loads)} expert loads for {model.num_routed_experts} experts; give one for each."
            )
        total = sum(self.loads)
        held = shared(len(self.loads), count)
        return [sum(self.loads[expert] for expert in place) / total for place in held]


UNIFORM = Routing()


@lru_cache(maxsize=1024)
def _limited_places(experts: int, groups: int, kept: int, chosen: int, count: int) -> float:
    drawn = _limited(experts, groups, kept, chosen)
    place_of = [place for place, held in enumerate(shared(experts, count)) for _ in held]
    return sum(len({place_of[expert] for expert in token}) for token in drawn) / len(drawn)


@lru_cache(maxsize=64)
def _limited(experts: int, groups: int, kept: int, chosen: int) -> list[list[int]]:
    """The experts of some tokens with even scores, by the report's rule: the groups whose two best sum highest."""
    draw, size = Random(0), experts // groups
    tokens: list[list[int]] = []
    for _ in range(max(100, DRAWN_SCORES // experts)):
        scores = [draw.random() for _ in range(experts)]
        parts = [
            sorted(range(at, at + size), key=scores.__getitem__)[-chosen:] for at in range(0, experts, size)
        ]
        parts.sort(key=lambda part: scores[part[-1]] + scores[part[-2]])
        open_ = [expert for part in parts[-kept:] for expert in part]
        tokens.append(sorted(open_, key=scores.__getitem__)[-chosen:])
    return tokens
