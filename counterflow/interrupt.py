"""Ctrl-C heard at once, whatever the main thread is doing.

Python runs a signal's handler between two steps of the interpreter, so one long call into a library (merges of a
tokenizer, a wait for another rank) keeps it waiting. The number of a signal, however, lies in a file descriptor the
moment it comes (`signal.set_wakeup_fd`), and a thread reads there. Not taken: handlers alone, which answered after the
step, up to 16 s later.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

GRACE_S = 0.7
"""What the main thread has to take an interrupt before the process ends without it."""
INTERRUPTED = 128 + signal.SIGINT
SHOW_CURSOR = "\x1b[?25h"
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""What a scheduler sends before its limit: Slurm's --signal, SGE, LSF; SIGXCPU before one of processor time."""
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *WARNINGS)
"""What tells a training to end: Ctrl-C, a scheduler, a lost terminal."""
SET_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl."""


@contextmanager
def heard(listen: Callable[[int], None]) -> Iterator[None]:
    """While inside, `listen` is called in a thread with the number of every handled signal, the moment it comes.

    The innermost one hears. Only the main thread can set it up; elsewhere nothing is heard.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    source, sink = os.pipe()
    os.set_blocking(sink, False)

    def follow() -> None:
        while number := os.read(source, 1)[0]:
            listen(number)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(sink, b"\0")  # no signal's number; a child that was forked may still hold the other end
        thread.join()
        os.close(sink)
        os.close(source)


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Ctrl-C ends the process within a second: as KeyboardInterrupt, or without the main thread if that is kept."""
    taken = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        taken.set()
        raise KeyboardInterrupt

    def listen(number: int) -> None:
        if number == signal.SIGINT and not taken.wait(GRACE_S):
            end_now()

    with handled(interrupt, signal.SIGINT), heard(listen):
        yield


@contextmanager
def stop_signals(
    say: Callable[[], object] = lambda: None, numbers: Sequence[int] = (signal.SIGINT, signal.SIGTERM)
) -> Iterator[list[int]]:
    """Collects these signals while inside, so that no step is cut short; a second SIGINT stops at once.

    `say` is called in another thread, the moment that the first of them comes.
    """
    got: list[int] = []
    first, taken = threading.Event(), threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in got:
            taken.set()
            raise KeyboardInterrupt
        got.append(number)

    def listen(number: int) -> None:
        if number in numbers and not first.is_set():
            first.set()
            with suppress(OSError):  # whoever read it may have gone
                say()
        elif number == signal.SIGINT and not taken.wait(GRACE_S):
            end_now()

    with handled(note, *numbers), heard(listen):
        yield got


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """A handler of signals while inside; the main thread alone may have one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heeded = [
        number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN
    ]  # nohup stays nohup
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def end_with_parent() -> None:
    """Have Linux end this process as soon as the one that started it is gone; elsewhere nothing does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL)


def say_interrupted() -> None:
    """One line, from the first of several ranks."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print("counterflow: interrupted.", file=sys.stderr, flush=True)


def end_now() -> None:
    """End the process from any thread; nothing is tidied up but the terminal, whose cursor a progress line hides."""
    if sys.stderr.isatty():
        sys.stderr.write(f"{SHOW_CURSOR}\n")
    say_interrupted()
    os._exit(INTERRUPTED)
