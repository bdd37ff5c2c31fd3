"""When each op really ran: the measured side of the picture that the simulator draws the predicted side of.

On a GPU an op is bracketed by two events on the stream it is issued to, read once after the step; on a CPU by the
clock. Waiting for another rank is not part of an op: it shows as the gap before it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from counterflow.comm.clock import Mark, mark
from counterflow.schedule.words import Op, Span


class Recorder:
    """Spans of one rank, in seconds since `zero` on the clock that all ranks of a host share."""

    def __init__(self, device: torch.device, zero: float = 0.0) -> None:
        self.device, self.zero = device, zero
        self._marks: list[tuple[int, Op, Mark, Mark]] = []
        self._origin, self._origin_at = None, 0.0
        if device.type == "cuda":
            self._origin = torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            self._origin.record()
            torch.cuda.synchronize(device)
            self._origin_at = time.perf_counter()

    def mark(self) -> Mark:
        """This moment on the device."""
        return mark(self.device)

    def note(self, rank: int, op: Op, start: Mark, end: Mark) -> None:
        """An op between two marks."""
        self._marks.append((rank, op, start, end))

    def spans(self) -> list[Span]:
        """All ops so far; waits for the device."""
        if self._origin is not None:
            torch.cuda.synchronize(self.device)
        return [Span(rank, op, self._at(start), self._at(end)) for rank, op, start, end in self._marks]

    def clear(self) -> None:
        """Forget what was noted."""
        self._marks.clear()

    def _at(self, moment: Mark) -> float:
        if not isinstance(moment, torch.cuda.Event):
            return moment - self.zero
        assert self._origin is not None, "events are told from an origin on their device"
        return self._origin_at + self._origin.elapsed_time(moment) / 1e3 - self.zero


@contextmanager
def recorded(recorder: Recorder | None, rank: int, op: Op) -> Iterator[None]:
    """Note an op's time, if anybody wants it."""
    if recorder is None:
        yield
        return
    start = recorder.mark()
    yield
    recorder.note(rank, op, start, recorder.mark())
