"""One plan: the layouts found, the best simulated op by op, its memory and its price; what every report prints."""

from dataclasses import dataclass, replace

from counterflow.errors import ConfigError
from counterflow.plan.cost import Costs, Step, predict
from counterflow.plan.hardware import FITTED, Hardware
from counterflow.plan.job import Job, require
from counterflow.plan.memory import Memory, memory
from counterflow.plan.price import DOLLARS, USUAL, Price, Reliability, price
from counterflow.plan.routing import UNIFORM, Routing
from counterflow.plan.search import UNDECIDED, Candidate, Found, Pins, search, what_would_fit
from counterflow.units import bytes_


@dataclass(frozen=True)
class Assumption:
    """A number that a plan stands on."""

    name: str
    value: float
    unit: str
    status: str
    """data sheet, published, measured (here or elsewhere), fitted or assumed."""
    source: str


@dataclass(frozen=True)
class Answer:
    """A plan."""

    job: Job
    hardware: Hardware
    found: Found
    step: Step
    """Of the best layout."""
    memory: list[Memory]
    price: Price
    assumptions: list[Assumption]


def answer(
    job: Job,
    hardware: Hardware,
    gpus: int,
    pins: Pins = UNDECIDED,
    routing: Routing = UNIFORM,
    dollars: float | None = None,
    reliability: Reliability = USUAL,
    placement: str = "",
) -> Answer:
    """The plan for a job on so many cards.   Fails: ConfigError that says what would fit, where nothing does.

    `dollars` of a card's hour; None: the report's for a GPU, and none for a CPU.
    """
    found = search(job, hardware, gpus, pins, routing)
    if not found.best:
        raise _nothing(job, hardware, gpus, pins, found)
    best = found.best[0].layout
    require(job, best)
    step = predict(Costs(job, best, hardware, routing), placement=placement)
    # Its headline and its row of the layouts are one number; the others' are by cells, 3 % off at most.
    found = replace(found, best=[replace(found.best[0], seconds=step.seconds), *found.best[1:]])
    every = memory(step.costs, step.schedule, step.plans)
    dollars = (0.0 if hardware.is_cpu else DOLLARS) if dollars is None else dollars
    cost = price(job.tokens, step.tokens_per_s, gpus, hardware.card.watts, dollars, reliability)
    return Answer(job, hardware, found, step, every, cost, assumptions(hardware, job))


def _nothing(job: Job, hardware: Hardware, gpus: int, pins: Pins, found: Found) -> ConfigError:
    """Why no layout is left, in one sentence, and what would do."""
    if found.least is None:
        reasons = "; ".join(f"{reason} ({times} layouts)" for reason, times in found.fell_out.most_common(3))
        return ConfigError(
            f"no layout on {gpus} GPUs: {reasons or 'none is as was decided'}; change train.batch_size "
            f"({job.batch_size}), --gpus, or decide less."
        )
    least: Candidate = found.least
    remedy = what_would_fit(job, hardware, gpus, pins)
    fp8 = "--precision fp8, " if hardware.card.fp8_flops and job.precision != "fp8" else ""
    return ConfigError(
        f"the model fits on no layout of {gpus} {hardware.card.name}: {least.layout} lacks least and needs "
        f"{bytes_(least.peak.needed)} of {bytes_(hardware.card.memory_bytes)} a card; "
        + (remedy or f"take a card with more memory, {fp8}or a smaller model")
        + "."
    )


def assumptions(hardware: Hardware, job: Job) -> list[Assumption]:
    """Every number of the hardware that a prediction used, and whether it was measured."""
    card, fabric, parts = hardware.card, hardware.fabric, hardware.efficiencies
    rate = f"{job.bytes_of.product}_flops"
    rows = [
        ("card", name, getattr(card, name), unit, card.source, card.status)
        for name, unit in (
            (rate, "FLOP/s"),
            ("memory_bytes", "bytes"),
            ("memory_bytes_per_s", "bytes/s"),
            ("nvlink_bytes_per_s", "bytes/s"),
            ("launch_s", "s"),
        )
    ]
    rows += [
        ("fabric", name, getattr(fabric, name), unit, fabric.source, fabric.status) for name, unit in _FABRIC
    ]
    found = [
        Assumption(f"{where}.{name}", value, unit, _status(hardware, f"{where}.{name}", status), source)
        for where, name, value, unit, source, status in rows
    ]
    for name, value in vars(parts).items():
        plain = (
            "fitted" if name in FITTED else "assumed" if name == "fp32_product" else "published or measured"
        )
        status = _status(hardware, f"efficiencies.{name}", plain)
        found.append(
            Assumption(f"efficiencies.{name}", value, "of peak", status, "counterflow/plan/hardware.py")
        )
    return found


_FABRIC = (("bytes_per_s", "bytes/s"), ("latency_s", "s"))


def _status(hardware: Hardware, name: str, otherwise: str) -> str:
    return "measured by the user" if name in hardware.measured else otherwise
