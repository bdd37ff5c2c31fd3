"""Every layout of a job on so many cards: those that fit, the best first, and why the others fell out.

Two resolutions, since most layouts need no more than the first: a formula sorts all that fit, whole cells through the
schedule sort the best of those (within 2 % of single ops, at a tenth of their time). Steps of many micro-batches are
simulated twice with few and drawn on in a straight line, because a schedule in its steady state repeats itself.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache

from counterflow.config.model import ModelConfig
from counterflow.errors import ConfigError, ScheduleError
from counterflow.plan.cost import Costs, cell_seconds, update
from counterflow.plan.hardware import Hardware
from counterflow.plan.job import RECOMPUTES, Job, Layout
from counterflow.plan.memory import Memory, memory
from counterflow.plan.routing import UNIFORM, Routing
from counterflow.plan.stages import stage_plans, units
from counterflow.progress import watched
from counterflow.schedule import PLAIN_LOOP, SCHEDULES
from counterflow.schedule.measure import idle
from counterflow.schedule.method import Method
from counterflow.schedule.named import made
from counterflow.schedule.simulate import Costs as ChunkCosts
from counterflow.schedule.simulate import makespan, simulate
from counterflow.schedule.words import OWING, TRANSFERS, Cell, Kind, Plan, Schedule, Span, StageId

MICRO_BATCHES = (1, 2, 4, 8, 16)
FINALISTS = 16
"""Layouts that are simulated by cells."""


@dataclass(frozen=True)
class Pins:
    """What the user has decided; 0 or empty: to be searched."""

    pipeline: int = 0
    data: int = 0
    expert: int = 0
    micro_batch: int = 0
    schedule: str = ""
    recompute: str = ""

    def allow(self, layout: Layout) -> bool:
        """Whether a layout is as was decided."""
        wanted = {name: value for name, value in vars(self).items() if value}
        return all(getattr(layout, name) == value for name, value in wanted.items())


UNDECIDED = Pins()


@dataclass(frozen=True)
class Candidate:
    """A layout that fits."""

    layout: Layout
    seconds: float
    """Of a step; by formula, or by cells once it is a finalist."""
    peak: Memory


@dataclass(frozen=True)
class Found:
    """The answer: the best first, and how many fell out for which reason."""

    best: list[Candidate]
    fitting: int
    fell_out: Counter[str] = field(default_factory=Counter)
    least: Candidate | None = None
    """Of those that do not fit in memory, the one that lacks least."""


def search(
    job: Job, hardware: Hardware, gpus: int, pins: Pins = UNDECIDED, routing: Routing = UNIFORM, top: int = 10
) -> Found:
    """The best layouts on `gpus` cards.   Fails: ConfigError where there are no cards or the pins contradict."""
    fitting, others = fitting_layouts(job, hardware, gpus, pins, routing)
    timed = [replace(one, seconds=estimate(Costs(job, one.layout, hardware, routing))) for one in fitting]
    timed = sorted(timed, key=lambda one: one.seconds)[:FINALISTS]
    finalists = [
        replace(one, seconds=by_cells(Costs(job, one.layout, hardware, routing)))
        for one in watched(timed, "simulating the best layouts", len(timed))
    ]
    return replace(others, best=sorted(finalists, key=lambda one: one.seconds)[:top], fitting=len(fitting))


def fitting_layouts(
    job: Job, hardware: Hardware, gpus: int, pins: Pins, routing: Routing = UNIFORM
) -> tuple[list[Candidate], Found]:
    """All layouts that fit, not timed yet, and why the others do not.   Fails: ConfigError as `search`."""
    if gpus < 1:
        raise ConfigError(f"--gpus is {gpus}; a run needs at least 1.")
    _require_pins(job, gpus, pins)
    fell_out: Counter[str] = Counter()
    fitting: list[Candidate] = []
    least: Candidate | None = None
    for layout in watched(layouts(job, gpus, pins, fell_out), "layouts that fit", unit="tried"):
        costs = Costs(job, layout, hardware, routing)
        every = memory(costs, _least_schedule(layout, job), _plans(job.model, _stages(layout, job)))
        candidate = Candidate(layout, 0.0, max(every, key=lambda one: one.total))
        if candidate.peak.needed <= hardware.card.memory_bytes:
            fitting.append(candidate)
            continue
        fell_out["does not fit in the card's memory"] += 1
        if least is None or candidate.peak.needed < least.peak.needed:
            least = candidate
    return fitting, Found([], 0, fell_out, least)


def _require_pins(job: Job, gpus: int, pins: Pins) -> None:
    for name, value in (("--pipeline", pins.pipeline), ("--data", pins.data)):
        if value and gpus % value:
            raise ConfigError(
                f"{name} is {value} of {gpus} GPUs; it must divide them: take {_divisor(gpus, value)}."
            )
    if pins.pipeline and pins.data and pins.pipeline * pins.data != gpus:
        raise ConfigError(
            f"--pipeline {pins.pipeline} times --data {pins.data} is {pins.pipeline * pins.data} ranks and there are "
            f"{gpus} GPUs; take --data {gpus // pins.pipeline}, or leave one to the search."
        )
    _require_together(job, gpus, pins)
    if pins.expert and job.model.num_routed_experts % pins.expert:
        experts = job.model.num_routed_experts
        raise ConfigError(
            f"--expert is {pins.expert} and a layer has {experts} experts; it must divide them: take "
            f"{_divisor(experts, pins.expert)}."
        )


def _require_together(job: Job, gpus: int, pins: Pins) -> None:
    """Fails (ConfigError) where a decision contradicts another."""
    if pins.recompute == "layer" and pins.pipeline > 1:
        raise ConfigError(
            f"--recompute layer with --pipeline {pins.pipeline}; a pipeline's parts are not made again whole: take "
            "--recompute attention, or --pipeline 1."
        )
    if pins.recompute == "projections" and job.precision != "fp8":
        raise ConfigError(
            f"--recompute projections with precision {job.precision}; it is the report's, for --precision fp8: take "
            "--recompute attention."
        )
    if pins.schedule and 1 in (gpus, pins.pipeline):
        raise ConfigError(f"--schedule {pins.schedule} with one pipeline rank, which has none; leave it out.")
    most = len(units(job.model))
    if pins.pipeline > most:
        raise ConfigError(
            f"--pipeline is {pins.pipeline} and the model has {most} units (embedding, layers, head, MTP modules); a "
            f"rank holds one or more: take at most {most}."
        )


def _divisor(number: int, near: int) -> int:
    return max(size for size in range(1, min(near, number) + 1) if number % size == 0)


def layouts(job: Job, gpus: int, pins: Pins, fell_out: Counter[str]) -> Iterator[Layout]:
    """Every layout that the ranks, the experts, the batch and the schedules allow; the others are counted."""
    most = len(units(job.model))
    for pipeline in (size for size in range(1, min(gpus, most) + 1) if gpus % size == 0):
        data = gpus // pipeline
        for expert in (
            size for size in range(1, min(data, job.model.num_routed_experts) + 1) if data % size == 0
        ):
            if job.model.num_routed_experts % expert:
                fell_out["experts cannot be shared evenly by so many ranks"] += 1
                continue
            for layout in _on(job, pipeline, data, expert, pins):
                if not pins.allow(layout):
                    continue
                if job.batch_size % (data * layout.micro_batch):
                    fell_out["the batch is no multiple of data ranks × micro-batch"] += 1
                    continue
                reason = _refused(layout, job, most)
                if reason:
                    fell_out[reason] += 1
                else:
                    yield layout


def _on(job: Job, pipeline: int, data: int, expert: int, pins: Pins) -> Iterator[Layout]:
    rules = [
        (name, per_rank)
        for name, row in SCHEDULES.items()
        if pipeline > 1
        for per_rank in row.choices or (None,)
    ]
    if pipeline > 1 and pins.schedule and pins.schedule not in SCHEDULES:
        rules = [(pins.schedule, None)]  # a file's or a function's
    for micro_batch in (pins.micro_batch,) if pins.micro_batch else MICRO_BATCHES:
        for recompute in RECOMPUTES:
            if (recompute == "projections" and job.precision != "fp8") or (
                recompute == "layer" and pipeline > 1
            ):
                continue
            for name, per_rank in rules or [(PLAIN_LOOP, None)]:
                yield Layout(pipeline, data, expert, micro_batch, name, per_rank, recompute)


def _refused(layout: Layout, job: Job, most: int) -> str:
    """Why a schedule cannot be, or nothing."""
    microbatches, ranks, row = layout.microbatches(job), layout.pipeline, layout.method
    allowed = row.allowed(ranks)
    if microbatches < allowed.start and allowed.step < allowed.start:  # fewer than a multiple is no multiple
        return "too few micro-batches for the schedule"
    if microbatches not in allowed or (row.even_ranks and ranks % 2):
        return f"{layout.schedule} needs {row.needs}" if row.needs else OTHER_NUMBERS
    try:
        if taken(layout, microbatches, microbatches) and _stages(layout, job) > most:
            return "more stages than layers"
    except ScheduleError:
        return OTHER_NUMBERS
    return ""


OTHER_NUMBERS = "the schedule's rule refuses these ranks or micro-batches"


def taken(layout: Layout, count: int, most: int) -> int:
    """The first number of micro-batches from `count` on, and `most` at most, that the layout's schedule takes; asked of
    its rule where its row does not say.   Fails: ScheduleError where it takes none."""
    if layout.method.microbatches is not None:
        allowed = layout.method.allowed(layout.pipeline)
        above = max(0, -(-(count - allowed.start) // allowed.step))
        return min(most, allowed[above]) if above < len(allowed) else most
    for one in range(count, most):
        with suppress(ScheduleError):
            layout.rule(one)
            return one
    layout.rule(most)
    return most


def _stages(layout: Layout, job: Job) -> int:
    return _least_schedule(layout, job).stages


@lru_cache(maxsize=256)
def _plans(model: ModelConfig, stages: int) -> tuple[Plan, ...]:
    return stage_plans(model, stages)


def _least_schedule(layout: Layout, job: Job) -> Schedule:
    """The layout's schedule with so few micro-batches that its fullest moment is still there."""
    ranks, most = layout.pipeline, layout.microbatches(job)
    microbatches = taken(layout, min(most, 2 * ranks), most)
    return _least(layout.method, layout.name, ranks, layout.stages_per_rank, microbatches)


