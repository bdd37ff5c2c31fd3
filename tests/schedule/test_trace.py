"""A trace is read back as it was written, opens in Perfetto, and anything else is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.errors import ScheduleError
from counterflow.schedule import SCHEDULES
from counterflow.schedule.simulate import simulate, simulate_ops
from counterflow.schedule.trace import read, write
from counterflow.schedule.words import Chunk, Kind, Op, Part, Span, StageId
from tests.schedule.cases import equal_plans

pytestmark = pytest.mark.pure

COUNT = st.integers(0, 999)
CHUNK = st.builds(Chunk, st.sampled_from(Kind), st.builds(StageId, st.integers(0, 1), COUNT), COUNT)
CELL = st.lists(CHUNK, min_size=1, max_size=2).map(tuple)
OP = st.builds(Op, st.sampled_from([Kind.F, Kind.I, Kind.W]), st.sampled_from(Part), COUNT, CHUNK)
TIME = st.floats(-10.0, 1e5, allow_nan=False)


@given(st.lists(st.tuples(COUNT, CELL | OP, TIME, st.floats(0.0, 1e4))))
def test_a_trace_reads_back_to_a_nanosecond(drawn):
    spans = [Span(rank, what, start, start + length) for rank, what, start, length in drawn]
    found = read(write(spans))
    assert [(span.rank, span.what) for span in found] == [(span.rank, span.what) for span in spans]
    for one, other in zip(found, spans):
        assert abs(one.start - other.start) <= 1e-9 and abs(one.end - other.end) <= 1e-9


def test_a_trace_of_cells_and_of_ops():
    schedule = SCHEDULES["dualpipe"](2, 4)
    cells = simulate(schedule)
    ops = simulate_ops(schedule, equal_plans(schedule), lambda rank, op: 0.25)
    assert read(write(cells)) == cells and read(write(ops)) == ops


def test_events_are_named_for_people():
    op = Op(Kind.W, Part.MLP, 7, Chunk(Kind.B, StageId(1, 2), 3))
    pair = Chunk(Kind.F, StageId(0, 1), 4), Chunk(Kind.B, StageId(1, 2), 3)
    transfer = op._replace(kind=Kind.I, part=Part.DISPATCH)
    events = json.loads(write([Span(5, op, 1.0, 1.5), Span(5, transfer, 1.0, 1.25), Span(6, pair, 0.0, 1.0)]))
    events = events["traceEvents"]
    mlp, dispatch, cell = (event for event in events if event["ph"] == "X")
    assert mlp == {
        "ph": "X",
        "name": "MLP7 W3'",
        "cat": "W",
        "ts": 1e6,
        "dur": 5e5,
        "pid": 5,
        "tid": 0,
        "args": {"kind": "W", "stage": "2'", "mb": 3, "part": "MLP", "layer": 7, "chunk": "B"},
    }
    assert (dispatch["tid"], dispatch["name"], dispatch["dur"]) == (1, "DISPATCH7 I3'", 2.5e5)
    assert cell["name"] == "F4&B3'" and cell["args"] == {"kind": "F&B", "stage": "1&2'", "mb": "4&3"}
    names = {
        (event["name"], event["pid"], event["tid"]): event["args"] for event in events if event["ph"] == "M"
    }
    assert names["process_name", 5, 0] == {"name": "rank 5"}
    assert names["thread_name", 5, 0] == {"name": "compute"}
    assert names["thread_name", 5, 1] == {"name": "all-to-all"}
    assert ("thread_name", 6, 1) not in names


def test_a_bare_list_of_events_is_a_trace_too():
    spans = simulate(SCHEDULES["1f1b"](1, 1))
    assert read(json.dumps(json.loads(write(spans))["traceEvents"])) == spans
    assert read("[]") == []


def broken(**changes):
    event = json.loads(write(simulate(SCHEDULES["1f1b"](1, 1))))["traceEvents"][-1]
    more = changes.pop("args", {})
    args = more if more == "gone" else {**event["args"], **more}
    event = {**event, "args": args, **changes}
    return json.dumps([{key: value for key, value in event.items() if value != "gone"}])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "nonsense",
        "[" * 100_000,
        "[" + "9" * 5000 + "]",
        "3",
        '"text"',
        "null",
        "{}",
        '{"traceEvents": 3}',
        '{"traceEvents": "XX"}',
        "[3]",
        "[null]",
        '["X"]',
        "[{}]",
        '[{"ph": "X"}]',
        broken(ts="soon"),
        broken(ts=None),
        broken(ts=float("nan")),
        broken(dur=-1.0),
        broken(dur=float("inf")),
        broken(dur=10**400),
        broken(dur="gone"),
        broken(pid=-1),
        broken(pid="0"),
        broken(pid=True),
        broken(args={"kind": "Q"}),
        broken(args={"kind": 3}),
        broken(args={"kind": "F&B"}),
        broken(args={"stage": "x"}),
        broken(args={"stage": "-1"}),
        broken(args={"mb": None}),
        broken(args={"mb": -2}),
        broken(args={"part": "MLP"}),
        broken(args={"part": "LUNCH", "layer": 0, "chunk": "F"}),
        broken(args={"part": "MLP", "layer": 0.5, "chunk": "F"}),
        broken(args={"kind": "B", "part": "MLP", "layer": 0, "chunk": "B"}),
        broken(args="gone"),
    ],
)
def test_what_counterflow_did_not_write_is_refused(text):
    with pytest.raises(ScheduleError, match="trace") as caught:
        read(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
