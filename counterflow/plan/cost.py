"""Seconds: of every op from its arithmetic, memory and links; of a step from its ops through the schedule.

Computation is products at a part of the card's peak plus passes at a part of its bandwidth, one after another. A
GPU's host issues kernels ahead of it, so that launches are a clock of their own; on a CPU they take computing time. A
transfer is the slower of its two hops, which flow into each other: between nodes once to each node, within a node
once to each rank [§3.2.2]. Beside a transfer computation has fewer multiprocessors. When each starts is the
simulator's to say; nothing here knows a schedule's order.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from counterflow.config.model import ModelConfig
from counterflow.plan import count
from counterflow.plan.eager import eager
from counterflow.plan.hardware import Hardware
from counterflow.plan.job import Job, Layout
from counterflow.plan.routing import UNIFORM, Routing
from counterflow.plan.stages import stage_plans
from counterflow.plan.work import Work, Workload
from counterflow.schedule.measure import idle
from counterflow.schedule.relation import op_needs
from counterflow.schedule.simulate import makespan, simulate_ops
from counterflow.schedule.weave import weave
from counterflow.schedule.words import (
    TRANSFERS,
    Cell,
    Chunk,
    Kind,
    Lane,
    Op,
    Part,
    Plan,
    Schedule,
    Span,
    StageId,
)

ADAM_PASSES = 4 * 4 + 2 * 2
"""Bytes an owned element costs in an update besides its moments: gradient, master and weight, read or written."""


@dataclass(frozen=True)
class Volumes:
    """Bytes that one rank sends in one transfer, at the fullest rank."""

    network: float
    nvlink: float


@dataclass(frozen=True)
class Costs:
    """Seconds of a job's ops in a layout on some hardware."""

    job: Job
    layout: Layout
    hardware: Hardware
    routing: Routing = UNIFORM
    free_transfers: bool = False
    """Price dispatch and combine at nothing: what a step would take without any."""

    @cached_property
    def load(self) -> Workload:
        """The work of its ops."""
        return Workload(self.job, self.layout, self.routing, self.hardware.card.multiprocessors > 0)

    def work(self, kind: Kind, part: Part, layer: int) -> Work:
        """What an op does, with the passes and kernels of the job's own kind."""
        work = self.load(kind, part, layer)
        moe = part in (Part.ATTN, Part.MLP) and self.job.model.is_moe(layer)
        return eager(self.load, kind, part, moe, work) if self.job.is_eager else work

    def seconds(self, kind: Kind, part: Part, layer: int, beside: bool) -> float:
        """Of an op on the device; `beside` says that a transfer of another chunk runs with it."""
        if part in TRANSFERS:
            return self.transfer(kind, part)
        return _seconds(self, kind, part, self.job.model.is_moe(layer), beside)

    def issue_s(self, kind: Kind, part: Part, layer: int) -> float:
        """Of a GPU's host, to issue an op's kernels; 0 on a CPU, where they are part of the op."""
        if part in TRANSFERS or not self.load.on_gpu:
            return 0.0
        return self.work(kind, part, layer).kernels * self.hardware.card.launch_s

    def computed(self, work: Work, share: float) -> float:
        """Of computation on a share of the multiprocessors; on a CPU with its launches."""
        hardware, card = self.hardware, self.hardware.card
        bandwidth = card.memory_bytes_per_s * hardware.efficiencies.memory
        wide = "fp32" if self.job.precision == "fp32" else "bf16"
        products = 0.0
        if work.products or work.grouped:
            flops = work.products + work.grouped / hardware.efficiencies.grouped_product
            products = flops / (hardware.flops_per_s(self.job.bytes_of.product) * share)
        core = (
            hardware.flops_per_s("fp32")
            if wide == "fp32"
            else card.bf16_flops * hardware.efficiencies.attention
        )
        time = (
            max(products, work.weights / bandwidth)
            + work.passes / bandwidth
            + work.attention / (core * share)
        )
        time += work.wide / (hardware.flops_per_s(wide) * share) if work.wide else 0.0
        return time if self.load.on_gpu else time + work.kernels * card.launch_s

    def volumes(self, kind: Kind, part: Part) -> Volumes:
        """What a transfer sends: dispatch, and combine's backward, may be quantised; the other two never are."""
        model, layout, card = self.job.model, self.layout, self.hardware.card
        spread_out = (part is Part.DISPATCH) == (kind is Kind.F)
        row = model.hidden_size * (self.job.bytes_of.dispatched if spread_out else self.job.bytes_of.combined)
        row += 12 * model.num_experts_per_token if part is Part.DISPATCH else 0  # expert ids and gates
        nodes = card.nodes(layout.expert)
        ranks, uneven = (
            self.routing.places(model, layout.expert),
            self.routing.imbalance(model, layout.expert),
        )
        sent = self.load.tokens * row * uneven
        within = min(layout.expert, card.gpus_per_node)
        network = sent * self.routing.places(model, nodes) * (nodes - 1) / nodes if nodes > 1 else 0.0
        return Volumes(network, sent * ranks * (within - 1) / within)

    def transfer(self, kind: Kind, part: Part) -> float:
        """Seconds of a transfer between expert ranks; 0 where one rank has all experts."""
        if self.layout.expert == 1 or self.free_transfers or kind is Kind.W:
            return 0.0
        return _transfer_seconds(self, kind, part)

    def lone_layer_s(self) -> float:
        """Seconds of one layer with experts, forward and whole backward, nothing beside anything."""
        layer = self.job.model.num_layers - 1
        parts = (Part.ATTN, Part.DISPATCH, Part.MLP, Part.COMBINE)
        ops = [(kind, part, layer) for kind in (Kind.F, Kind.I, Kind.W) for part in parts]
        return max(sum(self.seconds(*op, False) for op in ops), sum(self.issue_s(*op) for op in ops))

    @property
    def send_s(self) -> float:
        """Seconds from a chunk's end until its product is on the next pipeline rank."""
        if self.layout.pipeline == 1:
            return 0.0
        size = self.load.tokens * self.job.model.hidden_size * self.job.bytes_of.hidden
        fabric = self.hardware.fabric
        return fabric.latency_s + size / (fabric.bytes_per_s * self.hardware.efficiencies.collective)

    def tensor_s(self) -> float:
        """Seconds of one layer's gathers and scatters between tensor-parallel ranks, in each of F and I."""
        ranks = self.layout.tensor
        size = 2 * self.load.tokens * ranks * self.job.model.hidden_size * self.job.bytes_of.hidden
        return size * (ranks - 1) / ranks / _nvlink(self.hardware)


