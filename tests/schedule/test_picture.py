"""Pictures are sound XML, draw every span once and where it lies, and stay small."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.schedule import SCHEDULES
from counterflow.schedule.picture import LEFT, LINE, PLOT, RIGHT, THEMES, compare, svg, terminal
from counterflow.schedule.simulate import Costs, makespan, simulate, simulate_ops
from counterflow.schedule.words import Chunk, Kind, Op, Part, Span, StageId
from tests.schedule.cases import cases, equal_plans, made

pytestmark = pytest.mark.pure
WIDTH = LEFT + PLOT + RIGHT
SPACE = "{http://www.w3.org/2000/svg}"


def boxes(text: str) -> list[ElementTree.Element]:
    """The rectangles of spans, without second halves, legend, waits, frames and background."""
    found = ElementTree.fromstring(text).iter(f"{SPACE}rect")
    return [box for box in found if not {"h", "l", "w", "z", "bg"} & set((box.get("class") or "").split())]


def tip(box: ElementTree.Element) -> str:
    return box.findtext(f"{SPACE}title") or ""


def lanes(text: str) -> list[list[ElementTree.Element]]:
    """The rectangles of every row, in order."""
    groups = [group for group in ElementTree.fromstring(text).iter(f"{SPACE}g") if group.get("class") == "m"]
    return [
        [box for box in group.iter(f"{SPACE}rect") if "h" not in box.get("class").split()] for group in groups
    ]


@settings(max_examples=25)
@given(cases(), st.sampled_from([1e-5, 1.0, 1e4]), st.sampled_from([0.0, 77.0]))
def test_every_cell_is_drawn_once_in_proportion_to_its_time(case, size, start):
    schedule = made(case)
    spans = simulate(schedule, Costs(size, 2.3 * size, size, 2.9 * size))
    shifted = [replace(span, start=span.start + start, end=span.end + start) for span in spans]
    rows = lanes(svg(shifted, schedule.ranks))
    assert len(rows) in (schedule.ranks, 2 * schedule.ranks), "once, or its middle once more"
    rows = rows[: schedule.ranks]
    whole = makespan(spans)
    every = [box for row in rows for box in row]
    right = max(float(box.get("x")) + float(box.get("width")) for box in every)
    for rank, row in enumerate(rows):
        mine = [span for span in spans if span.rank == rank]
        assert [tip(box).split(" ")[0] for box in row] == ["&".join(map(str, span.what)) for span in mine]
        for box, span in zip(row, mine):
            assert float(box.get("x")) == pytest.approx(span.start / whole * right, abs=0.02)
            assert float(box.get("width")) == pytest.approx((span.end - span.start) / whole * right, abs=0.02)


def test_a_pair_is_framed_and_halved_in_two_colours():
    pair = Chunk(Kind.B, StageId(1, 0), 3), Chunk(Kind.F, StageId(0, 7), 12)
    root = ElementTree.fromstring(svg([Span(0, pair, 0.0, 3.0)], 1))
    first, second = (box for box in root.iter(f"{SPACE}rect") if tip(box))
    assert first.get("class") == "F p" and second.get("class") == "B r h"
    x, width = float(first.get("x")), float(first.get("width"))
    assert float(second.get("x")) == pytest.approx(x + width / 2, abs=0.02)
    assert float(second.get("x")) + float(second.get("width")) <= x + width
    assert tip(first) == tip(second) == "B3'&F12 0 – 3 s"
    numbers = [text.text for text in root.iter(f"{SPACE}text") if text.text in ("3", "12")]
    assert numbers == ["12", "3"]


def test_ops_have_two_lanes_a_rank():
    schedule = SCHEDULES["dualpipe"](4, 8)
    spans = simulate_ops(schedule, equal_plans(schedule), lambda rank, op: 1e-3)
    rows = lanes(svg(spans, 4, "measured"))[:8]
    assert len(rows) == 8 and sum(map(len, rows)) == len(spans)
    names = [{tip(box).split(" ")[0].rstrip("0123456789") for box in row} for row in rows]
    assert set().union(*names[::2]) == {"EMBED", "ATTN", "MLP", "HEAD"}
    assert set().union(*names[1::2]) == {"DISPATCH", "COMBINE"}
    assert all(re.fullmatch(r"\w+\d+ [FIW]\d+'? [\d.]+ – [\d.]+ ms", tip(box)) for row in rows for box in row)


def test_compared_pictures_share_one_axis_and_begin_together():
    schedule = SCHEDULES["1f1b"](2, 4)
    predicted = simulate(schedule, Costs(1.0, 2.0))
    measured = [Span(s.rank, s.what, 50 + 2 * s.start, 50 + 2 * s.end) for s in predicted]
    text = compare({"predicted <&>": predicted, "measured": measured}, 2)
    rows = lanes(text)
    assert len(rows) == 4
    for short, long in zip(rows[0] + rows[1], rows[2] + rows[3]):
        for side in ("x", "width"):
            assert 2 * float(short.get(side)) == pytest.approx(float(long.get(side)), abs=0.03)
    words = [element.text for element in ElementTree.fromstring(text).iter(f"{SPACE}text")]
    assert "predicted <&>" in words and "measured" in words
    assert compare({"a": predicted, "b": predicted}, {"a": 2, "b": 5}).count("rank 4</text>") == 1


def test_the_axis_has_round_numbers_where_they_belong():
    spans = simulate(SCHEDULES["dualpipe"](8, 20))
    root = ElementTree.fromstring(svg(spans, 8, unit=""))
    right = max(float(box.get("x")) + float(box.get("width")) for box in boxes(svg(spans, 8)))
    ticks = [float(line.get("x1")) for line in root.iter(f"{SPACE}line")]
    labels = [text.text for text in root.iter(f"{SPACE}text") if text.get("class") == "m a"]
    assert labels[:3] == ["0", "10", "20"] and len(labels) == len(ticks) == 7
    for tick, label in zip(ticks, labels):
        assert tick == pytest.approx(LEFT + float(label) / 66 * right, abs=0.02)


@pytest.mark.parametrize(
    ("name", "ranks", "count", "larger"),
    [("dualpipe", 8, 20, False), ("dualpipe", 16, 120, True), ("zb1p", 4, 8, False)],
)
def test_a_picture_is_a_page_wide_and_where_numbers_have_no_room_its_middle_is_larger(
    name, ranks, count, larger
):
    spans = simulate(SCHEDULES[name](ranks, count))
    text = svg(spans, ranks, "a name")
    root = ElementTree.fromstring(text)
    width, height = map(float, root.get("viewBox").split()[2:])
    assert width == WIDTH and root.get("width") == f"{WIDTH}"
    for box in [*boxes(text), *(box for box in root.iter(f"{SPACE}rect") if box.get("class") in ("w", "z"))]:
        right = float(box.get("x")) + float(box.get("width"))
        assert float(box.get("x")) >= 0 and right <= width, "a box outside of the picture"
    for word in root.iter(f"{SPACE}text"):
        assert 0 <= float(word.get("x")) <= width and float(word.get("y")) <= height
    assert [box.get("class") for box in root.iter(f"{SPACE}rect")].count("z") == larger
    assert len(lanes(text)) == ranks * (1 + larger)
    shown = lanes(text)[-ranks:]
    whole = [box for row in shown for box in row[1:-1]]
    chunks = sum(1 + ("&" in tip(box)) for box in whole)
    groups = [group for group in root.iter(f"{SPACE}g") if group.get("class") == "m"][-ranks:]
    assert sum(len(list(group.iter(f"{SPACE}text"))) for group in groups) >= chunks, (
        "a chunk without its number"
    )


def test_the_legend_names_what_is_drawn_and_nothing_else():
    cell, pair = (
        (Chunk(Kind.F, StageId(0, 0), 0),),
        (Chunk(Kind.F, StageId(1, 0), 1), Chunk(Kind.B, StageId(0, 0), 0)),
    )
    forward, waits, number = "forward", "waiting", "a number: the micro-batch"
    assert legend(svg([Span(0, cell, 0, 1)], 1)) == [forward, number]
    assert legend(svg([Span(0, cell, 0, 1)], 2)) == [forward, waits, number]
    lighter, halves = "lighter: in the reverse direction", "two halves in an outline: both overlapped"
    both = svg([Span(0, cell, 0, 1), Span(0, pair, 2, 3)], 1)
    assert legend(both) == [forward, "backward", lighter, waits, halves, number]
    op = Op(Kind.F, Part.ATTN, 2, cell[0])
    text = svg([Span(0, op, 0, 1)], 1)
    assert legend(text) == [forward, "a word: part and layer"] and ">ATTN 2<" in text


def legend(text: str) -> list[str]:
    """Its entries."""
    root = ElementTree.fromstring(text)
    last = max(float(line.get("y2")) for line in root.iter(f"{SPACE}line"))
    return [word.text for word in root.iter(f"{SPACE}text") if float(word.get("y")) > last + 2 * LINE]


def test_transfers_that_take_no_time_get_no_row():
    chunk = Chunk(Kind.F, StageId(0, 0), 0)
    for moving, rows in ((1e-4, 1), (0.5, 2)):
        spans = [Span(0, Op(Kind.F, Part.ATTN, 1, chunk), 0, 1)]
        spans.append(Span(0, Op(Kind.F, Part.DISPATCH, 1, chunk), 1, 1 + moving))
        text = svg(spans, 1)
        assert len(lanes(text)) == rows and ("dispatch, combine" in text) == (rows == 2)


def test_themes_are_the_readers_or_one():
    spans = simulate(SCHEDULES["1f1b"](2, 4))
    free, light, dark = (compare({"": spans}, 2, theme=theme) for theme in ("", "light", "dark"))
    assert "prefers-color-scheme" in free and "prefers-color-scheme" not in light + dark
    assert THEMES["dark"]["paper"] in dark and THEMES["dark"]["paper"] not in light


def test_nothing_and_no_time_can_be_drawn():
    cell = (Chunk(Kind.F, StageId(0, 0), 0),)
    for spans in ([], [Span(0, cell, 2.0, 2.0)]):
        ElementTree.fromstring(svg(spans, 2, "nothing"))
        assert terminal(spans, 2, 20).count("\n") == 2
    ElementTree.fromstring(compare({}, 3))


def test_thousands_of_spans_stay_small():
    spans = simulate(SCHEDULES["dualpipe"](16, 120))
    text = svg(spans, 16)
    assert "style=" not in text and len(text) < 250 * len(spans)


def test_fig5_in_a_terminal():
    lines = terminal(simulate(SCHEDULES["dualpipe"](8, 20)), 8, 134).splitlines()
    assert len(lines) == 8 and {len(line) for line in lines} == {134}
    assert lines[0].startswith("0 F0F1F2F3F4F5F6F0I0W0F1I1W1F2I2W2F3F7&B3'······F4'&B0F8&B4'")
    assert lines[3].startswith("3 ······F0F0F1F1F2F2F3F3F4B0' F4'&B0F5&B1'")
    assert all(line.count("·") == 12 for line in lines), "six units of idle time on every rank"


def test_narrow_terminals_keep_the_kinds():
    lines = terminal(simulate(SCHEDULES["dualpipe"](8, 20)), 8, 70).splitlines()
    assert lines[0].startswith("0 FFFFFFFFIWFIWFIWFFB ···FB FB ") and {len(line) for line in lines} == {68}


@settings(max_examples=25)
@given(cases(), st.integers(10, 200), st.booleans())
def test_terminal_lines_are_as_wide_as_asked(case, width, of_ops):
    schedule = made(case)
    spans = simulate(schedule)
    lanes_of_rank = 1
    if of_ops and schedule.ranks <= 2:
        spans, lanes_of_rank = simulate_ops(schedule, equal_plans(schedule), lambda rank, op: 1.3), 2
    plain = terminal(spans, schedule.ranks, width)
    (length,) = {len(line) for line in plain.splitlines()}
    assert width / 2 <= length <= width, "equal cells may cost up to half of the columns"
    assert len(plain.splitlines()) == lanes_of_rank * schedule.ranks
    coloured = terminal(spans, schedule.ranks, width, colours=True)
    stripped = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert [len(line) for line in stripped.splitlines()] == [len(line) for line in plain.splitlines()]
    assert stripped.count("·") == plain.count("·")