@lru_cache(maxsize=512)
def _least(row: Method, name: str, ranks: int, per_rank: int | None, microbatches: int) -> Schedule:
    """By the row too: another file or function may have had the name before."""
    return made(name, ranks, microbatches, per_rank)


@dataclass(frozen=True)
class _Stage:
    """Seconds of a stage's chunks: computing and sending, and the host's for all of them."""

    compute: Mapping[Kind, float]
    transfer: Mapping[Kind, float]
    issue: float


def _stage(costs: Costs, plan: Plan, beside: bool) -> _Stage:
    compute, transfer, issue = dict.fromkeys(Kind, 0.0), dict.fromkeys(Kind, 0.0), 0.0
    number = Counter((part, costs.job.model.is_moe(layer)) for part, layer in plan)
    for (part, moe), times in number.items():
        layer = costs.job.model.num_layers - 1 if moe else 0
        for kind in (Kind.F, Kind.I, *((Kind.W,) if part in OWING else ())):
            side = transfer if part in TRANSFERS else compute
            side[kind] += times * costs.seconds(kind, part, layer, beside)
            issue += times * costs.issue_s(kind, part, layer)
    return _Stage(compute, transfer, issue)


def estimate(costs: Costs) -> float:
    """Seconds of a step by formula: the busiest rank's work, the bubble of Table 2 at mean costs, the update."""
    schedule = _least_schedule(costs.layout, costs.job)
    plans = _plans(costs.job.model, schedule.stages)
    two_way = schedule.overlaps and all(len(schedule.held(rank)) == 2 for rank in range(schedule.ranks))
    every = [_stage(costs, plan, two_way) for plan in plans]
    pipes, microbatches = schedule.pipes, costs.layout.microbatches(costs.job)
    busiest = max(
        _busy([every[stage.index] for stage in schedule.held(rank)], two_way)
        for rank in range(schedule.ranks)
    )
    chunks = [
        {kind: one.compute[kind] + one.transfer[kind] for kind in (Kind.F, Kind.I, Kind.W)} for one in every
    ]
    mean = {kind: sum(one[kind] for one in chunks) / len(chunks) for kind in (Kind.F, Kind.I, Kind.W)}
    pair = busiest / (2 if two_way else 1)
    chunk = ChunkCosts(mean[Kind.F], mean[Kind.I] + mean[Kind.W], mean[Kind.W], pair)
    bubble = _bubble(costs.layout.method, schedule, chunk) if schedule.ranks > 1 else 0.0
    sends = 2 * schedule.stages * costs.send_s
    return microbatches / pipes * busiest + bubble + sends + update(costs, schedule, plans).seconds