def _nvlink(hardware: Hardware) -> float:
    rate = hardware.card.nvlink_bytes_per_s * hardware.efficiencies.nvlink
    return rate or hardware.fabric.bytes_per_s * hardware.efficiencies.network


@lru_cache(maxsize=65536)
def _seconds(costs: Costs, kind: Kind, part: Part, moe: bool, beside: bool) -> float:
    layer = costs.job.model.num_layers - 1 if moe else 0
    share = costs.hardware.compute_share if beside and costs.layout.expert > 1 else 1.0
    time = costs.computed(costs.work(kind, part, layer), share)
    exchanged = part is Part.ATTN and kind is not Kind.W and costs.layout.tensor > 1
    return time + (costs.tensor_s() if exchanged else 0.0)


@lru_cache(maxsize=65536)
def _transfer_seconds(costs: Costs, kind: Kind, part: Part) -> float:
    volumes, hardware = costs.volumes(kind, part), costs.hardware
    between = volumes.network / (hardware.fabric.bytes_per_s * hardware.efficiencies.network)
    latency = hardware.fabric.latency_s if volumes.network else hardware.card.launch_s
    return max(between, volumes.nvlink / _nvlink(hardware)) + latency


@dataclass(frozen=True)
class Update:
    """Seconds between the last backward and the next forward."""

    reduce_s: float
    gather_s: float
    adam_s: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.reduce_s + self.gather_s + self.adam_s


