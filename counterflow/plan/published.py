"""What the world has published of such runs, and how the planner's predictions lie beside it.

Three efficiencies were fitted, each on one timing of the public profile-data trace of DeepSeek-V3's training (a pair
of four-layer chunks, its attention kernels, its transfers; balanced routing, no pipeline sends). Steps, their parts and
all other runs were not: they are predicted with the same numbers, and their errors stand as they are.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from counterflow.config.models import MODELS
from counterflow.plan.cost import Costs, Step, cell_seconds, paired, predict, simulated, without_transfers
from counterflow.plan.hardware import Efficiencies, Hardware, hardware
from counterflow.plan.job import Job, Layout
from counterflow.plan.price import DOLLARS
from counterflow.schedule.measure import busy, idle
from counterflow.schedule.simulate import Costs as ChunkCosts
from counterflow.schedule.simulate import simulate
from counterflow.schedule.words import Chunk, Kind, Part, Plan, Schedule, Span, StageId

V3 = MODELS["v3-671b"]
REPORT_JOB = Job(V3, 4096, 15360, 14.8e12, "fp8")
REPORT_LAYOUT = Layout(16, 128, 64, 1, "dualpipe", None, "projections")
"""2,048 H800 [§3.2, §4.2]; a micro-batch of one sequence is the trace's. Which layers lie where is not published: the
planner cuts the 61 layers, two heads and the MTP module so that stages weigh alike."""

TRACE_PAIR_S = 0.1290
"""A forward and a backward chunk of four layers, overlapped (profile-data, train.json)."""
TRACE_CORE_S = 1.2e-3 + 3.75e-3
"""The attention core of one layer, forward and the middle of its backward's 3.6 to 3.9 ms."""
TRACE_TRANSFERS_S = 4.375e-3 + 5.96e-3 + 3.35e-3 + 6.22e-3
"""Dispatch and combine of one layer, forward and backward: the kernels alone, without the exchange of counts."""
TRACE_OPS_S: Mapping[tuple[Kind, Part], float] = {
    (Kind.F, Part.ATTN): 4.60e-3,
    (Kind.I, Part.ATTN): 9.54e-3,
    (Kind.W, Part.ATTN): 2.40e-3,
    (Kind.F, Part.MLP): 4.64e-3,
    (Kind.I, Part.MLP): 5.36e-3,
    (Kind.W, Part.MLP): 5.07e-3,
}
"""Of one layer; not fitted one by one, so their errors show what the model of an op misses."""

STEP_S = 19.926
"""One step (arXiv 2505.09343, Table 4, MPFT); its parts follow."""
PARTS_S: Mapping[str, float] = {
    "1F": 1.13,
    "bubble": 2.06,
    "1B": 1.99,
    "1W": 0.48,
    "1F1B": 13.95,
    "optimizer": 0.29,
}
GPU_HOURS_PER_TRILLION = 180e3
TABLE_1: Mapping[str, float] = {"pre-training": 2664e3, "context extension": 119e3, "post-training": 5e3}
"""GPU hours."""


def report_costs(parts: Efficiencies | None = None) -> Costs:
    """The report's run."""
    h800 = hardware("h800")
    return Costs(REPORT_JOB, REPORT_LAYOUT, h800 if parts is None else replace(h800, efficiencies=parts))


def fit() -> Efficiencies:
    """The fitted efficiencies again, from the trace."""
    start = Efficiencies()
    costs = report_costs(start)
    network = start.network * transfers_s(costs) / TRACE_TRANSFERS_S
    core = costs.load(Kind.F, Part.ATTN, 30).attention * 3.5
    card, share = costs.hardware.card, costs.hardware.compute_share
    found = replace(start, network=network, attention=core / TRACE_CORE_S / (card.bf16_flops * share))
    low, high = 0.1, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        slow = pair_s(report_costs(replace(found, fp8_product=middle))) > TRACE_PAIR_S
        low, high = (middle, high) if slow else (low, middle)
    return replace(found, fp8_product=low)


def transfers_s(costs: Costs) -> float:
    """One layer's four transfers, one after another."""
    pairs = ((Kind.F, Part.DISPATCH), (Kind.F, Part.COMBINE), (Kind.I, Part.DISPATCH), (Kind.I, Part.COMBINE))
    return sum(costs.transfer(kind, part) for kind, part in pairs)


def pair_s(costs: Costs) -> float:
    """A pair of chunks of four layers with experts, by itself."""
    parts = (Part.ATTN, Part.DISPATCH, Part.MLP, Part.COMBINE)
    plan: Plan = tuple((part, layer) for layer in range(30, 34) for part in parts)
    ends = StageId(0, 5), StageId(1, 10)
    cell = Chunk(Kind.F, ends[0], 0), Chunk(Kind.B, ends[1], 0)
    return cell_seconds(costs, cell, dict.fromkeys(ends, plan))


