"""Which parts of a model a stage holds: a placement string, or the cut whose heaviest stage is lightest.

A model is a row of units that are not cut: the embedding, each layer, the head, each MTP module with its head. Stages
are runs of units and as uneven as that makes them: an embedding costs nothing, a dense layer little, and an MTP module
is a layer and a head. Not taken: equal numbers of layers, which at a few stages leaves half of the ranks idle.
"""

from collections.abc import Sequence
from typing import NamedTuple

from counterflow.config.model import ModelConfig
from counterflow.errors import ConfigError
from counterflow.plan import count
from counterflow.schedule.words import Part, Plan


class Unit(NamedTuple):
    """Parts that stay together, and the weights that a token is multiplied with there."""

    name: str
    plan: Plan
    cost: float


def units(config: ModelConfig) -> list[Unit]:
    """The whole model in order, MTP modules last."""
    table = config.vocab_size * config.hidden_size
    found = [Unit("embed", ((Part.EMBED, 0),), 0.0)]
    found += [
        Unit("layer", layer_plan(config, index), _cost(config, index)) for index in range(config.num_layers)
    ]
    found.append(Unit("head", ((Part.HEAD, 0),), table))
    for depth in range(1, config.num_mtp_modules + 1):
        index = config.num_layers + depth - 1
        plan = ((Part.MERGE, depth), *layer_plan(config, index), (Part.HEAD, depth))
        found.append(Unit("mtp", plan, 2 * config.hidden_size**2 + _cost(config, index) + table))
    return found


def layer_plan(config: ModelConfig, index: int) -> Plan:
    """The parts of a layer; a dense one has no transfers."""
    if not config.is_moe(index):
        return ((Part.ATTN, index), (Part.MLP, index))
    return ((Part.ATTN, index), (Part.DISPATCH, index), (Part.MLP, index), (Part.COMBINE, index))


def _cost(config: ModelConfig, index: int) -> float:
    return count.layer(config, index, config.num_experts_per_token)


def stage_plans(config: ModelConfig, stages: int, placement: str = "") -> tuple[Plan, ...]:
    """The plan of each of `stages` stages, by the placement or else by cost.   Fails: ConfigError."""
    every = units(config)
    if placement:
        sizes = _read(placement, every, stages)
    elif len(every) < stages:
        raise ConfigError(
            f"{stages} pipeline stages and a model of {len(every)} units (embedding, {config.num_layers} layers, head, "
            f"{config.num_mtp_modules} MTP modules); a stage holds one or more: take fewer stages or more layers."
        )
    else:
        sizes = balanced([unit.cost for unit in every], stages)
    plans, start = [], 0
    for size in sizes:
        plans.append(tuple(part for unit in every[start : start + size] for part in unit.plan))
        start += size
    return tuple(plans)


def balanced(costs: Sequence[float], stages: int) -> list[int]:
    """Sizes of consecutive runs with the least sum of squares, which also keeps the heaviest light."""
    best: list[tuple[float, list[int]]] = [(0.0, [])] + [(float("inf"), [])] * len(costs)
    for _ in range(stages):
        following: list[tuple[float, list[int]]] = [(float("inf"), [])] * (len(costs) + 1)
        for end in range(1, len(costs) + 1):
            load = 0.0
            for start in range(end - 1, -1, -1):
                load += costs[start]
                total = best[start][0] + load * load
                if total < following[end][0]:
                    following[end] = total, [*best[start][1], end - start]
        best = following
    return best[-1][1]


def _read(placement: str, every: Sequence[Unit], stages: int) -> list[int]:
    """Sizes of the stages that a placement such as 'embed 2 | 3 | 3 head | 1mtp' names."""
    names, sizes = [], []
    for stage in placement.split("|"):
        found = [name for word in stage.split() for name in _names(word)]
        names += found
        sizes.append(len(found))
    wanted = [unit.name for unit in every]
    if names != wanted or len(sizes) != stages or 0 in sizes:
        layers, modules = wanted.count("layer"), wanted.count("mtp")
        example = f"embed {layers} | head" + (f" {modules}mtp" if modules else "")
        raise ConfigError(
            f"parallel.placement is '{placement}'; it must name {stages} stages parted by '|', none empty, that hold "
            f"in order embed, {layers} layers, head and {modules} MTP modules, as in '{example}' for two."
        )
    return sizes


def _names(word: str) -> list[str]:
    number = word.removesuffix("mtp")
    if word != number:
        return ["mtp"] * int(number or 1) if (number or "1").isdecimal() else [word]
    return ["layer"] * int(word) if word.isdecimal() else [word]


def without_mtp(plan: Plan, config: ModelConfig) -> Plan:
    """The plan when λ is 0, so that no MTP module runs."""
    kept: list[tuple[Part, int]] = []
    for part, layer in plan:
        module = (
            part is Part.MERGE
            or (part is Part.HEAD and layer)
            or (part is not Part.HEAD and layer >= config.num_layers)
        )
        if not module:
            kept.append((part, layer))
    return tuple(kept)