def holders(layout: Layout, schedule: Schedule) -> tuple[int, int]:
    """Ranks that hold a dense parameter, and that hold an expert's: data ranks, twice with a mirror."""
    return (
        layout.data * layout.tensor * schedule.pipes,
        layout.data * layout.tensor * schedule.pipes // layout.expert,
    )


def held_parameters(
    model: ModelConfig, plans: tuple[Plan, ...], held: list[StageId], expert: int
) -> tuple[float, float]:
    """(dense, expert) parameters of a rank that holds these stages; shared embedding and head once."""
    parts = {part for stage in held for part in plans[stage.index]}
    return _parameters(model, frozenset(parts), expert)


@lru_cache(maxsize=65536)
def _parameters(model: ModelConfig, parts: frozenset[tuple[Part, int]], expert: int) -> tuple[float, float]:
    width, experts = model.hidden_size, model.num_routed_experts / expert
    dense = sparse = 0.0
    for part, layer in parts:
        if part is Part.ATTN:
            dense += count.layer(model, layer, 0)
            if model.is_moe(layer):
                sparse += experts * 3 * width * model.moe_intermediate_size
        elif part is Part.MERGE:
            dense += 2 * width * width + 3 * width
    heads = [layer for part, layer in parts if part is Part.HEAD]
    embeds = any(part in (Part.EMBED, Part.MERGE) for part, _ in parts)
    dense += (embeds + bool(heads)) * model.vocab_size * width + (0 in heads) * width
    return dense, sparse


