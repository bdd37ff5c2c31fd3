"""How far a piece of work is and how long the rest takes: one line that fits a terminal, lines at intervals elsewhere.

The line is a bar, what has been done and the time left; where it is too narrow the later facts go first, the time left
stays, and so does room for the `^C` that a terminal writes behind it. Not taken: rich's own columns, which cut the time
left at 80 columns, and one bar each for tokenising, training and the rest, which looked and counted differently.
"""

import errno
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TextIO, TypeVar

from counterflow.units import seconds

Item = TypeVar("Item")
FIRST_AFTER_S, EVERY_S = 5.0, 10.0
"""Where nobody watches, the first line comes after so many seconds, the others every so many."""
BAR, LEAST_BAR, MARGIN = 30, 8, 4
"""Columns of a bar, at most and at least, and those left free at the end of the line."""


@dataclass
class Work:
    """What is done of something, in any unit, since when, and what there is to say of it, the most important first."""

    what: str
    total: float | None
    done: float
    facts: tuple[str, ...] = ()
    start: float = field(default_factory=lambda: time.monotonic())

    def __post_init__(self) -> None:
        self._first, self._changed = self.done, self.start

    def update(self, done: float, facts: tuple[str, ...]) -> None:
        """So much is done."""
        self.done, self.facts, self._changed = done, facts, time.monotonic()

    def time(self) -> str:
        """How long the rest takes, by what was done so far; without a total or a beginning, how long it took."""
        now, done = time.monotonic(), self.done - self._first
        if not self.total or done <= 0:
            return seconds(now - self.start)
        rest = (self._changed - self.start) / done * (self.total - self.done)
        return f"{seconds(max(0.0, rest - (now - self._changed)))} left"

    def line(self, width: int, bar: bool) -> str:
        """What there is to say in so many columns."""
        parts = [self.what, *self.facts, self.time()]
        least = (LEAST_BAR + 2) if bar and self.total else 0
        while len(parts) > 2 and len("  ".join(parts)) + least > width:
            del parts[-2]
        rest = width - len("  ".join(parts)) - 2
        if least and rest >= LEAST_BAR:
            parts.insert(1, self._bar(min(BAR, rest)))
        return "  ".join(part for part in parts if part)[:width]

    def _bar(self, columns: int) -> str:
        filled = round(columns * min(1.0, self.done / (self.total or 1.0)))
        return "━" * filled + "╌" * (columns - filled)


class Progress:
    """A piece of work, `what`, of `total` (None: nobody knows), of which `done` is done when it begins.

    On a terminal the line goes away with the work, unless it `stays`; elsewhere nothing is said of what is over before
    the first line is due, unless it `stays`. Where its terminal is lost the work goes on without lines, and where they
    go into a pipe whose reader has gone, if it `stays`; `closed` then says so.
    """

    def __init__(
        self,
        what: str,
        total: float | None = None,
        done: float = 0.0,
        shown: bool = True,
        stays: bool = False,
        file: TextIO | None = None,
    ) -> None:
        self._work, self._stays, self._shown = [Work(what, total, done)], stays, shown
        self._file, self._live, self.closed = file or sys.stderr, None, False
        self._due = time.monotonic() + FIRST_AFTER_S

    def __enter__(self) -> "Progress":
        if self._shown and self._file.isatty():
            from rich.console import Console
            from rich.live import Live
            from rich.text import Text

            console = Console(file=self._file)

            def drawn() -> Text:
                line = self._work[-1].line(console.width - MARGIN, bar=True)
                return Text(line, no_wrap=True, overflow="crop")

            self._live = Live(get_renderable=drawn, console=console, transient=not self._stays)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            with self._read():
                self._live.stop()

    def update(self, done: float, *facts: str) -> None:
        """So much is done, and what there is to say of it, the most important first."""
        work = self._work[-1]
        work.update(done, facts)
        last = self._stays and len(self._work) == 1 and work.total is not None and done >= work.total
        if self._shown and self._live is None and (time.monotonic() >= self._due or last):
            self._due = time.monotonic() + EVERY_S
            with self._read():
                print(self.said(), file=self._file, flush=True)

    def advance(self, by: float, *facts: str) -> None:
        """So much more is done."""
        self.update(self._work[-1].done + by, *facts)

    @contextmanager
    def part(self, what: str, total: float | None = None) -> Iterator[None]:
        """Something else for a while, shown in place of the whole."""
        self._work.append(Work(what, total, 0.0))
        try:
            yield
        finally:
            self._work.pop()

    def said(self) -> str:
        """The line as it is now, without a bar."""
        return self._work[-1].line(1000, bar=False)

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        with self._read():
            if self._live is not None:
                self._live.console.print(text, markup=False, highlight=False)
            elif self._shown:
                say(text, self._file)

    @contextmanager
    def _read(self) -> Iterator[None]:
        """For writing what may be read no more: by a terminal that was lost, or a pipe's reader that has gone."""
        try:
            yield
        except OSError as error:
            if error.errno != errno.EIO and not (error.errno == errno.EPIPE and self._stays):
                raise
            self.closed |= error.errno == errno.EPIPE
            nowhere = os.open(os.devnull, os.O_WRONLY)  # what others print there later goes nowhere either
            os.dup2(nowhere, self._file.fileno())
            os.close(nowhere)


def say(text: str, file: TextIO | None = None) -> None:
    """Print lines; those too long for a terminal are broken between words."""
    out = file or sys.stdout
    if out.isatty():
        width = shutil.get_terminal_size().columns
        fill = partial(textwrap.fill, width=width, break_long_words=False, break_on_hyphens=False)
        text = "\n".join(fill(line) if len(line) > width else line for line in text.split("\n"))
    print(text, file=out, flush=True)


def watched(
    items: Iterable[Item], what: str, total: float | None = None, unit: str = "", shown: bool = True
) -> Iterator[Item]:
    """The items, with a line on stderr that says how many of how many `unit` are done and how long the rest takes."""
    with Progress(what, total, shown=shown) as progress:
        for count, item in enumerate(items, start=1):
            yield item
            progress.update(count, f"{count}{f'/{total:g}' if total else ''} {unit}".rstrip())


def sized(size: float, total: float, show: Callable[[float], str]) -> str:
    """'1.2 of 6.0 MiB': so much of a total, the unit written once where it is the same."""
    some, whole = show(size), show(total)
    number, _, unit = some.rpartition(" ")
    return f"{number if unit and whole.endswith(f' {unit}') else some} of {whole}"