class Compared(NamedTuple):
    """A published number beside the predicted one."""

    name: str
    published: float
    predicted: float
    unit: str
    note: str = ""

    @property
    def error(self) -> float:
        """(predicted − published) / published."""
        return self.predicted / self.published - 1


def trace_rows() -> list[Compared]:
    """The trace's ops, which three fitted numbers give as well as they can."""
    costs = report_costs()
    rows = [
        Compared(f"{part} {kind}", 1e3 * seconds, 1e3 * costs.seconds(kind, part, 30, True), "ms")
        for (kind, part), seconds in TRACE_OPS_S.items()
    ]
    rows.append(Compared("four transfers", 1e3 * TRACE_TRANSFERS_S, 1e3 * transfers_s(costs), "ms", "fitted"))
    rows.append(Compared("pair of four layers", 1e3 * TRACE_PAIR_S, 1e3 * pair_s(costs), "ms", "fitted"))
    return rows


def cell_parts(step: Step) -> list[dict[str, float]]:
    """Seconds of each rank by the published names: its cells' kinds, transfers that nothing hides included.

    A transfer that runs on into the next cell counts in both, so the parts' sum is a little above the step.
    """
    names = {"F": "1F", "B": "1B", "I": "1B", "W": "1W", "B&F": "1F1B"}
    of_chunk: dict[tuple[int, Chunk], list[Span]] = defaultdict(list)
    for span in step.spans:
        of_chunk[span.rank, span.what.chunk].append(span)  # pyright: ignore[reportAttributeAccessIssue]
    found: list[dict[str, float]] = []
    for rank, row in enumerate(step.schedule.rows):
        seconds: dict[str, float] = defaultdict(float)
        for cell in row:
            kind = names["&".join(sorted(chunk.kind for chunk in cell))]
            seconds[kind] += busy(span for chunk in cell for span in of_chunk[rank, chunk])
        found.append({**seconds, "bubble": step.idle[rank], "optimizer": step.update.seconds})
    return found


def step_rows(step: Step) -> list[Compared]:
    """The report's step: whole, hours, and every published part as the mean over ranks."""
    by_rank = cell_parts(step)
    hours = 1e12 / step.tokens_per_s / 3600
    rows = [
        Compared("step", STEP_S, step.seconds, "s"),
        Compared("GPU hours for 1 T tokens", GPU_HOURS_PER_TRILLION, hours, "h"),
    ]
    for name, seconds in PARTS_S.items():
        every = [one.get(name, 0.0) for one in by_rank]
        note = f"ranks {min(every):.2f} to {max(every):.2f}"
        rows.append(Compared(name, seconds, sum(every) / len(every), "s", note))
    return rows


def bubble_rows(step: Step) -> list[tuple[str, float]]:
    """What makes the bubble, each cause added to those before it; the last row is what none of them explains."""
    costs, schedule, plans = step.costs, step.schedule, step.plans

    def even(priced: Costs) -> float:
        return _mean_idle(simulate(schedule, mean_chunks(priced, schedule, plans)), schedule)

    alone, exposed = even(without_transfers(costs)), even(costs)
    uneven = _mean_idle(simulated(costs, schedule, plans, 0.0), schedule)
    published = ChunkCosts(0.049, 0.107, 0.032, 0.144)
    return [
        (
            "published chunk times through the schedule (F 49, I 75, W 32, F&B 144 ms)",
            even_idle(schedule, published),
        ),
        ("predicted chunks, all stages alike, transfers free", alone),
        ("+ all-to-all that a lone chunk cannot hide", exposed - alone),
        ("+ stages as uneven as the layers make them", uneven - exposed),
        ("+ pipeline sends", step.idle_s - uneven),
        ("predicted", step.idle_s),
        ("published less predicted: unexplained", PARTS_S["bubble"] - step.idle_s),
    ]


def even_idle(schedule: Schedule, chunks: ChunkCosts) -> float:
    """A schedule's mean idle time when all stages cost the same."""
    return _mean_idle(simulate(schedule, chunks), schedule)


def _mean_idle(spans: list[Span], schedule: Schedule) -> float:
    return sum(idle(spans, schedule.ranks)) / schedule.ranks


def mean_chunks(costs: Costs, schedule: Schedule, plans: tuple[Plan, ...]) -> ChunkCosts:
    """F, B, W and F&B, each the mean over the stages, or over the pairs of stages that meet."""
    by_stage = {stage: plans[stage.index] for stage in schedule.rank_of}
    stages = list(by_stage)

    def mean(kind: Kind) -> float:
        return sum(cell_seconds(costs, (Chunk(kind, stage, 0),), by_stage) for stage in stages) / len(stages)

    kinds = {
        tuple((chunk.kind, chunk.stage) for chunk in cell)
        for row in schedule.rows
        for cell in row
        if len(cell) > 1
    }
    pairs = [cell_seconds(costs, tuple(Chunk(*of, 0) for of in pair), by_stage) for pair in kinds]
    assert pairs and paired(schedule), "a two-way schedule has pairs"
    return ChunkCosts(mean(Kind.F), mean(Kind.B), mean(Kind.W), sum(pairs) / len(pairs))


