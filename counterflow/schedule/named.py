"""A schedule by the name that a user gives: a row of SCHEDULES, a file, or MODULE:FUNCTION.

What is the user's own gets a row with nothing but its rule. So training, planner and pictures ask every schedule in the
same way, and none asks where it comes from.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from os.path import expanduser
from pathlib import Path

from counterflow.errors import ConfigError, ScheduleError, nearest
from counterflow.schedule import SCHEDULES
from counterflow.schedule.check import check
from counterflow.schedule.method import Method
from counterflow.schedule.text import from_csv, from_text
from counterflow.schedule.words import Schedule

FILES = (".csv", ".txt", ".text", ".schedule")


@dataclass(frozen=True)
class FromFile:
    """The rule of a file, which has one schedule whatever is asked for."""

    schedule: Schedule

    def __call__(self, ranks: int, microbatches: int, stages_per_rank: int | None = None) -> Schedule:
        """The file's."""
        return self.schedule


@dataclass(frozen=True)
class FromFunction:
    """The rule of MODULE:FUNCTION, which is called with ranks and micro-batches."""

    name: str
    function: Callable[[int, int], object]

    def __call__(self, ranks: int, microbatches: int, stages_per_rank: int | None = None) -> Schedule:
        """The function's.   Fails: ConfigError where it gives something else."""
        schedule = self.function(ranks, microbatches)
        if not isinstance(schedule, Schedule):
            raise ConfigError(
                f"the schedule '{self.name}' gives {type(schedule).__name__}; it must give a Schedule."
            )
        return schedule


def is_file(name: str) -> bool:
    """Whether the name is a file's."""
    return name not in SCHEDULES and (name.endswith(FILES) or "/" in name or Path(name).is_file())


def method(name: str) -> Method:
    """The row of a name.   Fails: ConfigError, ScheduleError."""
    if name in SCHEDULES:
        return SCHEDULES[name]
    if is_file(name):
        schedule = _read(name)
        own = sum(schedule.microbatches)
        return Method(FromFile(schedule), microbatches=lambda ranks: range(own, own + 1, max(1, own)))
    if ":" in name:
        return Method(FromFunction(name, _imported(name)))
    raise ConfigError(
        f"'{name}' is no schedule; {nearest(name, SCHEDULES)} A file's name ends in {', '.join(FILES)}; a function is "
        "MODULE:FUNCTION."
    )


def made(name: str, ranks: int, microbatches: int, stages_per_rank: int | None = None) -> Schedule:
    """A name's schedule for these numbers; the user's own are checked.   Fails: ConfigError, ScheduleError."""
    schedule = method(name)(ranks, microbatches, stages_per_rank)
    if name in SCHEDULES:
        return schedule
    own = sum(schedule.microbatches)
    if (schedule.ranks, own) != (ranks, microbatches):
        raise ScheduleError(
            f"{name} has {schedule.ranks} ranks and {own} micro-batches, where {ranks} ranks (parallel.pipeline) and "
            f"{microbatches} micro-batches (train.batch_size / train.micro_batch_size / parallel.data) are asked for; "
            "make them equal, and train.batch_start 0 where it has only these."
        )
    return check(schedule)


def checked(name: str, ranks: int, microbatches: int, stages_per_rank: int | None = None) -> Schedule:
    """The same, checked wherever it comes from; made once in a process.   Fails: ConfigError, ScheduleError."""
    return _checked(method(name), name, ranks, microbatches, stages_per_rank)


@lru_cache(maxsize=8)
def _checked(row: Method, name: str, ranks: int, microbatches: int, stages_per_rank: int | None) -> Schedule:
    """By the row too: another file or function may have had the name before."""
    schedule = made(name, ranks, microbatches, stages_per_rank)
    return check(schedule) if name in SCHEDULES else schedule


def _read(name: str) -> Schedule:
    try:
        text = Path(expanduser(name)).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the schedule '{name}' cannot be read ({error}).") from None
    try:
        return from_csv(text, Path(name).stem) if name.endswith(".csv") else from_text(text)
    except ScheduleError as error:
        raise ScheduleError(f"{name}: {error}") from None


def _imported(name: str) -> Callable[[int, int], object]:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"the schedule '{name}' cannot be imported ({error}); write MODULE:FUNCTION, with the module's folder in "
            "PYTHONPATH."
        ) from None
