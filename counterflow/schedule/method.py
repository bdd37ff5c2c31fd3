"""A row of SCHEDULES: a rule, and beside it what the planner, Table 2 and the checks must know of its schedules.

All columns but the rule have defaults, which is what a schedule of the user's own has: what a row does not say is asked
of the rule, or simulated.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import isclose

from counterflow.schedule.simulate import Costs
from counterflow.schedule.words import Schedule

Rule = Callable[[int, int, int | None], Schedule]
"""(ranks, microbatches, stages per rank or None) gives the schedule, or a ScheduleError that says what would do."""


def exact(costs: Costs) -> str:
    """Of a bubble's formula that holds at any costs."""
    del costs
    return "exact"


@dataclass(frozen=True)
class Method:
    """A pipeline schedule for any number of ranks and micro-batches, by Table 2's columns; called like its rule."""

    rule: Rule
    even_ranks: bool = False
    """Whether it needs an even number of ranks."""
    microbatches: Callable[[int], range] | None = None
    """The numbers of micro-batches that it takes, by ranks; None: the rule alone knows."""
    needs: str = ""
    """What it needs of ranks and micro-batches, in words: "NAME needs ..."."""
    stages_per_rank: int = 1
    """Of one pipe, where the user does not choose."""
    choices: tuple[int, ...] = ()
    """Stages per rank that the planner tries, where the user may choose."""
    bubble: Callable[[int, int, Costs], float] | None = None
    """Idle time of a rank, by ranks, stages of a pipe and the costs of one stage; None: simulated."""
    exactness: Callable[[Costs], str] = exact
    """'exact', or in which way the bubble's formula is not at these costs."""
    parameters: int = 1
    """Of a rank: copies of a stage's, of PP stages in all."""
    activations: Callable[[int], int] | None = None
    """Held by the fullest rank at its peak: micro-batches of one stage, by the number of stages PP."""
    source: str = ""
    """Where the formulas are published."""

    def __call__(self, ranks: int, microbatches: int, stages_per_rank: int | None = None) -> Schedule:
        """The rule's schedule.   Fails: ScheduleError."""
        return self.rule(ranks, microbatches, stages_per_rank)

    def allowed(self, ranks: int) -> range:
        """The numbers of micro-batches it takes; all, where the rule alone knows."""
        return from_on(1) if self.microbatches is None else self.microbatches(ranks)


def from_on(least: int, step: int = 1) -> range:
    """`least` and every `step`-th number after it."""
    return range(least, sys.maxsize, step)


def at_most(less: float, more: float) -> bool:
    """less ≤ more, but for rounding."""
    return less <= more or isclose(less, more)
