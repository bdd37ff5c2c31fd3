"""Redundant experts and where they live, from measured load, for inference. [§3.4 redundant experts]

The heaviest experts get more than one copy and the copies are packed so that all GPUs bear alike. Where the groups of
experts divide among the nodes, whole groups are packed to nodes first, so that a token's copies stay within the nodes
that group-limited routing already chose; copies are then made and packed inside each node. Greedy all along: the
heaviest first, to the lightest place that has room, ties to the lowest number, so the same loads give the same map.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from itertools import pairwise
from math import isfinite

from counterflow.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """One layer's map. Slots are numbered GPU by GPU, node by node."""

    experts: tuple[int, ...]
    """The expert in each slot."""
    gpus: int
    loads: tuple[float, ...]
    """Measured, by expert."""

    @property
    def copies(self) -> tuple[int, ...]:
        """Of each expert."""
        return tuple(self.experts.count(expert) for expert in range(len(self.loads)))

    @property
    def gpu_loads(self) -> list[float]:
        """What each GPU bears when an expert's copies share its tokens evenly."""
        copies = self.copies
        each = [self.loads[expert] / copies[expert] for expert in self.experts]
        return [sum(each[slot] for slot in held) for held in shared(len(each), self.gpus)]

    @property
    def imbalance(self) -> float:
        """The fullest GPU's load over the mean; 1 is even."""
        return max(self.gpu_loads) * self.gpus / (sum(self.loads) or 1.0)


def place(loads: Sequence[float], slots: int, groups: int, nodes: int, gpus: int) -> Placement:
    """A layer's experts on `slots` places of `gpus` on `nodes`.   Fails: ConfigError where sizes do not divide."""
    _require(loads, slots, groups, nodes, gpus)
    if groups % nodes:
        groups = nodes = 1  # no whole groups for a node: copies go anywhere
    size, per_node = len(loads) // groups, slots // nodes
    group_loads = [sum(loads[group * size : (group + 1) * size]) for group in range(groups)]
    experts: list[int] = []
    for packed in pack(group_loads, nodes):
        here = [group * size + at for group in packed for at in range(size)]
        copied = [here[at] for at in replicate([loads[expert] for expert in here], per_node)]
        shares = [loads[expert] / copied.count(expert) for expert in copied]
        experts += [copied[slot] for pack_ in pack(shares, gpus // nodes) for slot in pack_]
    return Placement(tuple(experts), gpus, tuple(loads))


def unreplicated(loads: Sequence[float], gpus: int) -> Placement:
    """The experts in order, one copy each: how it is before."""
    return Placement(tuple(range(len(loads))), gpus, tuple(loads))


def shared(count: int, places: int) -> list[range]:
    """The indices of `count` things that each of `places` holds, in order; the first ones hold one more where they do
    not divide."""
    size, more = divmod(count, places)
    starts = [place * size + min(place, more) for place in range(places + 1)]
    return [range(*ends) for ends in pairwise(starts)]


def pack(loads: Sequence[float], packs: int) -> list[list[int]]:
    """Indices in `packs` equally long lists of nearly equal load, the heaviest placed first."""
    room = len(loads) // packs
    if room == 1:
        return [[index] for index in range(packs)]
    found: list[list[int]] = [[] for _ in range(packs)]
    totals = [0.0] * packs
    for index in sorted(range(len(loads)), key=lambda index: -loads[index]):
        lightest = min((pack_ for pack_ in range(packs) if len(found[pack_]) < room), key=totals.__getitem__)
        found[lightest].append(index)
        totals[lightest] += loads[index]
    return found


def replicate(loads: Sequence[float], slots: int) -> list[int]:
    """Indices of all copies: one each, then again and again one more of whichever bears most a copy."""
    found = list(range(len(loads)))
    heap = [(-load, index, 1) for index, load in enumerate(loads)]
    heapify(heap)
    while len(found) < slots:
        _, index, copies = heap[0]
        found.append(index)
        heapreplace(heap, (-loads[index] / (copies + 1), index, copies + 1))
    return found


def _require(loads: Sequence[float], slots: int, groups: int, nodes: int, gpus: int) -> None:
    if not loads or min(loads) < 0 or not isfinite(sum(loads)):
        raise ConfigError(
            "expert loads are empty or negative or beyond all numbers; give each expert's tokens, from 0 on."
        )
    if min(slots, groups, nodes, gpus) < 1 or len(loads) % groups or gpus % nodes or slots % gpus:
        raise ConfigError(
            f"{len(loads)} experts in {groups} groups, {slots} slots on {gpus} GPUs of {nodes} nodes; groups must "
            "divide the experts, nodes the GPUs and GPUs the slots."
        )
    if slots < len(loads):
        raise ConfigError(
            f"{slots} slots for {len(loads)} experts; every expert needs one: take {len(loads)} or more."
        )