def _bubble(row: Method, schedule: Schedule, chunk: ChunkCosts) -> float:
    """Seconds that a rank is idle, by the published formula; without one the schedule is simulated."""
    if row.bubble is None:
        return sum(idle(simulate(schedule, chunk), schedule.ranks)) / schedule.ranks
    return max(0.0, row.bubble(schedule.ranks, schedule.stages, chunk))


def _busy(stages: list[_Stage], two_way: bool) -> float:
    """Seconds a rank is busy for one micro-batch of each of its pipes, or its host if that takes longer."""
    return max(_busy_device(stages, two_way), sum(stage.issue for stage in stages))


def _busy_device(stages: list[_Stage], two_way: bool) -> float:
    """The same of its device."""

    def total(side: str, kinds: tuple[Kind, ...]) -> list[float]:
        return [sum(getattr(stage, side)[kind] for kind in kinds) for stage in stages]

    backward = (Kind.I, Kind.W)
    if not two_way:
        return sum(total("compute", (Kind.F, *backward))) + sum(total("transfer", (Kind.F, Kind.I)))
    forward_c, forward_t = total("compute", (Kind.F,)), total("transfer", (Kind.F,))
    backward_c, backward_t = total("compute", backward), total("transfer", (Kind.I,))
    return sum(
        max(forward_c[here] + backward_c[1 - here], forward_t[here] + backward_t[1 - here]) for here in (0, 1)
    )


