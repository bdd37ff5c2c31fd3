"""Spans as a Chrome trace, which Perfetto and chrome://tracing open: a process a rank, a thread a lane.

What is written can be read again, so that a measured run is compared with a prediction long after. Other tools' traces
are refused, not guessed at.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from counterflow.errors import ScheduleError
from counterflow.notation import from_json
from counterflow.schedule.words import PRIME, Cell, Chunk, Kind, Lane, Op, Part, Span, StageId

LANES = tuple(Lane)
JOIN = "&"
"""Between the values of a pair's chunks."""


def write(spans: Iterable[Span]) -> str:
    """The trace; times are rounded to 1 ns."""
    events = [_event(span) for span in spans]
    threads = sorted({(event["pid"], event["tid"]) for event in events})
    names = [
        _name("process_name", rank, 0, name=f"rank {rank}") for rank in sorted({rank for rank, _ in threads})
    ]
    for rank, lane in threads:
        names.append(_name("thread_name", rank, lane, name=LANES[lane]))
        names.append(_name("thread_sort_index", rank, lane, sort_index=lane))
    lines = ",\n".join(json.dumps(event, ensure_ascii=False) for event in names + events)
    return f'{{"displayTimeUnit": "ms", "traceEvents": [\n{lines}\n]}}\n'


def _name(what: str, rank: int, lane: int, **values: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": rank, "tid": lane, "args": values}


def _event(span: Span) -> dict[str, Any]:
    start, end = round(span.start * 1e6, 3), round(span.end * 1e6, 3)
    if isinstance(span.what, Op):
        op, chunk = span.what, span.what.chunk
        args = _said((chunk,)) | {"kind": op.kind, "part": op.part, "layer": op.layer, "chunk": chunk.kind}
        name = str(op)
    else:
        args, name = _said(span.what), JOIN.join(map(str, span.what))
    return {
        "ph": "X",
        "name": name,
        "cat": args["kind"],
        "ts": start,
        "dur": round(end - start, 3),
        "pid": span.rank,
        "tid": LANES.index(span.lane),
        "args": args,
    }


def _said(cell: Cell) -> dict[str, Any]:
    if len(cell) == 1:
        return {"kind": cell[0].kind, "stage": str(cell[0].stage), "mb": cell[0].mb}
    return {
        "kind": JOIN.join(chunk.kind for chunk in cell),
        "stage": JOIN.join(str(chunk.stage) for chunk in cell),
        "mb": JOIN.join(str(chunk.mb) for chunk in cell),
    }


def read(text: str) -> list[Span]:
    """The spans that `write` wrote.   Fails: ScheduleError naming the event that is none."""
    try:
        trace = from_json(text)
    except ValueError as error:
        raise ScheduleError(f"the trace is no JSON ({error}); counterflow writes one with --trace.") from None
    events = trace.get("traceEvents") if isinstance(trace, dict) else trace
    if not isinstance(events, Sequence) or isinstance(events, str):
        raise ScheduleError("the trace has no traceEvents; it must be a Chrome trace, as --trace writes it.")
    spans = []
    for place, event in enumerate(events):
        try:
            if event["ph"] == "X":
                spans.append(_span(event))
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise ScheduleError(
                f"event {place} of the trace is no chunk or op of a schedule ({type(error).__name__}: {error}); "
                "give a trace that counterflow wrote."
            ) from None
    return spans


def _span(event: Mapping[str, Any]) -> Span:
    start, end = event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
    rank = _count(event["pid"])
    if not (math.isfinite(start) and math.isfinite(end) and end >= start):
        raise ValueError(f"ts {event['ts']} and dur {event['dur']}")
    args = event["args"]
    if "part" not in args:
        return Span(rank, _cell(args["kind"], args["stage"], args["mb"]), start, end)
    (chunk,) = _cell(args["chunk"], args["stage"], args["mb"])
    kind = Kind(args["kind"])
    if kind is Kind.B:
        raise ValueError("an op is F, I or W")
    return Span(rank, Op(kind, Part(args["part"]), _count(args["layer"]), chunk), start, end)


def _cell(kinds: Any, stages: Any, microbatches: Any) -> Cell:
    chunks = zip(kinds.split(JOIN), stages.split(JOIN), str(microbatches).split(JOIN), strict=True)
    return tuple(Chunk(Kind(kind), _stage(stage), _count(int(mb))) for kind, stage, mb in chunks)


def _stage(text: str) -> StageId:
    return StageId(int(text.endswith(PRIME)), _count(int(text.removesuffix(PRIME))))


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} where a count must be")
    return value
