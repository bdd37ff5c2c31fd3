"""Bytes on every rank: what stays, what a schedule keeps in flight, what transfers need; the peak, and when it is.

In flight is counted chunk by chunk through a rank's row: a forward begins to hold its stage's activations, the
backward for input changes them, layer by layer, for what the weight gradients read, and the backward for weights
lets go of that. A pair's forward counts before its backward lets go, as `schedule.measure` counts. Not counted:
fragmentation of the allocator.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from counterflow.config.backends import BACKENDS, LOCAL
from counterflow.config.run import Parallel
from counterflow.plan.cost import Costs, held_parameters, holders
from counterflow.plan.work import Kept, stage_kept
from counterflow.schedule.words import Kind, Part, Plan, Schedule, StageId


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its peak."""

    rank: int
    weights: float
    gradients: float
    masters: float
    moments: float
    averages: float
    """Of the weights (EMA), where the ranks are a CPU's; beside a GPU they are in the host's memory."""
    checkpoint: float
    """The copy of what is written behind the training, where the ranks are a CPU's."""
    host: float
    """In the memory of a GPU's host, for this rank: averages and the copy of a checkpoint; not in the total."""
    activations: float
    """In flight at the peak, owed weight gradients included."""
    transient: float
    """Of the op that is running: recomputed tensors, logits."""
    buffers: float
    """Of dispatch and of pipeline channels."""
    reserved: float
    peak_cell: int
    """Where in the rank's row the peak is."""

    @property
    def total(self) -> float:
        """All of it."""
        states = self.weights + self.gradients + self.masters + self.moments + self.averages + self.checkpoint
        return states + self.activations + self.transient + self.buffers + self.reserved

    @property
    def needed(self) -> float:
        """All but the copy of a checkpoint: without it training waits while one is written."""
        return self.total - self.checkpoint


def memory(costs: Costs, schedule: Schedule, plans: tuple[Plan, ...], backend: str = "") -> list[Memory]:
    """Every rank's peak."""
    found = {stage.index: stage_kept(costs.load, plans[stage.index]) for stage in schedule.rank_of}
    return [_of_rank(costs, schedule, plans, rank, found, backend) for rank in range(schedule.ranks)]


def _of_rank(
    costs: Costs,
    schedule: Schedule,
    plans: tuple[Plan, ...],
    rank: int,
    found: Mapping[int, Kept],
    backend: str,
) -> Memory:
    job, layout, bytes_ = costs.job, costs.layout, costs.job.bytes_of
    stages = schedule.held(rank)
    dense, sparse = held_parameters(job.model, plans, stages, layout.expert)
    owners, expert_owners = holders(layout, schedule)
    owned = dense / owners + sparse / expert_owners
    activations, cell = 0.0, 0
    for state in in_flight(schedule, rank):
        total = sum(
            whole * found[s.index].whole + owed * found[s.index].owed for s, whole, owed in state.counts
        )
        if total > activations:
            activations, cell = total, state.cell
    parts = {part for stage in stages for part, _ in plans[stage.index]}
    averages = owned * 4 * job.averaged
    copy = owned * ((bytes_.master or bytes_.weight) + 2 * bytes_.moment) + averages
    on_gpu = costs.load.on_gpu
    return Memory(
        rank=rank,
        weights=(dense + sparse) * bytes_.weight,
        gradients=(dense + sparse) * bytes_.gradient,
        masters=owned * bytes_.master,
        moments=owned * 2 * bytes_.moment,
        averages=0.0 if on_gpu else averages,
        checkpoint=0.0 if on_gpu else copy,
        host=averages + copy if on_gpu else 0.0,
        activations=activations,
        transient=_transient(costs, parts),
        buffers=_buffers(costs, backend, Part.DISPATCH in parts),
        reserved=costs.hardware.card.reserved_bytes,
        peak_cell=cell,
    )


def _transient(costs: Costs, parts: set[Part]) -> float:
    """The largest op's own tensors: attention's expanded queries, keys, values and gradients, or pairs, or logits."""
    load, model, hidden = costs.load, costs.job.model, costs.job.bytes_of.hidden
    sizes = load.sizes
    attention = 2 * load.tokens * (2 * sizes.queries + 3 * sizes.values) * hidden
    pairs = load.tokens * sizes.pairs * (2 * model.hidden_size + 3 * model.moe_intermediate_size) * hidden
    block = min(load.head_block, 4 * load.tokens * model.vocab_size) * (hidden / 8 if load.on_gpu else 1)
    return max(
        attention if Part.ATTN in parts else 0.0,
        pairs if Part.MLP in parts else 0.0,
        2 * block if Part.HEAD in parts else 0.0,
    )


def _buffers(costs: Costs, backend: str, dispatches: bool) -> float:
    load, layout, model = costs.load, costs.layout, costs.job.model
    row = BACKENDS[backend or (Parallel.dispatch if layout.expert > 1 else LOCAL)]
    rows = load.tokens * (layout.expert if row.worst_case else load.sizes.arrived)
    row_bytes = model.hidden_size * costs.job.bytes_of.combined
    channels = 4 * 2 if layout.pipeline > 1 else 0  # x and dx, to and fro, two buffers each
    return dispatches * row.regions * rows * row_bytes + channels * load.tokens * model.hidden_size * 2


Counts = tuple[tuple[StageId, int, int], ...]
"""Each stage with its whole and its owed micro-batches."""


@dataclass(frozen=True)
class InFlight:
    """How many micro-batches of each stage are held whole and owed, and from which cell on."""

    counts: Counts
    cell: int


@lru_cache(maxsize=4096)
def _cached(of: "_Same", rank: int) -> tuple[InFlight, ...]:
    schedule, now = of.schedule, {stage: [0, 0] for stage in of.schedule.held(rank)}
    seen: dict[Counts, int] = {}
    for place, cell in enumerate(schedule.rows[rank]):
        for chunk in sorted(cell, key=lambda chunk: chunk.kind is not Kind.F):
            held = now[chunk.stage]
            held[0] += {Kind.F: 1, Kind.I: -1}.get(chunk.kind, 0)
            held[1] += chunk.kind is Kind.I
            state = tuple((stage, whole, owed) for stage, (whole, owed) in now.items())
            seen.setdefault(state, place)
            held[0] -= chunk.kind is Kind.B
            held[1] -= chunk.kind is Kind.W
    return tuple(InFlight(counts, place) for counts, place in _largest(seen))


def in_flight(schedule: Schedule, rank: int) -> tuple[InFlight, ...]:
    """The states of a rank's row of which none is less than another: one of them is the peak, whatever chunks weigh."""
    return _cached(_Same(schedule), rank)


def _largest(seen: Mapping[Counts, int]) -> list[tuple[Counts, int]]:
    """The states that no other covers."""
    best: list[tuple[Counts, int]] = []
    for counts, place in sorted(
        seen.items(), key=lambda item: -sum(whole + owed for _, whole, owed in item[0])
    ):
        if not any(all(m[1] <= o[1] and m[2] <= o[2] for m, o in zip(counts, other)) for other, _ in best):
            best.append((counts, place))
    return best


class _Same:
    """A schedule that is looked up as the object that it is rather than by its million cells."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __hash__(self) -> int:
        return id(self.schedule)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.schedule is other.schedule
