"""A stream beside the current one, for what travels while the device computes; on a CPU there is none."""

import contextlib
from collections.abc import Iterator

import torch

Mark = torch.cuda.Event | None


class Lane:
    """What is issued here runs after what the current stream has been given so far, and in its own order."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @contextlib.contextmanager
    def issue(self) -> Iterator[None]:
        """Work of this lane."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Mark:
        """Where the lane is now."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event


def wait(mark: Mark) -> None:
    """The current stream goes on behind the mark."""
    if mark is not None:
        torch.cuda.current_stream().wait_event(mark)
