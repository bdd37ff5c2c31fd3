"""Two questions about expert parallelism: does its overhead stay away as clusters grow, and which schedule hides it?

The report says that at a constant ratio of computation to communication all-to-all costs next to nothing however
large the model [§3.2.1]. `curve` grows the model with the cluster, four experts a rank, and asks a steady pair of
chunks and a whole step; its variants take away what the claim rests on, one thing at a time. `schedules` gives every
rule the same cards, batch and experts, and counts the transfers that critics of two-way pipelines leave out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from counterflow.config.model import ModelConfig
from counterflow.errors import ConfigError, ScheduleError
from counterflow.plan.cost import Costs, predict, without_transfers
from counterflow.plan.hardware import FABRICS, Hardware
from counterflow.plan.job import Job, Layout
from counterflow.plan.memory import memory
from counterflow.plan.published import pair_s
from counterflow.plan.routing import UNIFORM, Routing
from counterflow.plan.search import by_cells
from counterflow.plan.stages import units
from counterflow.schedule import SCHEDULES

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
PIPELINE = 16
LIMITED_NODES = 4
"""A token's experts lie on at most so many [§2.1.2]."""


@dataclass(frozen=True)
class Variant:
    """What a curve assumes."""

    name: str
    fabric: str = ""
    """Empty: the hardware's own."""
    node_limit: bool = True
    precision: str = ""
    """Empty: the job's."""
    narrower: int = 1
    """Times as many experts, chosen and in all, each so much narrower: as much computation, more rows."""


VARIANTS: tuple[Variant, ...] = (
    Variant("as the report"),
    Variant("bf16 dispatch and products", precision="bf16"),
    Variant("no limit to four nodes", node_limit=False),
    Variant("experts a quarter as wide, four times as many", narrower=4, node_limit=False),
    Variant("ethernet 100G for 8 cards", fabric="ethernet"),
)


@dataclass(frozen=True)
class Point:
    """One size of a curve. Overheads are shares of the time that the same takes with transfers for nothing."""

    gpus: int
    experts: int
    alone: float
    """Overhead of a layer whose transfers nothing hides: their seconds over those of its computation."""
    exposed: float
    """Overhead of a steady pair of chunks: what its computation leaves uncovered."""
    pair: float
    """The same with the multiprocessors that transfers take from computation."""
    step: float | None
    """Overhead of a whole DualPipe step on 16 pipeline ranks; None where the cluster is too small for one."""


def grown(model: ModelConfig, expert_ranks: int, gpus_per_node: int, variant: Variant) -> ModelConfig:
    """The model with four experts a rank, a group a node, and the variant's changes."""
    nodes = max(1, expert_ranks // gpus_per_node)
    limited = min(LIMITED_NODES, nodes) if variant.node_limit else nodes
    return replace(
        model,
        num_routed_experts=4 * expert_ranks * variant.narrower,
        num_experts_per_token=model.num_experts_per_token * variant.narrower,
        moe_intermediate_size=model.moe_intermediate_size // variant.narrower,
        num_groups=nodes,
        num_limited_groups=limited,
    )


def curve(job: Job, hardware: Hardware, variant: Variant, sizes: Sequence[int] = SIZES) -> list[Point]:
    """A variant's points."""
    fabric = FABRICS[variant.fabric] if variant.fabric else hardware.fabric
    hardware = replace(hardware, fabric=fabric)
    return [_point(job, hardware, variant, gpus) for gpus in sizes]


def _point(job: Job, hardware: Hardware, variant: Variant, gpus: int) -> Point:
    original, model = job.model, grown(job.model, gpus, hardware.card.gpus_per_node, variant)
    job = replace(job, model=model, precision=variant.precision or job.precision)
    costs = Costs(job, Layout(1, gpus, gpus, recompute="projections"), hardware)
    free = without_transfers(costs)
    lone, computed = costs.lone_layer_s(), free.lone_layer_s()
    step = None
    if gpus >= 2 * PIPELINE:
        ranks = gpus // PIPELINE
        smaller = grown(original, ranks, hardware.card.gpus_per_node, variant)
        of_step = replace(job, batch_size=ranks * 120, model=smaller)
        whole = replace(costs, job=of_step, layout=Layout(PIPELINE, ranks, ranks, recompute="projections"))
        step = by_cells(whole) / by_cells(without_transfers(whole)) - 1
    pair, covered = pair_s(costs), pair_s(replace(costs, free_transfers=True))
    return Point(
        gpus, model.num_routed_experts, lone / computed - 1, pair / covered - 1, pair / pair_s(free) - 1, step
    )


def contenders() -> Iterator[tuple[str, int, int | None]]:
    """(schedule, pipeline ranks, stages a rank): all on 16 ranks; with two stages on each also on half of them, as
    Table 2 counts; where the number of stages may be chosen, with 32 in all."""
    for name, row in SCHEDULES.items():
        if row.choices:
            yield from ((name, 2 * PIPELINE // per_rank, per_rank) for per_rank in row.choices)
        else:
            yield from ((name, ranks, None) for ranks in sorted({PIPELINE, PIPELINE // row.stages_per_rank}))


@dataclass(frozen=True)
class Row:
    """A schedule on the same cards."""

    layout: Layout
    seconds: float
    idle_s: float
    free_s: float
    """Of the step with transfers for nothing."""
    free_idle_s: float
    peak_bytes: float


def schedules(
    job: Job, hardware: Hardware, gpus: int, expert: int, recompute: str, routing: Routing = UNIFORM
) -> list[Row]:
    """Every contender on `gpus` cards.   Fails: ConfigError where none can be."""
    rows: list[Row] = []
    most = len(units(job.model))
    for name, pipeline, per_rank in contenders():
        data = gpus // pipeline
        if gpus % pipeline or data % expert or job.batch_size % data:
            continue
        layout = Layout(pipeline, data, expert, 1, name, per_rank, recompute)
        costs = Costs(job, layout, hardware, routing)
        try:
            if layout.rule(layout.microbatches(job)).stages > most:
                continue
        except ScheduleError:
            continue
        step, free = predict(costs), predict(without_transfers(costs))
        peak = max(one.total for one in memory(costs, step.schedule, step.plans))
        rows.append(Row(layout, step.seconds, step.idle_s, free.seconds, free.idle_s, peak))
    if not rows:
        raise ConfigError(
            f"no schedule can be compared on {gpus} GPUs with --expert {expert} and a batch of {job.batch_size}; take "
            f"a multiple of {16 * expert} GPUs, and a batch of {32 * max(1, gpus // 8)} or a multiple."
        )
    return rows


def curves(job: Job, hardware: Hardware, sizes: Sequence[int] = SIZES) -> dict[str, list[Point]]:
    """All variants."""
    return {variant.name: curve(job, hardware, variant, sizes) for variant in VARIANTS}
