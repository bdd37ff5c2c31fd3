"""What a run costs: GPU hours, days, dollars, energy, and what failures and checkpoints add. [Tab. 1]

Failures are independent and each throws away the work since the last checkpoint, half an interval on average; the
interval that wastes least is Young's, √(2 × time of a checkpoint × time between failures).
"""

from dataclasses import dataclass
from math import sqrt

from counterflow.errors import ConfigError

DOLLARS = 2.0
"""Of a GPU hour: the report's assumption for an H800 (Table 1)."""
FACILITY = 1.3
"""Watts drawn for each watt of the cards' sheets: hosts, switches, cooling; assumed."""
FAILURES = 419 / 54 / 16384
"""Of one GPU in a day: 419 unexpected interruptions of 16,384 H100 in 54 days (Llama 3, arXiv 2407.21783, §3.3.4)."""


@dataclass(frozen=True)
class Reliability:
    """How often things break, and what mending takes."""

    failures_per_gpu_day: float = FAILURES
    checkpoint_s: float = 30.0
    """That training stands still for one."""
    restart_s: float = 600.0
    """From a failure to the next step; assumed."""
    interval_s: float = 0.0
    """Between checkpoints; 0: Young's."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < float("inf"):
                raise ConfigError(f"{name} is {value}; it must be a number from 0 on.")


USUAL = Reliability()


@dataclass(frozen=True)
class Price:
    """Of a whole run."""

    gpu_hours: float
    """Of steps alone."""
    days: float
    """Of steps alone."""
    dollars: float
    energy_mwh: float
    failures: float
    """Expected in the run."""
    interval_s: float
    """Between checkpoints."""
    overhead: float
    """Share added by checkpoints, lost work and restarts."""
    gpu_hours_per_trillion: float

    @property
    def days_with_failures(self) -> float:
        """The run's length."""
        return self.days * (1 + self.overhead)


def price(
    tokens: float,
    tokens_per_s: float,
    gpus: int,
    watts: float,
    dollars_per_hour: float = DOLLARS,
    reliability: Reliability = USUAL,
) -> Price:
    """The price of `tokens` at so many a second on each of `gpus` cards of so many watts."""
    hours = tokens / tokens_per_s / 3600
    days = hours / gpus / 24
    per_day = reliability.failures_per_gpu_day * gpus
    between = 86400 / per_day if per_day else float("inf")
    interval = reliability.interval_s or (
        sqrt(2 * reliability.checkpoint_s * between) if per_day else 86400.0
    )
    # What costs nothing is done all the time.
    saving = reliability.checkpoint_s / interval if interval else 0.0
    overhead = saving + (interval / 2 + reliability.restart_s) / between
    return Price(
        gpu_hours=hours,
        days=days,
        dollars=hours * dollars_per_hour,
        energy_mwh=hours * watts * FACILITY / 1e6,
        failures=per_day * days,
        interval_s=interval,
        overhead=overhead,
        gpu_hours_per_trillion=hours / tokens * 1e12,
    )