def table_1(step: Step) -> list[Compared]:
    """Table 1's GPU hours and dollars; post-training is taken as published, since no shape of it is."""
    seconds = 1 / step.tokens_per_s
    hours = {"pre-training": REPORT_JOB.tokens * seconds / 3600, "post-training": TABLE_1["post-training"]}
    extension = sum(
        1000 * batch * length * _token_s(step, length) for length, batch in ((32768, 1920), (131072, 480))
    )
    hours["context extension"] = extension / 3600
    notes = {
        "post-training": "as published",
        "context extension": "two phases of 1000 steps [§4.3], this layout",
    }
    rows = [
        Compared(name, found, hours[name], "GPU hours", notes.get(name, ""))
        for name, found in TABLE_1.items()
    ]
    total = sum(TABLE_1.values())
    rows.append(Compared("total", total, sum(hours.values()), "GPU hours"))
    rows.append(Compared("total", total * DOLLARS, sum(hours.values()) * DOLLARS, "dollars"))
    return rows


def _token_s(step: Step, length: int) -> float:
    """GPU seconds of a token in longer sequences: the step's, and the attention core that is added."""
    costs = step.costs

    def core(sequence: int) -> float:
        per_token = (costs.load.sizes.queries + costs.load.sizes.values) * sequence
        rate = costs.hardware.card.bf16_flops * costs.hardware.efficiencies.attention
        return 3.5 * per_token * V3.num_layers / rate

    return 1 / step.tokens_per_s + core(length) - core(costs.job.sequence_length)


@dataclass(frozen=True)
class Run:
    """A published run that nothing was fitted on."""

    name: str
    costs: Costs
    tokens_per_s: float
    """Of one GPU, published."""
    note: str
    accumulations: int = 1
    """Times the pipeline is filled and drained in one step."""

    def predicted(self, free_transfers: bool = False) -> float:
        """Tokens per second of one GPU; with free transfers, as if all were hidden for nothing."""
        step = predict(without_transfers(self.costs) if free_transfers else self.costs)
        seconds = self.accumulations * step.pipeline_s + step.update.seconds
        return self.accumulations * self.costs.job.tokens_per_step / seconds / self.costs.layout.gpus


def _other(card: str, model: str, batch: int, precision: str, layout: Layout, modules: int) -> Costs:
    config = replace(MODELS[model], num_mtp_modules=modules)
    kind: Hardware = hardware(card)
    return Costs(Job(config, 4096, batch, 1e12, precision, "fused"), layout, kind)


_MEGATRON = Layout(8, 64, 64, 1, "interleaved-1f1b", 4, "projections", tensor=2)
_AUTOMODEL = Layout(4, 64, 64, 1, "interleaved-1f1b", 8, "attention")
RUNS: tuple[Run, ...] = (
    Run(
        "Megatron-Bridge 25.09, 1,024 H100, FP8",
        _other("h100", "v3-671b", 8192, "fp8", _MEGATRON, 1),
        1297,
        "TP2 PP8 VP4 EP64, batch 8192; routing forced balanced; recomputation assumed to be the report's",
    ),
    Run(
        "Automodel, 256 H100, BF16",
        _other("h100", "v3-671b", 512, "bf16", _AUTOMODEL, 0),
        1002,
        "PP4 VP8 EP64 FSDP64, batch 512, 8 micro-batches; FSDP's gathers not counted; recomputation assumed",
    ),
    Run(
        "Automodel, 1,024 H100, BF16",
        _other("h100", "v3-671b", 2048, "bf16", replace(_AUTOMODEL, data=256), 0),
        865,
        "PP4 VP8 EP64 FSDP256, batch 8192 in four accumulations of 8 micro-batches; no clipping; as above",
        accumulations=4,
    ),
    Run(
        "torchtitan 16B, 8 H100, BF16",
        _other("h100", "v3-16b", 32, "bf16", Layout(1, 8, 8, 4), 0),
        11550,
        "EP8 FSDP8; 11.3 to 11.8 thousand; local batch 4 assumed, no recomputation",
    ),
    Run(
        "Megatron-Bridge 26.08, 256 GB200, MXFP8",
        _other(
            "gb200", "v3-671b", 2048, "fp8", Layout(4, 64, 64, 1, "interleaved-1f1b", 4, "projections"), 1
        ),
        4912,
        "PP4 VP4 EP64, batch 2048 assumed; routing forced balanced",
    ),
)


def run_rows(runs: tuple[Run, ...] = RUNS) -> list[tuple[Run, Compared, Compared]]:
    """Each run, predicted with its transfers as they are, and as if they were free."""
    found = []
    for run in runs:
        pair: list[Compared] = []
        for free in (False, True):
            name = "transfers free" if free else "as scheduled"
            pair.append(Compared(name, run.tokens_per_s, run.predicted(free), "tokens/s/GPU"))
        found.append((run, pair[0], pair[1]))
    return found
