"""What a run's parallel settings mean: its schedule for a number of micro-batches, and which numbers it may have."""

import importlib
from pathlib import Path

from counterflow.config.run import Parallel, RunConfig
from counterflow.errors import ConfigError, ScheduleError, nearest
from counterflow.plan.stages import stage_plans
from counterflow.schedule import SCHEDULES
from counterflow.schedule.check import check
from counterflow.schedule.text import from_csv, from_text
from counterflow.schedule.words import Schedule


def schedule_of(parallel: Parallel, microbatches: int) -> Schedule:
    """The run's schedule for so many micro-batches per data rank, checked.   Fails: ConfigError or ScheduleError."""
    schedule = check(_made(parallel, microbatches))
    if schedule.ranks != parallel.pipeline:
        raise ConfigError(
            f"parallel.schedule {parallel.schedule} has {schedule.ranks} ranks and parallel.pipeline is "
            f"{parallel.pipeline}; make them equal."
        )
    if sum(schedule.microbatches) != microbatches:
        raise ConfigError(
            f"parallel.schedule {parallel.schedule} has {sum(schedule.microbatches)} micro-batches and a batch has "
            f"{microbatches} per data rank; make train.batch_size / train.micro_batch_size / parallel.data equal to it "
            "and train.batch_start 0."
        )
    return schedule


def _made(parallel: Parallel, microbatches: int) -> Schedule:
    name, per_rank = parallel.schedule, parallel.stages_per_rank or None
    if name in SCHEDULES:
        return SCHEDULES[name](parallel.pipeline, microbatches, per_rank)
    if name.endswith((".txt", ".csv")):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"parallel.schedule is '{name}', which cannot be read ({error}).") from None
        return from_csv(text, Path(name).stem) if name.endswith(".csv") else from_text(text)
    if ":" not in name:
        raise ConfigError(f"parallel.schedule is '{name}'; {nearest(name, SCHEDULES)}")
    return imported(name, parallel.pipeline, microbatches)


def imported(name: str, ranks: int, microbatches: int) -> Schedule:
    """The schedule that a function of the user's makes; `name` is MODULE:FUNCTION.   Fails: ConfigError."""
    module, _, function = name.partition(":")
    try:
        rule = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"the schedule '{name}' cannot be imported ({error}); write MODULE:FUNCTION, with the module's folder in "
            "PYTHONPATH."
        ) from None
    schedule = rule(ranks, microbatches)
    if not isinstance(schedule, Schedule):
        raise ConfigError(f"the schedule '{name}' gives {type(schedule).__name__}; it must give a Schedule.")
    return schedule


def allowed_microbatches(parallel: Parallel) -> tuple[int, int]:
    """(multiple, least) that the number of micro-batches per data rank must be of, and at least."""
    ranks = parallel.pipeline
    if ranks == 1:
        return 1, 1
    if parallel.schedule.endswith((".txt", ".csv")):
        fixed = sum(_made(parallel, 0).microbatches)
        return fixed, fixed
    return {"dualpipe": (2, 2 * ranks), "dualpipev": (1, 2 * ranks), "interleaved-1f1b": (ranks, ranks)}.get(
        parallel.schedule, (1, 1)
    )


def require_layout(run: RunConfig) -> tuple[int, int]:
    """(multiple, least) of a batch in samples.   Fails (ConfigError) where batches, stages or dispatch do not fit."""
    if run.parallel.dispatch_fp8 and run.parallel.expert == 1:
        raise ConfigError(
            "parallel.dispatch_fp8 is true and parallel.expert 1; no token is sent to an expert then: leave the first "
            "out, or share experts with parallel.data=2 parallel.expert=2."
        )
    multiple, least = allowed_microbatches(run.parallel)
    unit = run.train.micro_batch_size * run.parallel.data
    for name in ("batch_size", "batch_start"):
        value = getattr(run.train, name)
        if (value % (multiple * unit) or value < least * unit) and (value or name == "batch_size"):
            near = max(least, -(-value // (multiple * unit)) * multiple)
            raise ConfigError(
                f"train.{name} is {value} with {run.parallel.schedule} on {run.parallel.pipeline} pipeline and "
                f"{run.parallel.data} data ranks and train.micro_batch_size {run.train.micro_batch_size}; it must be a "
                f"multiple of {multiple * unit} and at least {least * unit}: take {near * unit}, or another "
                "train.micro_batch_size."
            )
    if run.parallel.pipeline > 1:
        if run.train.recompute == "layer":
            raise ConfigError(
                "train.recompute=layer needs one pipeline rank: in a pipeline each part of a layer has its own graph; "
                "set train.recompute=attention."
            )
        try:
            schedule = schedule_of(run.parallel, run.train.batch_size // unit)
        except ScheduleError as error:
            raise ConfigError(f"parallel.schedule: {error}") from None
        stage_plans(run.model, schedule.stages, run.parallel.placement)
    return multiple * unit, least * unit
