"""What a run's parallel settings mean: its schedule for a number of micro-batches, and which numbers it may have."""

from dataclasses import replace
from math import lcm

from counterflow.config.run import Parallel, RunConfig
from counterflow.errors import ConfigError, ScheduleError
from counterflow.plan.stages import stage_plans
from counterflow.schedule.named import checked, method
from counterflow.schedule.words import Schedule


def schedule_of(parallel: Parallel, microbatches: int) -> Schedule:
    """The run's schedule for so many micro-batches per data rank, checked.   Fails: ConfigError or ScheduleError."""
    return checked(parallel.schedule, parallel.pipeline, microbatches, parallel.stages_per_rank or None)


def allowed_microbatches(parallel: Parallel) -> tuple[int, int]:
    """(multiple, least) that the number of micro-batches per data rank must be of, and at least."""
    if parallel.pipeline == 1:
        return 1, 1
    allowed = method(parallel.schedule).allowed(parallel.pipeline)
    return allowed.step, allowed.start


def allowed_batches(run: RunConfig) -> tuple[int, int]:
    """(multiple, least) in samples: a batch is a multiple of the first and at least the second."""
    multiple, least = allowed_microbatches(run.parallel)
    unit = run.train.micro_batch_size * run.parallel.data
    return multiple * unit, least * unit


def begun(run: RunConfig) -> RunConfig:
    """The run with its batches decided: without an increment given, as fine a ramp as its layout allows."""
    train = run.train
    if not train.batch_start or train.batch_increment:
        return run
    return replace(run, train=replace(train, batch_increment=allowed_batches(run)[0]))


def continued_in(run: RunConfig, increment: int) -> RunConfig:
    """The run in a layout that it was not begun in, its ramp by `increment`: the same batches where it allows them.

    Else the ramp is coarser, or begins higher, by as little as will do. There always is such a ramp where the layout
    allows the full batch: that is a multiple of what it asks.
    """
    train, (multiple, least) = run.train, allowed_batches(run)
    if not train.batch_start:
        return run
    start = -(-max(train.batch_start, least) // multiple) * multiple
    grown = lcm(train.batch_increment or increment or 1, multiple)
    train = replace(train, batch_start=min(start, train.batch_size), batch_increment=grown)
    return replace(run, train=train)


def require_layout(run: RunConfig) -> None:
    """Refuse (ConfigError) a layout that batches, stages or dispatch do not fit."""
    if run.parallel.dispatch_fp8 and run.parallel.expert == 1:
        raise ConfigError(
            "parallel.dispatch_fp8 is true and parallel.expert 1; no token is sent to an expert then: leave the first "
            "out, or share experts with parallel.data=2 parallel.expert=2."
        )
    _require_batches(run)
    if run.parallel.pipeline > 1:
        if run.train.recompute == "layer":
            raise ConfigError(
                "train.recompute=layer needs one pipeline rank: in a pipeline each part of a layer has its own graph; "
                "set train.recompute=attention."
            )
        try:
            unit = run.train.micro_batch_size * run.parallel.data
            made = [schedule_of(run.parallel, batch // unit) for batch in _to_be_tried(run)]
        except ScheduleError as error:
            raise ConfigError(f"parallel.schedule: {error}") from None
        stage_plans(run.model, made[0].stages, run.parallel.placement)


def _to_be_tried(run: RunConfig) -> list[int]:
    """Batches of the run for which a schedule is made beforehand: the full one, and those of the ramp where nobody
    has said which the schedule allows."""
    train, known = run.train, method(run.parallel.schedule).microbatches is not None
    ramp = range(train.batch_start, train.batch_size, train.batch_increment or train.batch_size)
    return [train.batch_size, *(() if known or not train.batch_start else ramp)]


def _require_batches(run: RunConfig) -> None:
    """Every batch of the run is one that the layout allows if the first, the last and the increment are."""
    parallel, train, (multiple, least) = run.parallel, run.train, allowed_batches(run)
    for name, fewest in (("batch_size", least), ("batch_start", least), ("batch_increment", multiple)):
        value = getattr(train, name) if train.batch_start or name == "batch_size" else 0
        if (value % multiple or value < fewest) and (value or name == "batch_size"):
            near = -(-max(value, fewest) // multiple) * multiple
            raise ConfigError(
                f"train.{name} is {value} with {parallel.schedule} on {parallel.pipeline} pipeline and "
                f"{parallel.data} data ranks and train.micro_batch_size {train.micro_batch_size}; it must be a "
                f"multiple of {multiple} and at least {fewest}: take {near}, or another train.micro_batch_size."
            )