def update(costs: Costs, schedule: Schedule, plans: tuple[Plan, ...]) -> Update:
    """The slowest rank's gradient sums, Adam step and gathering of weights (ZeRO-1)."""
    job, layout, hardware, bytes_ = costs.job, costs.layout, costs.hardware, costs.job.bytes_of
    every = [
        held_parameters(job.model, plans, schedule.held(rank), layout.expert)
        for rank in range(schedule.ranks)
    ]
    dense, sparse = max(every, key=sum)
    owners, expert_owners = holders(layout, schedule)
    bandwidth = hardware.card.memory_bytes_per_s * hardware.efficiencies.update
    owned = dense / owners + sparse / expert_owners
    adam = (
        owned * (ADAM_PASSES + 4 * bytes_.moment) + (dense + sparse) * 2 * bytes_.gradient
    )  # norm, and zeroing
    per_node = max(1, min(hardware.card.gpus_per_node // layout.tensor, layout.data))
    expert_per_node = max(1, per_node // layout.expert)

    def moved(bytes_per_element: float) -> float:
        return _ring(hardware, dense * bytes_per_element, owners, per_node) + _ring(
            hardware, sparse * bytes_per_element, expert_owners, expert_per_node
        )

    return Update(moved(bytes_.gradient), moved(bytes_.weight), adam / bandwidth)


def _ring(hardware: Hardware, size: float, ranks: int, per_node: int) -> float:
    """Seconds to scatter sums of, or to gather, `size` bytes over ranks of which `per_node` share a node.

    Within a node first, so that each card's rail carries its own part of the node's sum alone.
    """
    if ranks == 1:
        return 0.0
    per_node, eff, fabric = min(per_node, ranks), hardware.efficiencies, hardware.fabric
    nodes = ranks / per_node
    within = size * (per_node - 1) / per_node / _nvlink(hardware)
    between = size / per_node * (nodes - 1) / nodes / (fabric.bytes_per_s * eff.collective)
    return within + between + fabric.latency_s * ranks


@dataclass(frozen=True)
class Step:
    """One optimizer step, predicted."""

    costs: Costs
    schedule: Schedule
    plans: tuple[Plan, ...]
    spans: list[Span]
    """Of the simulated micro-batches; `scaled` says how many the step has."""
    pipeline_s: float
    """Of all micro-batches."""
    update: Update

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.pipeline_s + self.update.seconds

    @property
    def idle_s(self) -> float:
        """Mean over the ranks of the time without an op: the bubble."""
        return sum(self.idle) / len(self.idle)

    @cached_property
    def idle(self) -> list[float]:
        """Each rank's time without an op."""
        return idle(self.spans, self.schedule.ranks)

    @property
    def tokens_per_s(self) -> float:
        """Of one GPU."""
        return self.costs.job.tokens_per_step / self.seconds / self.costs.layout.gpus

    def mfu(self, causal: bool = True) -> float:
        """Model FLOPs, MTP left out as published ones do, over the card's bf16 peak."""
        job = self.costs.job
        flops = count.flops_per_token(job.model, job.sequence_length, causal)
        peak = self.costs.hardware.card
        return self.tokens_per_s * flops / (peak.fp32_flops if job.precision == "fp32" else peak.bf16_flops)


def paired(schedule: Schedule) -> frozenset[Chunk]:
    """The chunks that run with another chunk in their cell."""
    return frozenset(chunk for row in schedule.rows for cell in row if len(cell) > 1 for chunk in cell)


def predict(costs: Costs, placement: str = "", schedule: Schedule | None = None) -> Step:
    """The step, simulated op by op.   `schedule`: the layout's own, or this.   Fails: ConfigError, ScheduleError."""
    schedule = schedule or costs.layout.rule(costs.layout.microbatches(costs.job))
    plans = stage_plans(costs.job.model, schedule.stages, placement)
    spans = simulated(costs, schedule, plans, costs.send_s)
    return Step(costs, schedule, plans, spans, makespan(spans), update(costs, schedule, plans))


def cell_seconds(costs: Costs, cell: Cell, plans: Mapping[StageId, Plan]) -> float:
    """Seconds of a cell by itself, its ops woven on both lanes and issued in that order."""
    free, host = dict.fromkeys(Lane, 0.0), 0.0
    done: dict[tuple[Kind, StageId, tuple[Part, int]], float] = {}
    for op in weave(cell, plans):
        stage = op.chunk.stage
        before = op_needs(op, plans[stage])
        kind = Kind.F if op.kind is Kind.F else Kind.I
        begin = max(free[op.lane], host, 0.0 if before is None else done.get((kind, stage, before), 0.0))
        host += costs.issue_s(op.kind, op.part, op.layer)
        free[op.lane] = end = max(begin + costs.seconds(op.kind, op.part, op.layer, len(cell) > 1), host)
        done[op.kind, stage, (op.part, op.layer)] = end
    return max(free.values())


def simulated(costs: Costs, schedule: Schedule, plans: tuple[Plan, ...], send_s: float) -> list[Span]:
    """Spans of all ops of a schedule, priced."""
    beside = paired(schedule)
    by_stage: Mapping[StageId, Plan] = {stage: plans[stage.index] for stage in schedule.rank_of}
    known: dict[tuple[Kind, Part, int, bool], float] = {}

    def seconds(rank: int, op: Op) -> float:
        key = (op.kind, op.part, op.layer, op.chunk in beside)
        if key not in known:
            known[key] = costs.seconds(*key)
        return known[key]

    def issue(op: Op) -> float:
        return costs.issue_s(op.kind, op.part, op.layer)

    return simulate_ops(schedule, by_stage, seconds, send_s, issue)


def without_transfers(costs: Costs) -> Costs:
    """The same with dispatch and combine for nothing, and all multiprocessors for computation."""
    return replace(
        costs, free_transfers=True, hardware=replace(costs.hardware, communication_multiprocessors=0)
    )
