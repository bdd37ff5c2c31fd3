"""A line that fits, says what matters and how long the rest takes; lines at intervals where there is no terminal."""

import io

import pytest

from counterflow import progress
from counterflow.progress import Progress, Work, say, sized, watched
from counterflow.units import bytes_, count

pytestmark = pytest.mark.pure
FACTS = ("step 74/104", "1.18/1.66 M tokens", "loss 3.251", "1,035 tokens/s", "MaxVio 2.46", "MTP 3.301")


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Seconds that pass only by hand."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("width", [40, 60, 76, 96, 116, 200])
def test_the_line_fits_and_keeps_the_time_left(clock, width):
    work = Work("", 104, 0, start=0.0)
    work.update(74, FACTS)
    line = work.line(width, bar=True)
    assert len(line) <= width and line.endswith("40.5 s left") and "step 74/104" in line
    assert ("loss 3.251" in line) == (width >= 76) and 8 <= line.count("━") + line.count("╌") <= 30


def test_lines_where_there_is_no_terminal(clock):
    file = io.StringIO()
    with Progress("reading", 80, file=file) as work:
        for step in range(1, 9):
            clock[0] += 4.0
            work.update(8 * step, f"step {step}")
        work.note("held-out [bits] 1.5")
    assert file.getvalue().splitlines() == [
        "reading  step 2  32.0 s left",
        "reading  step 5  20.0 s left",
        "reading  step 8  8.0 s left",
        "held-out [bits] 1.5",
    ]


def test_what_is_over_soon_says_nothing_unless_it_stays(clock):
    for stays, said in ((False, ""), (True, "training  2/2  0.0 s left\n")):
        file = io.StringIO()
        with Progress("training", 2, stays=stays, file=file) as work:
            for step in (1, 2):
                work.update(step, f"{step}/2")
        assert file.getvalue() == said


def test_time_left_counts_from_where_it_went_on_and_without_a_total_time_is_what_passed(clock):
    work = Work("", 80, 64)
    clock[0] += 5.0
    work.update(72, ())
    assert work.time() == "5.0 s left"
    clock[0] += 2.0
    assert work.time() == "3.0 s left"
    assert Work("", None, 0, start=clock[0] - 7).time() == "7.0 s"


def test_a_part_is_shown_in_place_of_the_whole(clock):
    file = io.StringIO()
    with Progress("training", 10, file=file) as work:
        with work.part("held-out", 4):
            clock[0] += 6.0
            work.update(1, "1/4 samples")
        clock[0] += 14.0
        work.update(5, "step 5")
    assert file.getvalue().splitlines() == [
        "held-out  1/4 samples  18.0 s left",
        "training  step 5  20.0 s left",
    ]


def test_a_terminal_is_drawn_on_and_nothing_is_read_as_markup(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    file = Terminal()
    with Progress("training [x]", 16, stays=True, file=file) as work:
        work.update(8, *FACTS)
        work.note("held-out [bits] 1.5")
        work.update(16, "step 2/2")
    shown = file.getvalue()
    assert "training [x]" in shown and "held-out [bits] 1.5\n" in shown and "step 2/2" in shown


def test_long_lines_break_between_words_on_a_terminal_alone(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = (
        "two\nlines of which the second is longer than forty columns: /a/path-that/has-no-space/and-is-longer"
    )
    terminal, file = Terminal(), io.StringIO()
    say(text, terminal), say(text, file)
    assert file.getvalue() == text + "\n"
    lines = terminal.getvalue().splitlines()
    assert (
        " ".join(lines).split() == text.split()
        and all(len(line) <= 40 for line in lines[:-1])
        and len(lines) == 4
    )


def test_items_come_through_counted(monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST_AFTER_S", 0.0)
    assert list(watched("abc", "writing", 3, "texts")) == ["a", "b", "c"]
    assert capsys.readouterr().err == "writing  1/3 texts  0.0 s left\n"
    assert list(watched("abc", "writing", shown=False)) == ["a", "b", "c"]
    assert not capsys.readouterr().err


def test_the_unit_of_two_sizes_is_written_once():
    assert sized(512, 10_240, count) == "512 of 10.24 K"
    assert sized(2**20, 3 * 2**20, bytes_) == "1.00 of 3.00 MiB"
