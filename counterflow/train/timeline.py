"""One step of a pipeline as it was, over what the simulator makes of the same ops: the run's timeline.

The prediction is given the run's own mean time of every op and nothing else: where the two pictures differ, the time
went into transfers, waiting, and ops that took longer than usual.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from counterflow.schedule import picture, trace
from counterflow.schedule.measure import idle
from counterflow.schedule.simulate import makespan, simulate_ops
from counterflow.schedule.words import Op, Plan, Schedule, Span, StageId

TRACE, TIMELINE = "trace.json", "timeline.svg"


def write_timeline(
    folder: Path, schedule: Schedule, plans: Mapping[StageId, Plan], spans: Sequence[Span]
) -> None:
    """Write the measured trace, and the picture of predicted over measured."""
    measured = from_zero(spans)
    predicted = predict(schedule, plans, measured)
    (folder / TRACE).write_text(trace.write(measured), encoding="utf-8")
    both = {
        caption("predicted from its ops' mean times", predicted, schedule.ranks): predicted,
        caption("measured", measured, schedule.ranks): measured,
    }
    (folder / TIMELINE).write_text(picture.compare(both, schedule.ranks), encoding="utf-8")


def from_zero(spans: Sequence[Span]) -> list[Span]:
    """The spans with their first start at 0."""
    zero = min(span.start for span in spans)
    return [replace(span, start=span.start - zero, end=span.end - zero) for span in spans]


def predict(schedule: Schedule, plans: Mapping[StageId, Plan], measured: Sequence[Span]) -> list[Span]:
    """The schedule simulated with the mean time that each op took, micro-batches averaged."""
    return simulate_ops(schedule, plans, mean_seconds(measured))


def mean_seconds(measured: Sequence[Span]) -> Callable[[int, Op], float]:
    """Seconds of an op by its rank, kind, part and layer."""
    times: dict[tuple, list[float]] = defaultdict(list)
    for span in measured:
        op = span.what
        assert isinstance(op, Op), "a recorded step has ops"
        times[(span.rank, op.kind, op.part, op.layer)].append(span.end - span.start)
    means = {key: sum(some) / len(some) for key, some in times.items()}
    return lambda rank, op: means[(rank, op.kind, op.part, op.layer)]


def caption(what: str, spans: Sequence[Span], ranks: int) -> str:
    """What is shown, its length and its bubble."""
    whole = makespan(spans)
    share = sum(idle(spans, ranks)) / ranks / whole
    return f"{what}: {whole * 1e3:.0f} ms, ranks idle {share:.1%} of it"