def by_cells(costs: Costs) -> float:
    """Seconds of a step by whole cells, each as long as its woven ops."""
    layout, microbatches = costs.layout, costs.layout.microbatches(costs.job)
    known: Known = {}
    pipeline = drawn_on(lambda count: makespan(cell_spans(costs, count, known)[1]), layout, microbatches)
    schedule = layout.rule(few(layout, microbatches)[0])
    return pipeline + update(costs, schedule, _plans(costs.job.model, schedule.stages)).seconds


Known = dict[tuple[tuple[Kind, int], ...], float]
"""Seconds of cells by their chunks' kinds and stages."""


def cell_spans(costs: Costs, microbatches: int, known: Known | None = None) -> tuple[Schedule, list[Span]]:
    """The layout's schedule of so many micro-batches with a span for every cell; `known` is filled and read."""
    known = {} if known is None else known
    schedule = costs.layout.rule(microbatches)
    plans = _plans(costs.job.model, schedule.stages)
    by_stage: dict[StageId, Plan] = {stage: plans[stage.index] for stage in schedule.rank_of}

    def seconds(rank: int, cell: Cell) -> float:
        key = tuple((chunk.kind, chunk.stage.index) for chunk in cell)
        if key not in known:
            known[key] = cell_seconds(costs, cell, by_stage)
        return known[key]

    return schedule, simulate(schedule, seconds, costs.send_s)


def few(layout: Layout, microbatches: int) -> tuple[int, int]:
    """Two numbers of micro-batches in a schedule's steady state; equal where the step has hardly more.

    Before 4 × PP the busiest rank need not yet be what the others wait for, and the line is too flat.
    """
    ranks, any_number = layout.pipeline, layout.method.allowed(layout.pipeline).step == 1
    low = 4 * ranks + any_number * (microbatches % 2)  # both even or odd, as the step's own
    high = low + ranks + any_number * (ranks % 2)
    if microbatches <= high + 3 * ranks:
        return microbatches, microbatches
    return taken(layout, low, microbatches), taken(layout, high, microbatches)


def drawn_on(run: Callable[[int], float], layout: Layout, microbatches: int) -> float:
    """What `run` gives at `microbatches`, on the straight line through two small numbers of them."""
    low, high = few(layout, microbatches)
    first = run(low)
    if high == low:
        return first
    return first + (run(high) - first) / (high - low) * (microbatches - low)


def what_would_fit(job: Job, hardware: Hardware, gpus: int, pins: Pins, routing: Routing = UNIFORM) -> str:
    """For an error: the next larger number of cards on which the job fits, if any."""
    free = replace(pins, data=0)
    for factor in (2, 4, 8, 16, 32, 64, 128, 256, 512):
        try:
            fitting, _ = fitting_layouts(job, hardware, gpus * factor, free, routing)
        except ConfigError:
            continue
        if fitting:
            return (
                f"{gpus * factor} of them would do ({min(fitting, key=lambda one: one.peak.needed).layout})"
            )
    return ""
