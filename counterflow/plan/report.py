"""A plan as a terminal's table and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from counterflow.plan import count
from counterflow.plan.answer import Answer
from counterflow.plan.memory import Memory
from counterflow.plan.work import kept
from counterflow.schedule.words import TRANSFERS, Kind, Part
from counterflow.units import aligned, bytes_, seconds
from counterflow.units import count as number

MEMORY = (
    "weights",
    "gradients",
    "masters",
    "moments",
    "averages",
    "checkpoint",
    "activations",
    "transient",
    "buffers",
    "reserved",
)
"""What fills a rank, as the fields of `memory.Memory` are called."""


def terminal(answer: Answer) -> str:
    """All of a plan but the timeline."""
    sections = [
        _headline(answer),
        _model(answer),
        "Layouts, the best first; that one is simulated op by op, the others cell by cell:\n"
        + aligned(layouts(answer)),
        _why_not(answer),
        "One step of the first, simulated op by op:\n" + aligned(step_rows(answer)),
        "One layer with experts, op by op, for one micro-batch on one rank:\n" + aligned(op_rows(answer)),
        "Memory by rank at its peak:\n" + aligned(memory_rows(answer.memory)),
        "The whole run:\n" + aligned(price_rows(answer)),
        "Assumptions:\n" + aligned(assumption_rows(answer)),
    ]
    return "\n\n".join(section for section in sections if section)


def _headline(answer: Answer) -> str:
    job = answer.job
    return (
        f"{cards(answer)}{nodes(answer)} over {answer.hardware.fabric.name}, "
        f"{job.precision}, batch {job.batch_size} × {job.sequence_length} tokens: {answer.step.seconds:.2f} s a step, "
        f"{seconds(answer.price.days_with_failures * 86400)} for {number(job.tokens)} tokens."
    )


def cards(answer: Answer) -> str:
    """How many of what."""
    count, name = answer.step.costs.layout.gpus, answer.hardware.card.name
    return (
        f"{count} {name} {'process' if count == 1 else 'processes'}"
        if answer.hardware.is_cpu
        else f"{count} {name}"
    )


def nodes(answer: Answer) -> str:
    """Where the cards do not fill their nodes, what is taken for them."""
    count, card = answer.step.costs.layout.gpus, answer.hardware.card
    if count < card.gpus_per_node or count % card.gpus_per_node == 0:
        return ""
    return f" on {card.nodes(count)} nodes of {card.gpus_per_node} at most, taken to hold them alike,"


def _model(answer: Answer) -> str:
    model, length = answer.job.model, answer.job.sequence_length
    sizes = count.count_parameters(model)
    causal, full = (count.flops_per_token(model, length, causal) for causal in (True, False))
    extra = count.flops_per_token(model, length, True, with_mtp=True)
    return (
        f"Model: {number(sizes.total)} parameters, {number(sizes.active)} active; a trained token takes "
        f"{causal / 1e9:.4g} GFLOP causal, {full / 1e9:.4g} not, {extra / 1e9:.4g} causal with MTP."
    )


def layouts(answer: Answer) -> list[list[str]]:
    """A row for each of the best."""
    table = [["", "step", f"tokens/s/{answer.hardware.unit}", "peak memory", "layout"]]
    gpus, tokens = answer.step.costs.layout.gpus, answer.job.tokens_per_step
    for place, one in enumerate(answer.found.best, start=1):
        rate = tokens / one.seconds / gpus
        row = [str(place), f"{one.seconds:.3f} s", f"{rate:.0f}", bytes_(one.peak.total), str(one.layout)]
        table.append(row)
    return table


def _why_not(answer: Answer) -> str:
    reasons = [f"{times} × {reason}" for reason, times in answer.found.fell_out.most_common()]
    fit = fitting(answer.found.fitting)
    return f"{fit}; others fell out: {'; '.join(reasons)}." if reasons else ""


def fitting(count: int) -> str:
    """In words."""
    return f"{count} layout{'s fit' if count != 1 else ' fits'}"


def step_rows(answer: Answer) -> list[list[str]]:
    """Where a step's seconds go."""
    step, update = answer.step, answer.step.update
    share = f"{100 * step.idle_s / step.seconds:.1f} %"
    least, most = min(step.idle), max(step.idle)
    return [
        ["part", "seconds", ""],
        [
            "pipeline",
            f"{step.pipeline_s:.3f}",
            microbatches(sum(step.schedule.microbatches)) + " a data rank",
        ],
        ["  of it idle", f"{step.idle_s:.3f}", f"{share} of the step; by rank {least:.3f} to {most:.3f}"],
        ["gradient sums", f"{update.reduce_s:.3f}", "over the holders of each parameter"],
        ["gather weights", f"{update.gather_s:.3f}", "ZeRO-1"],
        ["Adam", f"{update.adam_s:.3f}", "norm, update, zeroing"],
        [
            "step",
            f"{step.seconds:.3f}",
            f"{step.tokens_per_s:.0f} tokens/s/{answer.hardware.unit}; {_mfu(answer)}",
        ],
    ]


def microbatches(count: int) -> str:
    """In words."""
    return f"{count} micro-batch{'es' if count != 1 else ''}"


def _mfu(answer: Answer) -> str:
    peak = "fp32" if answer.job.precision == "fp32" else "bf16"
    causal, full = answer.step.mfu(), answer.step.mfu(causal=False)
    return f"MFU {100 * causal:.1f} % causal, {100 * full:.1f} % not, of {peak}'s peak"


def op_rows(answer: Answer) -> list[list[str]]:
    """What the ops of a layer with experts do, move, keep and take: alone, beside a transfer, of the host's time."""
    costs, model = answer.step.costs, answer.job.model
    table = [["op", "FLOP", "passes", "sent", "kept", "alone", "beside", "host"]]
    for part in (Part.ATTN, Part.DISPATCH, Part.MLP, Part.COMBINE):
        for kind in (Kind.F, Kind.I, *(() if part in TRANSFERS else (Kind.W,))):
            work, sent = costs.work(kind, part, model.num_layers - 1), "-"
            if part in TRANSFERS and costs.layout.expert > 1:
                volumes = costs.volumes(kind, part)
                sent = f"{bytes_(volumes.network)} + {bytes_(volumes.nvlink)}"
            holds = kept(costs.load, part, True)
            keeps = {Kind.F: holds.whole, Kind.I: holds.owed}.get(kind, 0.0)
            alone, beside = (costs.seconds(kind, part, model.num_layers - 1, near) for near in (False, True))
            flops = number(work.products + work.wide + work.attention) if work.kernels else "-"
            moved = bytes_(work.passes) if work.kernels else "-"
            times = [
                f"{1e3 * time:.3f} ms"
                for time in (alone, beside, costs.issue_s(kind, part, model.num_layers - 1))
            ]
            table.append([f"{part} {kind}", flops, moved, sent, bytes_(keeps) if keeps else "-", *times])
    return table


def memory_rows(every: Sequence[Memory]) -> list[list[str]]:
    """A row a rank; `host` is what its GPU's host keeps for it."""
    names = (*MEMORY, "total", *(("host",) if any(one.host for one in every) else ()))
    table = [["rank", *names, "peak at cell"]]
    for one in every:
        table.append([str(one.rank), *(bytes_(getattr(one, name)) for name in names), str(one.peak_cell)])
    return table


def price_rows(answer: Answer) -> list[list[str]]:
    """Time, money, energy."""
    cost, unit = answer.price, answer.hardware.unit
    hours = f"{_few(cost.gpu_hours_per_trillion)} for a trillion tokens"
    paid = ["dollars", dollars(cost.dollars), f"at ${cost.dollars / cost.gpu_hours:.2f} a {unit} hour"]
    return [
        ["what", "how much", ""],
        [f"{unit} hours", _few(cost.gpu_hours), hours],
        *([paid] if cost.dollars else []),
        [
            "energy",
            energy(cost.energy_mwh),
            f"{answer.hardware.card.watts:g} W a {unit}, and a facility's share",
        ],
        ["steps alone", seconds(cost.days * 86400), ""],
        ["failures", f"{cost.failures:.3g}", f"a checkpoint every {seconds(cost.interval_s)}"],
        [
            "in all",
            seconds(cost.days_with_failures * 86400),
            f"failures and checkpoints add {100 * cost.overhead:.2g} %",
        ],
    ]


def _few(value: float) -> str:
    """A count in three or more significant digits."""
    return number(value) if value >= 1e3 else f"{value:.3g}"


def dollars(value: float) -> str:
    """To the cent where cents count."""
    return f"${number(value)}" if value >= 1e3 else f"${value:.2f}"


def energy(mwh: float) -> str:
    """In the largest unit of which there is one."""
    factor, unit = next((pair for pair in ((1.0, "MWh"), (1e3, "kWh")) if mwh * pair[0] >= 1), (1e6, "Wh"))
    return f"{mwh * factor:.4g} {unit}"


def assumption_rows(answer: Answer) -> list[list[str]]:
    """What was assumed, and how it is known."""
    table = [["number", "value", "status", "source"]]
    for one in answer.assumptions:
        table.append([one.name, f"{one.value:.4g} {one.unit}", one.status, one.source])
    return table


def as_json(answer: Answer) -> dict[str, Any]:
    """The plan's numbers, for other programs; seconds, bytes and dollars."""
    step, found = answer.step, answer.found
    return {
        "gpus": step.costs.layout.gpus,
        "card": answer.hardware.card.name,
        "fabric": answer.hardware.fabric.name,
        "precision": answer.job.precision,
        "batch_size": answer.job.batch_size,
        "sequence_length": answer.job.sequence_length,
        "layouts": [
            {**asdict(one.layout), "step_s": one.seconds, "peak_bytes": one.peak.total} for one in found.best
        ],
        "fitting": found.fitting,
        "fell_out": dict(found.fell_out),
        "step": {
            "seconds": step.seconds,
            "pipeline_s": step.pipeline_s,
            "idle_s": step.idle,
            "update_s": asdict(step.update),
            "tokens_per_s_per_gpu": step.tokens_per_s,
            "mfu_causal": step.mfu(),
            "mfu_not_causal": step.mfu(causal=False),
        },
        "memory": [{**asdict(one), "total": one.total} for one in answer.memory],
        "price": {**asdict(answer.price), "days_with_failures": answer.price.days_with_failures},
        "assumptions": [asdict(one) for one in answer.assumptions],
    }
